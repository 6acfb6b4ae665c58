"""Which images a worker loads, in which order, and how: timm's loaders, for our processes."""

import multiprocessing
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Any

import numpy as np
import torch
from timm.data import ImageDataset, create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import DataLoader, Sampler, default_collate

from pipelines.data.images import Images
from pipelines.params import Loader, Pretrain
from pipelines.train.job import Job
from pipelines.train.schedule import micro_batch


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch's CPU generator."""
    random.seed(seed)
    np.random.seed(seed)
    # Not `torch.manual_seed`, which would queue a call for CUDA each time.
    torch.default_generator.manual_seed(seed)


@contextmanager
def isolated_random() -> Iterator[None]:
    """Within it random numbers can be seeded and drawn; afterwards this process's are as before.

    So images that a training process loads itself leave no trace in what it draws, and are the same
    as those of loader processes.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Batch(list[Any]):
    """The samples of a batch, and the seed of what is drawn when they are collated."""

    epoch = 0
    seed: int | None = None


class Collate:
    """Collates a `Batch` from its own seed.

    Args:
        collate: what makes tensors of a list of samples.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, batch: list[Any]) -> Any:
        if not isinstance(batch, Batch) or batch.seed is None:
            return self.collate(batch)
        with isolated_random():
            seed_all(batch.seed)
            return self.collate(batch)


def _seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


class Part(ImageDataset):
    """The images of `dataset` at `indices`; a transform set here is the data set's.

    Asked for (epoch, index, copy), it draws the augmentation from `seed` and the three alone.
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

    def __getitem__(self, index: int | tuple[int, int, int]) -> Any:
        if not isinstance(index, tuple):
            return self.dataset[self.indices[index]]
        with isolated_random():
            seed_all(_seed(self.seed, *index))
            return self.dataset[self.indices[index[1]]]

    def __getitems__(self, indices: list[Any]) -> Batch:
        places = (index[1] if isinstance(index, tuple) else index for index in indices)
        self.dataset.prefetch([self.indices[place] for place in places])
        batch = Batch(self[index] for index in indices)
        if isinstance(indices[0], tuple):
            batch.epoch = indices[0][0]
            batch.seed = _seed(self.seed, *indices[0], len(indices))
        return batch


class MicroBatchSampler(Sampler[list[Any]]):
    """The images of some shares in the steps of an epoch, from step `start` on.

    A step's images are `batch_size` places of the epoch's order. With `aug_repeats` each image has
    as many places there, side by side, as with timm's `RepeatAugSampler`. Share s has every
    `shares`-th of them, from the s-th on.

    Args:
        count: images of the data set.

    Attributes:
        own: the shares; at first all of them.

    It yields lists of (epoch, index, copy), from which an image's augmentation follows. So loader
    processes hold no random state: their number, and how long they live, leave no trace.
    """

    def __init__(self, count: int, p: Pretrain) -> None:
        self.count, self.p = count, p
        self.own = range(p.shares)
        self.epoch = self.start = 0

    @property
    def steps(self) -> int:
        """Of an epoch; each has the whole batch."""
        return self.count // self.p.batch_size

    def __iter__(self) -> Iterator[list[Any]]:
        generator = torch.Generator().manual_seed(self.p.seed + self.epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        size, repeats = self.p.batch_size, self.p.aug_repeats
        for step in range(self.start, self.steps):
            places = range(step * size, (step + 1) * size)
            batch = [(self.epoch, order[place // repeats], place % repeats) for place in places]
            for share in self.own:
                yield batch[share :: self.p.shares]

    def __len__(self) -> int:
        return self.steps * len(self.own)


def split_holdout(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on, and indices held out to choose the best epoch; both sorted."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held = round(count * share)
    return sorted(order[held:]), sorted(order[:held])


def begin_loader_processes(*modules: str) -> None:
    """Start the process that loader processes are forked from, by method `forkserver`.

    It imports the modules meanwhile, once for all of them. A fork of this process could hang: Ray
    and autograd have threads in it.
    """
    multiprocessing.set_forkserver_preload(list(modules))
    forkserver.ensure_running()


def make_loader(
    p: Loader,
    part: Part,
    device: torch.device,
    collate_fn: Any = None,
    **kwargs: Any,
) -> Any:
    """timm's `create_loader`, but for any sampler, and for processes that are safe to start.

    Args:
        device: batches for a GPU are prefetched, as bytes that are normalised there.
    """
    prefetch = device.type == "cuda"
    if p.data_workers:
        begin_loader_processes(__name__)
        kwargs |= {
            "multiprocessing_context": "forkserver",
            "prefetch_factor": p.prefetch_factor,
        }
    loader = DataLoader(
        part,
        num_workers=p.data_workers,
        pin_memory=p.pin_memory and prefetch,
        collate_fn=Collate(collate_fn or (fast_collate if prefetch else default_collate)),
        # An iterator takes a seed, and that of lasting processes only once: taken from the global
        # generator, it would make what is drawn depend on how the images are loaded.
        generator=torch.Generator(),
        **kwargs,
    )
    return PrefetchLoader(loader, device=device) if prefetch else loader


def evaluation_loader(
    job: Job,
    images: Images,
    indices: list[int],
    device: torch.device,
    rank: int,
    world_size: int,
) -> Any:
    """The images at `indices` in batches, of which rank r has every `world_size`-th from r on."""
    p = job.params.pretrain
    part = Part(images, indices)
    part.transform = create_transform(
        p.img_size,
        crop_pct=p.crop_pct,
        crop_mode=p.crop_mode,
        interpolation=p.interpolation,
        use_prefetcher=device.type == "cuda",
    )
    size = micro_batch(p)
    batches = [list(range(len(indices)))[i : i + size] for i in range(0, len(indices), size)]
    return make_loader(job.params.loader, part, device, batch_sampler=batches[rank::world_size])
