"""Sweeps that stop when they have decided find what is there, and seldom what is not."""

import numpy as np
import pytest
from scipy.stats import binomtest, nct, t

from pipelines.results.sequential import Decision, Design


def decisions(design: Design, random: np.random.Generator, shift: float) -> list[Decision]:
    """Of a sweep whose paired differences have a standard deviation of 1 and a mean of `shift`."""
    scores = random.normal(0, 0.5**0.5, (design.comparisons + 1, design.seeds))
    return [design.decide(list(point + shift - scores[0])) for point in scores[1:]]


def at_most_one_in_twenty(wrong: int, of: int) -> bool:
    """As far as that many can tell; nor so few that it finds nothing."""
    less, more = (binomtest(wrong, of, 0.05, one).pvalue for one in ("less", "greater"))
    return more > 0.05 and less > 1e-4


@pytest.mark.parametrize("seeds", [3, 10])
def test_at_most_one_sweep_in_twenty_finds_what_is_not_there(seeds: int) -> None:
    random, design = np.random.default_rng(0), Design(5, seeds)
    found = [decisions(design, random, 0.0) for _ in range(1000)]
    wrong = sum(any(one.verdict != "open" for one in sweep) for sweep in found)
    assert at_most_one_in_twenty(wrong, 1000), wrong


def test_a_difference_of_a_standard_deviation_is_found_with_fewer_trials() -> None:
    """Than a fixed number of seeds takes for the same power."""
    random, design = np.random.default_rng(0), Design(5, 30)
    found = [decisions(design, random, 1.0) for _ in range(300)]
    power = np.mean([one.verdict == "better" for sweep in found for one in sweep])
    trials = np.mean([sum(o.seeds for o in s) + max(o.seeds for o in s) for s in found])
    bound, fixed = design.error / 2, 4
    while 1 - nct.cdf(t.ppf(1 - bound, fixed - 1), fixed - 1, fixed**0.5) < power:
        fixed += 1
    assert power > 0.97
    assert trials < 0.7 * 6 * fixed


def test_the_intervals_hold_at_every_look() -> None:
    random, design = np.random.default_rng(0), Design(1, 8, smallest=0.4)
    missed = 0
    for _ in range(1000):
        values = list(random.normal(0.5, 1.0, 8))
        halves = [(design.half(values[:n]), np.mean(values[:n])) for n in range(3, 9)]
        missed += any(abs(mean - 0.5) > half for half, mean in halves)
    assert at_most_one_in_twenty(missed, 1000), missed


def test_one_look_is_students_t() -> None:
    values = [1.0, 2.0, 4.0]
    low, high = np.mean(values) + t.ppf([0.025, 0.975], 2) * np.std(values, ddof=1) / 3**0.5
    assert Design(1, 3).half(values) == pytest.approx((high - low) / 2)
    assert Design(1, 10).half(values) > 2 * (high - low) / 2
    assert Design(1, 3).half(values[:2]) is None
    assert Design(1, 2).half(values[:2]) is not None


def test_a_point_is_better_worse_within_what_matters_or_open() -> None:
    design = Design(3, 6, smallest=1.0)
    small = [0.01, -0.02, 0.03, 0.0, 0.01, -0.01]
    assert design.decide([5 + value for value in small]).verdict == "better"
    assert design.decide([-5 + value for value in small]).verdict == "worse"
    assert design.decide(small).verdict == "within 1"
    assert Design(3, 6).decide(small).verdict == "open"
    assert design.decide([10.0] * 6).verdict == "open"  # of ten images, say
    assert design.decide([0.0] * 6).verdict == "open"
    assert design.decide([4.0]) == Decision("open", 1, 4.0, None)
    first = design.decide([5.0, 5.01, 4.99, -100.0, 100.0])
    assert (first.verdict, first.seeds) == ("better", 3)  # and it stays so
