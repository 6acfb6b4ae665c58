"""The published results, and how ours compare with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

FILE = Path(__file__).parent / "published.yaml"
OTHER_RECIPES = ("elsa_swin_tiny_a2",)
"""For models with published results, which were trained by other recipes."""


@dataclass(frozen=True)
class Published:
    """One published number."""

    model: str
    """timm's name."""
    task: str
    """`classify`, `detect` or `segment`."""
    metric: str
    value: float
    """Percent."""
    method: str | None = None
    schedule: str | None = None
    parameters: int | None = None
    """Millions, of the whole model."""
    source: str = "paper"
    """Key of `sources` in the file."""


@dataclass(frozen=True)
class Comparison:
    """A result of ours beside the published one; percent."""

    published: Published
    ours: float
    tolerance: float
    """By how much ours may be less and still count as reached."""

    @property
    def difference(self) -> float:
        """Ours minus published."""
        return self.ours - self.published.value

    @property
    def reached(self) -> bool:
        """Whether ours is better than the published one, or less by no more than the tolerance."""
        # Rounded first: in binary 82.6 - 82.7 is not quite -0.1.
        return round(self.difference, 4) >= -self.tolerance

    @property
    def verdict(self) -> str:
        """`reached`, or that it is not."""
        return "reached" if self.reached else f"not within {self.tolerance}"


@cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = YAML(typ="safe").load(FILE.read_text())
    return content


@cache
def load_published() -> tuple[Published, ...]:
    """All published results."""
    return tuple(Published(**row) for row in _content()["results"])


def sources() -> dict[str, str]:
    """What each source of published results is."""
    found: dict[str, str] = _content()["sources"]
    return found


def compare(
    metrics: Mapping[str, float],
    *,
    model: str,
    task: str,
    method: str | None = None,
    schedule: str | None = None,
    evaluated: bool = False,
) -> list[Comparison]:
    """Results of ours beside what the model's own authors published for the same task, method and
    schedule.

    Args:
        metrics: ours, in percent; those that were not published are left out.
        evaluated: ours is of given weights, not of a training.
    """
    tolerance = _content()["tolerance"]["evaluated" if evaluated else "trained"]
    return [
        Comparison(row, metrics[row.metric], tolerance)
        for row in load_published()
        if (row.model, row.task, row.method, row.schedule) == (model, task, method, schedule)
        and row.metric in metrics
        and row.source != "quoted"
    ]
