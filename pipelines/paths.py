"""Where this checkout is, and where its runs are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "pipelines" / "recipes"


def shared_root(root: Path) -> Path:
    """The repository of a checkout.

    That is the checkout itself, or, where DVC copied it to run an experiment (`dvc exp run --queue`
    or `--temp`) and will delete it, the repository in whose `.dvc` folder the copy is.
    """
    return next((path.parent for path in root.parents if path.name == ".dvc"), root)


SHARED = shared_root(ROOT)
"""Where runs, their storage and MLflow's store are, which outlive an experiment."""
