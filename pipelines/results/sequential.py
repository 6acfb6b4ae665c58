"""Whether points differ from a reference, looked at again after each seed.

A group-sequential test of paired differences by Student's t. The points share a family-wise error
of 5%: of all comparisons and all looks together, at most one sweep in twenty finds a difference
where there is none. Repeated confidence intervals (Jennison and Turnbull 1989, https://doi.org/10.1111/
j.2517-6161.1989.tb01433.x) with an error spent as the square of the share of seeds (Kim and DeMets
1987, https://doi.org/10.1093/biomet/74.1.149), divided over the points by Šidák's inequality.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean

ERROR = 0.05
"""Family-wise, two-sided."""
FIRST_LOOK = 3
"""Fewer pairs decide nothing, unless there are no more."""
PATHS = 400_000
"""Simulated sequences of differences without a mean, from which the bounds are read."""


@dataclass(frozen=True)
class Decision:
    """What is known of a point beside the reference."""

    verdict: str
    """`better`, `worse`, `within 0.5` (the smallest difference that matters), or `open`."""
    seeds: int
    """Pairs that it was made from: of a decision, those at its time."""
    mean: float
    half: float | None
    """The difference lies within `mean` ± this, at all looks and for all points together; None
    where there is no interval."""


@dataclass(frozen=True)
class Design:
    """How often, and at how many points at once, differences are looked at.

    Attributes:
        comparisons: points beside the reference.
        seeds: the most that a point gets. A look is taken after each from `FIRST_LOOK` on.
        smallest: a difference that does not matter, in the units of the scores; 0: any does.
    """

    comparisons: int
    seeds: int
    smallest: float = 0.0

    @property
    def error(self) -> float:
        """Of one comparison, at all of its looks together."""
        return float(1 - (1 - ERROR) ** (1 / self.comparisons))

    def half(self, differences: Sequence[float]) -> float | None:
        """Half the width of the interval around the mean of paired differences; None before the
        first look, and where all are equal: scores that count few images tell no spread so."""
        count = len(differences)
        first = min(FIRST_LOOK, self.seeds)
        if count < max(first, 2) or max(differences) - min(differences) < 1e-9:
            return None
        bound = bounds(self.error, self.seeds)[min(count, self.seeds) - first]
        mean = fmean(differences)
        squares = sum((value - mean) ** 2 for value in differences)
        return float(bound * (squares / (count - 1) / count) ** 0.5)

    def decide(self, differences: Sequence[float]) -> Decision:
        """The first look, in the order of the seeds, that decides; else the last.

        Args:
            differences: scores less the reference's, by seed, one or more.
        """
        decision = Decision("open", 0, 0.0, None)
        for count in range(1, len(differences) + 1):
            known = differences[:count]
            mean, half = fmean(known), self.half(known)
            decision = Decision(self.verdict(mean, half), count, mean, half)
            if decision.verdict != "open":
                break
        return decision

    def verdict(self, mean: float, half: float | None) -> str:
        """Of one look; `half` is None where there is no interval."""
        if half is None:
            return "open"
        if abs(mean) > half:
            return "better" if mean > 0 else "worse"
        return f"within {self.smallest:g}" if abs(mean) + half <= self.smallest else "open"


@cache
def bounds(error: float, seeds: int) -> tuple[float, ...]:
    """What |t| must pass after `FIRST_LOOK`, ..., `seeds` pairs.

    Args:
        error: the chance that it does at any of these looks, where there is no difference.
    """
    import numpy as np
    from scipy.stats import t

    first = min(FIRST_LOOK, seeds)
    spent = [error * (count / seeds) ** 2 for count in range(first, seeds + 1)]
    found = [float(t.ppf(1 - spent[0] / 2, first - 1))]
    random = np.random.default_rng(0)
    values = random.standard_normal((first, PATHS))
    total, squares = values.sum(0), (values**2).sum(0)
    for count in range(first, seeds + 1):
        if count > first:
            values = random.standard_normal(len(total))
            total, squares = total + values, squares + values**2
        variance = (squares - total**2 / count) / (count - 1)
        size = abs(total) / np.sqrt(count * variance)
        if count > first:
            passing = round(PATHS * spent[count - first]) - (PATHS - len(total))
            found.append(float(np.partition(size, -passing)[-passing]) if passing > 0 else np.inf)
        stays = size < found[-1]
        total, squares = total[stays], squares[stays]
    return tuple(found)
