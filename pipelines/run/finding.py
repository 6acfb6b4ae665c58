"""What a check found on a node."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One check's result on one node."""

    check: str
    node: str
    found: str
    fix: str = ""
    """What to do about it; empty where all is well."""


def short(error: BaseException) -> str:
    """The error's last line, without its end mark."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[-1].strip().rstrip(".")[:300]
