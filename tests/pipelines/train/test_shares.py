"""Whose shares of a step are whose, and sums that do not depend on it."""

from itertools import combinations, pairwise

import pytest
import torch

from pipelines.train.shares import Node, Tree, allot, allot_anew, places, share_seed


def cuts(shares: int, workers: int) -> list[list[range]]:
    """Every way to give each worker one share or more."""
    return [
        [range(a, b) for a, b in pairwise((0, *inner, shares))]
        for inner in combinations(range(1, shares), workers - 1)
    ]


@pytest.mark.parametrize("shares", [1, 2, 3, 6, 8, 11])
def test_the_sum_has_the_same_bits_however_shares_are_cut(shares: int) -> None:
    values = torch.randn(shares, 50) * 10.0 ** torch.randint(-3, 4, (shares, 1))
    sums = []
    for workers in range(1, min(shares, 4) + 1):
        for ranges in cuts(shares, workers):
            whole = Tree()
            for own in ranges:
                part = Tree()
                for share in own:
                    part.add(Node(share, 1, values[share].clone()))
                assert [(node.first, node.size) for node in part.nodes] == places(own)
                for node in part.nodes:
                    whole.add(node)
            sums.append(whole.total())
    assert all(torch.equal(found, sums[0]) for found in sums)
    torch.testing.assert_close(sums[0], values.double().sum(0).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seconds", [[1, 1], [1, 2], [1, 1, 1], [3, 1, 2.5], [1, 9]])
def test_shares_are_allotted_so_that_the_slowest_worker_is_done_soonest(
    seconds: list[float],
) -> None:
    def slowest(ranges: list[range]) -> float:
        return max(len(own) * each for own, each in zip(ranges, seconds, strict=True))

    for shares in range(len(seconds), 12):
        best = min(map(slowest, cuts(shares, len(seconds))))
        assert slowest(allot(shares, seconds)) == best


def test_equal_workers_have_equal_shares_and_noise_moves_none() -> None:
    equal = allot(6, [1.0, 1.0])
    assert equal == [range(3), range(3, 6)]
    assert allot_anew(equal, [1.0, 1.05]) == equal
    assert allot_anew(equal, [1.0, 2.0]) == [range(4), range(4, 6)]


def test_every_share_draws_from_a_seed_of_its_own() -> None:
    numbers = [(a, b, c, d) for a in (0, 1) for b in range(5) for c in range(5) for d in range(5)]
    assert len({share_seed(*number) for number in numbers}) == len(numbers)
