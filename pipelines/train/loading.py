"""Which images a worker loads, in which order, and how: timm's loaders, for our processes."""

import multiprocessing
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from timm.data import ImageDataset, create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader, Sampler

from pipelines.data.images import Images
from pipelines.params import Pretrain


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch's CPU generator."""
    random.seed(seed)
    np.random.seed(seed)
    # Not `torch.manual_seed`, which would queue a call for CUDA each time.
    torch.default_generator.manual_seed(seed)


class Part(ImageDataset):
    """The images of `dataset` at `indices`; a transform set here is the data set's.

    Asked for (epoch, index), it draws the augmentation from `seed` and the two alone.
    """

    def __init__(self, dataset: Images, indices: list[int], seed: int = 0) -> None:
        # A view: what the base class would set up is the data set's own.
        self.dataset, self.indices, self.seed = dataset, indices, seed

    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int | tuple[int, int]) -> Any:
        if isinstance(index, tuple):
            epoch, index = index
            entropy = (self.seed, epoch, index)
            seed_all(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        return self.dataset[self.indices[index]]

    def __getitems__(self, indices: list[Any]) -> list[Any]:
        places = (index[1] if isinstance(index, tuple) else index for index in indices)
        self.dataset.prefetch([self.indices[place] for place in places])
        return [self[index] for index in indices]


class MicroBatchSampler(Sampler[list[Any]]):
    """The micro-batches of one rank in an epoch, from step `start` on.

    A step's images are `batch_size` places of the epoch's order, whatever the number of workers.
    They are split for `planned` workers: of these, worker r takes every `planned`-th, from the r-th
    on, `accumulate` times. Where fewer run, each takes the shares of several.

    Args:
        count: images of the data set.
        planned: workers that the parameters ask for.
        whole: ask for (epoch, index). So loader processes hold no random state: their number, and
            how long they live, leave no trace in the images.
    """

    def __init__(
        self, count: int, p: Pretrain, planned: int, rank: int, world_size: int, whole: bool
    ) -> None:
        self.count, self.p, self.planned, self.whole = count, p, planned, whole
        self.shares = range(rank, planned * p.accumulate, world_size)
        self.epoch = self.start = 0

    @property
    def steps(self) -> int:
        """Of an epoch; each has the whole batch."""
        return self.count // self.p.batch_size

    def __iter__(self) -> Iterator[list[Any]]:
        generator = torch.Generator().manual_seed(self.p.seed + self.epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        size = self.p.batch_size
        for step in range(self.start, self.steps):
            batch = order[step * size : (step + 1) * size]
            for share in self.shares:
                turn, worker = divmod(share, self.planned)
                images = self.planned * self.p.micro_batch(self.planned)
                indices = batch[turn * images : (turn + 1) * images][worker :: self.planned]
                yield [(self.epoch, index) for index in indices] if self.whole else indices

    def __len__(self) -> int:
        return self.steps * len(self.shares)


def split_holdout(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on, and indices held out to choose the best epoch; both sorted."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held = round(count * share)
    return sorted(order[held:]), sorted(order[:held])


def make_loader(
    p: Pretrain,
    part: Part,
    device: torch.device,
    erasing: Mapping[str, Any] | None = None,
    collate_fn: Any = None,
    **kwargs: Any,
) -> Any:
    """timm's `create_loader`, but for any sampler, and for processes that are safe to start.

    Args:
        device: batches for a GPU are prefetched, as bytes that are normalised there.
        erasing: random erasing on the GPU, for training.
    """
    prefetch = device.type == "cuda"
    if p.data_workers:
        # A fork of a process with threads, such as Ray's or autograd's, can hang.
        multiprocessing.set_forkserver_preload([__name__])
        kwargs |= {
            "multiprocessing_context": "forkserver",
            "prefetch_factor": p.prefetch_factor,
            # An iterator takes a seed, and that of lasting workers is made only once: taken
            # from the global generator, it would make epochs differ after a resume.
            "generator": torch.Generator(),
        }
    loader = DataLoader(
        part,
        num_workers=p.data_workers,
        pin_memory=p.pin_memory and prefetch,
        collate_fn=collate_fn or (fast_collate if prefetch else None),
        **kwargs,
    )
    return PrefetchLoader(loader, device=device, **(erasing or {})) if prefetch else loader


def evaluation_loader(
    p: Pretrain,
    images: Images,
    indices: list[int],
    batch_size: int,
    device: torch.device,
) -> Any:
    """The images at `indices`, in order. Each rank has indices of its own: none counts twice."""
    mine = Part(images, indices)
    mine.transform = create_transform(
        p.img_size,
        crop_pct=p.crop_pct,
        interpolation=p.interpolation,
        use_prefetcher=device.type == "cuda",
    )
    return make_loader(p, mine, device, batch_size=batch_size)
