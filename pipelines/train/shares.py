"""The shares of a step: whose they are, what they draw, and sums over them.

A step's batch is `shares` passes of equal size. Which images a share has and what it draws depend
on its number, not on who computes it, and what the shares give is added in one order. So a training
has the same bits on any number of workers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.train.loading import seed_all

SLOWER = 1.1
"""Shares move only if the slowest worker then needs this many times less: times are noisy."""


def share_seed(seed: int, epoch: int, step: int, share: int) -> int:
    """The seed of what a share draws in its forward pass, such as dropout."""
    # What images are augmented with comes from (seed, epoch, ...) too: 0xe15a tells them apart.
    return int(np.random.SeedSequence([seed, epoch, step, share, 0xE15A]).generate_state(1)[0])


def seed_share(seed: int, epoch: int, step: int, share: int) -> None:
    """Seed all generators of this process for the forward pass of a share."""
    number = share_seed(seed, epoch, step, share)
    seed_all(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)


def allot(shares: int, seconds: Sequence[float]) -> list[range]:
    """Consecutive shares of each worker, so that the slowest is done as early as can be.

    Args:
        shares: of a step; one or more for each worker.
        seconds: that each worker needs for a share, in any unit.
    """
    counts = [1] * len(seconds)
    for _ in range(shares - len(seconds)):
        done = [(count + 1) * each for count, each in zip(counts, seconds, strict=True)]
        counts[done.index(min(done))] += 1
    ends = np.cumsum(counts).tolist()
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def allot_anew(ranges: Sequence[range], seconds: Sequence[float]) -> list[range]:
    """`allot` by the seconds that a share took each worker; `ranges` themselves if that is not
    clearly faster."""

    def slowest(ranges: Sequence[range]) -> float:
        return max(len(own) * each for own, each in zip(ranges, seconds, strict=True))

    found = allot(ranges[-1].stop, seconds)
    return found if slowest(found) * SLOWER <= slowest(ranges) else list(ranges)


class Node(NamedTuple):
    """The sum over `size` shares from `first` on."""

    first: int
    size: int
    value: Tensor


@dataclass
class Tree:
    """Sums over consecutive shares, added as leaves of one binary tree over their numbers.

    Two neighbours are added once both are whole: of shares 0 to 7 the sum is
    ((0+1)+(2+3))+((4+5)+(6+7)), whoever adds which part of it.
    """

    nodes: list[Node] = field(default_factory=list)
    """From the first share on; neighbours that can't be added yet."""
    spare: list[Tensor] = field(default_factory=list)
    """Values that were added to others, to be used again."""

    def add(self, node: Node) -> None:
        """Add the sum over the shares that follow; its value may be changed from now on."""
        nodes = self.nodes
        while nodes and nodes[-1].size == node.size and nodes[-1].first % (2 * node.size) == 0:
            node = self._sum(nodes.pop(), node)
        nodes.append(node)

    def total(self) -> Tensor:
        """The sum over all shares, when all were added; the tree is empty afterwards."""
        node = self.nodes.pop()
        while self.nodes:  # their number is no power of two
            node = self._sum(self.nodes.pop(), node)
        return node.value

    def _sum(self, left: Node, right: Node) -> Node:
        left.value.add_(right.value)
        self.spare.append(right.value)
        return Node(left.first, left.size + right.size, left.value)


def places(own: Iterable[int]) -> list[tuple[int, int]]:
    """First share and size of the nodes of a `Tree` that has the shares `own`."""
    tree = Tree()
    for share in own:
        tree.add(Node(share, 1, torch.empty(0)))
    return [(node.first, node.size) for node in tree.nodes]
