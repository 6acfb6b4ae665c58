"""The sampler of training that counts steps instead of passes over the data."""

import itertools
from collections.abc import Iterator
from typing import Any

from mmengine.dataset import InfiniteSampler
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import Sampler


@DATA_SAMPLERS.register_module()
class IntervalSampler(Sampler[int]):
    """mmengine's `InfiniteSampler`, cut into epochs of a fixed number of samples.

    So training that counts steps runs in mmengine's epoch loop, with a checkpoint per epoch. An
    epoch's samples depend on the seed and the epoch alone, so a resumed run goes on exactly.

    Args:
        samples: samples of an epoch on each rank.
        shuffle, seed: as `InfiniteSampler` has them.
    """

    def __init__(
        self, dataset: Any, samples: int, shuffle: bool = True, seed: int | None = None
    ) -> None:
        self.dataset, self.samples = dataset, samples
        self.shuffle, self.seed = shuffle, seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        stream = iter(InfiniteSampler(self.dataset, self.shuffle, self.seed))
        start = self.epoch * self.samples
        return itertools.islice(stream, start, start + self.samples)

    def __len__(self) -> int:
        return self.samples

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
