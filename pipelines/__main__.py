"""`elsa` and `python -m pipelines`: the command line, where what it needs is installed."""

import sys


def run() -> None:
    """Run the command; where a package is missing say how to install it."""
    try:
        from pipelines.cli import main

        main()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("", "pipelines", "elsa", "ops"):
            raise
        sys.exit(
            f"error: {error.name} is missing: this command needs the extra `pipeline`, and Python"
            ' 3.12; run `make setup` in a checkout, or see "Only the models" in README.md'
        )


if __name__ == "__main__":
    run()
