"""Which images a rank trains on, in which order, and with which seeds."""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_rank
from mmengine.registry import DATA_SAMPLERS, DATASETS
from torch.utils.data import BatchSampler, Dataset, Sampler

from pipelines.train.loading import isolated_random, seed_all


def epoch_seed(seed: int, epoch: int, rank: int) -> int:
    """A seed for everything random in one epoch on one rank."""
    return int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])


@DATA_SAMPLERS.register_module()
class IntervalSampler(Sampler[int]):
    """mmengine's `InfiniteSampler`, cut into epochs of a fixed number of samples.

    So training that counts steps runs in mmengine's epoch loop, with a checkpoint per epoch. An
    epoch's samples depend on the seed and the epoch alone, so a resumed run repeats them exactly.

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


@DATA_SAMPLERS.register_module()
class ResumableBatchSampler(Sampler[list[Any]]):
    """The batches of an epoch from the place `first` on, which the training loop sets.

    Args:
        sampler: of one rank, with an `epoch`.
        inner: config of the batch sampler that makes the batches; None takes images in order.
        seed: with it, an image is asked for as (seed, index), for `TrainingDataset`; the seed is
            that of its place in the epoch.
    """

    def __init__(
        self,
        sampler: Any,
        batch_size: int,
        inner: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> None:
        self.sampler, self.seed, self.first = sampler, seed, 0
        self._batches: Any = (
            DATA_SAMPLERS.build(
                dict(inner), default_args={"sampler": sampler, "batch_size": batch_size}
            )
            if inner
            else BatchSampler(sampler, batch_size, drop_last=False)
        )

    def __iter__(self) -> Iterator[list[Any]]:
        batches = enumerate(self._batches)
        for place, batch in itertools.islice(batches, self.first, None):
            if self.seed is None:
                yield batch
                continue
            root = epoch_seed(self.seed, self.sampler.epoch, get_rank())
            seeds = np.random.SeedSequence([root, place]).generate_state(len(batch))
            yield [(int(seed), index) for seed, index in zip(seeds, batch, strict=True)]

    def __len__(self) -> int:
        return len(self._batches)


@DATASETS.register_module()
class TrainingDataset(Dataset[Any]):
    """A data set without the images that `prepare` left out, whose augmentation can be seeded.

    Asked for (seed, index), what is drawn depends on the seed alone. So loader processes hold no
    random state: how many they are and how far they read ahead leaves no trace, and a run that
    resumes within an epoch draws what an undisturbed one draws.

    Args:
        dataset: config of the data set.
        left_out: files of images or label maps.
    """

    def __init__(self, dataset: Mapping[str, Any], left_out: Sequence[str] = ()) -> None:
        self.dataset = DATASETS.build(dict(dataset))
        self.left_out = {os.path.normpath(file) for file in left_out}

    @property
    def metainfo(self) -> Mapping[str, Any]:
        return self.dataset.metainfo

    def full_init(self) -> None:
        """Read the annotations."""
        self.dataset.full_init()
        if self.left_out:
            every = range(len(self.dataset))
            self.dataset.get_subset_([i for i in every if self._is_there(self.get_data_info(i))])

    def _is_there(self, info: Mapping[str, Any]) -> bool:
        files = [info[key] for key in ("img_path", "seg_map_path") if info.get(key)]
        return not self.left_out.intersection(map(os.path.normpath, files))

    def get_data_info(self, index: int) -> dict[str, Any]:
        """What the annotations tell of an image; `AspectRatioBatchSampler` asks for its size."""
        return self.dataset.get_data_info(index)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> Any:
        if not isinstance(key, tuple):
            return self.dataset[key]
        seed, index = key
        with isolated_random():
            seed_all(seed)
            return self.dataset[index]
