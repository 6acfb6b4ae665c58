"""The demo's data sets, tiny."""

import multiprocessing
from types import SimpleNamespace

import pytest

from pipelines.data.demo import prepare


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Folder with `imagenet`, `coco` and `ade20k` in their public layouts, scenes of 96 px."""
    root = tmp_path_factory.mktemp("data")
    sizes = {"image_size": 28, "train_variants": 1, "scene_size": 96}
    counts = {"digits_per_class": 10, "train_scenes": 8, "val_scenes": 4, "max_digits": 3}
    prepare(SimpleNamespace(seed=0, **sizes, **counts), root)
    return root


@pytest.fixture(autouse=True)
def start_method():
    """mmengine sets how this process starts others; the tests after it have torch's own way."""
    before = multiprocessing.get_start_method(allow_none=True)
    yield
    multiprocessing.set_start_method(before, force=True)
