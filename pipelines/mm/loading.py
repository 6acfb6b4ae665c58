"""Which images a step's shares have, in which order, and with which seeds."""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.registry import DATA_SAMPLERS, DATASETS
from torch.utils.data import BatchSampler, Dataset, Sampler

from pipelines.train.loading import isolated_random, seed_all


@DATA_SAMPLERS.register_module()
class StepSampler(Sampler[int]):
    """The images of whole steps, those of all workers, from the seed and the epoch alone.

    Args:
        batch_size: images of a step. An epoch in which each image occurs is filled up to whole
            steps with its first images, as mmengine fills it up to whole ranks.
        steps: of an epoch, as a part of one endless stream of images; 0: each image occurs.
        seed: of their order.
    """

    def __init__(self, dataset: Any, batch_size: int, steps: int, seed: int) -> None:
        self.dataset, self.seed, self.endless = dataset, seed, steps > 0
        self.samples = batch_size * (steps or -(-len(dataset) // batch_size))
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        if self.endless:
            start = self.epoch * self.samples
            return itertools.islice(self._stream(), start, start + self.samples)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator).tolist()
        return itertools.islice(itertools.cycle(order), self.samples)

    def _stream(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(len(self.dataset), generator=generator).tolist()

    def __len__(self) -> int:
        return self.samples

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


@DATA_SAMPLERS.register_module()
class ShareSampler(Sampler[list[Any]]):
    """The batches of some shares in the steps of an epoch, from step `first` on.

    An image is asked for as (seed, index), for `TrainingDataset`; the seed is that of its place in
    the epoch.

    Args:
        sampler: a `StepSampler`.
        batch_size: images of a share.
        shares: of a step.
        seed: of what is drawn for an image.
        inner: config of the batch sampler that makes the batches; None takes images in order.

    Attributes:
        own: the shares; at first all of them.
    """

    def __init__(
        self,
        sampler: StepSampler,
        batch_size: int,
        shares: int,
        seed: int,
        inner: Mapping[str, Any] | None = None,
    ) -> None:
        self.sampler, self.shares, self.seed = sampler, shares, seed
        self.first, self.own = 0, range(shares)
        self._batches: Any = (
            DATA_SAMPLERS.build(
                dict(inner), default_args={"sampler": sampler, "batch_size": batch_size}
            )
            if inner
            else BatchSampler(sampler, batch_size, drop_last=False)
        )

    def __iter__(self) -> Iterator[list[Any]]:
        batches = enumerate(self._batches)
        for place, batch in itertools.islice(batches, self.first * self.shares, None):
            if place % self.shares not in self.own:
                continue
            entropy = np.random.SeedSequence([self.seed, self.sampler.epoch, place])
            seeds = entropy.generate_state(len(batch))
            yield [(int(seed), index) for seed, index in zip(seeds, batch, strict=True)]

    def __len__(self) -> int:
        """Steps of an epoch, which mmengine counts, though each is several batches."""
        return len(self._batches) // self.shares


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
