"""Tiny data sets."""

import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipelines.data.demo.draw import prepare


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Folder with `imagenet`, `coco` and `ade20k` in their public layouts, scenes of 96 px."""
    root = tmp_path_factory.mktemp("data")
    sizes = {"image_size": 28, "train_variants": 1, "scene_size": 96}
    counts = {"digits_per_class": 10, "train_scenes": 8, "val_scenes": 4, "max_digits": 3}
    prepare(SimpleNamespace(seed=0, **sizes, **counts), root)
    return root


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of colours: 60 images to train on, 10 to validate."""
    root, random = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 1)):
        for label, colour in enumerate(random.integers(0, 200, (10, 3))):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for image in range(count):
                pixels = colour + random.integers(0, 55, (40, 40, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{image}.png")
    return root


@pytest.fixture(autouse=True)
def start_method():
    """mmengine sets how this process starts others; the tests after it have torch's own way."""
    before = multiprocessing.get_start_method(allow_none=True)
    yield
    multiprocessing.set_start_method(before, force=True)
