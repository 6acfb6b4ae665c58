"""How fast images are read, decoded and augmented, and the cores that a GPU needs for it.

    python -m pipelines.benchmarks.loader                 # what params.yaml names
    python -m pipelines.benchmarks.loader FOLDER s3://bucket/imagenet --need 2500

The augmentation is that of section `pretrain`. Nothing else runs in the process that takes the
batches, so with `--workers 0` the number is that of one core.
"""

import argparse
import math
import os
import sys
import time
from typing import Any

import torch
from timm.data import create_loader
from timm.utils import random_seed

from pipelines.data import images, store
from pipelines.data.dataset import locate
from pipelines.errors import PipelineError
from pipelines.params import Pretrain, compose, load_params
from pipelines.train.loading import Part

WARM_UP = 0.2
"""Share of the images that are loaded before the time is taken."""


def measure(place: str, section: Pretrain, workers: int, count: int) -> dict[str, Any]:
    """Load `count` random training images as training does.

    Args:
        place: a folder, or shards in a folder or at a URL.
        workers: loader processes; 0 loads in this one.

    Returns:
        `images` loaded, and `images_per_second` of all workers together, after a warm-up.
    """
    torch.set_num_threads(1)
    random_seed(section.seed, 0)
    data = images.Images(place, "train")
    batch = min(32, count)
    order = torch.randperm(len(data)).repeat(math.ceil(count / len(data)))[:count].tolist()
    loader = create_loader(
        Part(data, order),
        (3, section.img_size, section.img_size),
        batch_size=batch,
        is_training=True,
        scale=(section.scale_min, 1.0),
        hflip=section.hflip,
        color_jitter=section.color_jitter,
        auto_augment=section.aa or None,
        interpolation=section.train_interpolation,
        num_workers=workers,
        use_prefetcher=False,
        persistent_workers=False,
    )
    # timm drops the last, smaller batch of training; here every image counts.
    loader = torch.utils.data.DataLoader(
        loader.dataset, batch_size=batch, num_workers=workers, shuffle=True
    )
    done, started, start_at = 0, time.perf_counter(), 0
    for input, _ in loader:
        done += len(input)
        if not start_at and done >= WARM_UP * count:
            started, start_at = time.perf_counter(), done
    timed = done - start_at or done
    return {"images": done, "images_per_second": timed / (time.perf_counter() - started)}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.benchmarks.loader",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("places", nargs="*", help="folders or shards; without, that of the params")
    parser.add_argument("--recipe", help="the augmentation of this recipe; without, of params.yaml")
    parser.add_argument("--need", type=float, default=2500, help="images/s of a GPU (default 2500)")
    parser.add_argument("--images", type=int, default=2000, help="how many to load (default 2000)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default 0)")
    arguments = parser.parse_args()
    try:
        recipe = arguments.recipe
        params = compose([f"recipe={recipe}"]) if recipe else load_params()
        section = params.pretrain
        print(
            f"{section.img_size} px, aa={section.aa or 'none'}, {section.train_interpolation};"
            f" {os.cpu_count()} cores here; a GPU needs {arguments.need:g} images/s"
        )
        for place in arguments.places or [locate(params, "imagenet")]:
            result = measure(place, section, arguments.workers, arguments.images)
            rate = result["images_per_second"]
            per_core = rate / max(1, arguments.workers)
            print(
                f"{store.public_url(place)}: {rate:.0f} images/s with {arguments.workers} workers,"
                f" {per_core:.0f} per core; a GPU needs {math.ceil(arguments.need / per_core)}"
                " cores for its workers (loader.data_workers)"
            )
    except PipelineError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
