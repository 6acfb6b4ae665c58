"""The published results, and how ours compare with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ruamel.yaml import YAML

FILE = Path(__file__).parent / "published.yaml"


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
    tolerance: float
    """Largest difference at which a result of ours counts as the same."""
    method: str | None = None
    schedule: str | None = None
    parameters: int | None = None
    """Millions, of the whole model."""


@dataclass(frozen=True)
class Comparison:
    """A result of ours beside the published one; percent."""

    published: Published
    ours: float

    @property
    def difference(self) -> float:
        """Ours minus published."""
        return self.ours - self.published.value

    @property
    def reached(self) -> bool:
        """Whether ours is better than the published one, or less by no more than the tolerance."""
        # Rounded first: in binary 82.6 - 82.7 is not quite -0.1.
        return round(self.difference, 4) >= -self.published.tolerance

    @property
    def verdict(self) -> str:
        """`reached`, or that it is not."""
        return "reached" if self.reached else f"not within {self.published.tolerance}"


@cache
def load_published() -> tuple[Published, ...]:
    """All published results."""
    content = YAML(typ="safe").load(FILE.read_text())
    tolerance = content["tolerance"]
    return tuple(Published(**row, tolerance=tolerance[row["metric"]]) for row in content["results"])


def compare(
    metrics: Mapping[str, float],
    *,
    model: str,
    task: str,
    method: str | None = None,
    schedule: str | None = None,
) -> list[Comparison]:
    """Results of ours beside what is published for the same model, task, method and schedule.

    Args:
        metrics: ours, in percent; those that were not published are left out.
    """
    return [
        Comparison(row, metrics[row.metric])
        for row in load_published()
        if (row.model, row.task, row.method, row.schedule) == (model, task, method, schedule)
        and row.metric in metrics
    ]
