"""The error that a user is meant to read."""


class PipelineError(Exception):
    """What is wrong and where, and how to fix it.

    The stages and commands print it without a traceback and exit with code 1.

    Attributes:
        wrong: what is wrong, and where.
        fix: what to do about it; empty where `wrong` says it, or nothing can be done.
    """

    def __init__(self, wrong: str, fix: str = "") -> None:
        super().__init__(wrong, fix)  # both, so that it can be pickled
        self.wrong, self.fix = wrong, fix

    def __str__(self) -> str:
        return f"{self.wrong}. {self.fix}" if self.fix else self.wrong
