"""Fixtures of the full-size configs."""

import gc
import importlib
import json

import pytest
import torch

from pipelines.data.store import Dataset
from pipelines.params import compose, flatten, override
from pipelines.tasks import TASKS
from pipelines.train.job import Job

from .full_size import DATASETS, MICRO, ON_CPU, small_config


@pytest.fixture(scope="session", autouse=True)
def libraries():
    """Loaded, and left out when Python looks for garbage: mmengine has it look for each data set
    that it opens, which takes half a second where so much is loaded."""
    for stage in DATASETS:
        for module in TASKS[stage].loop.preload(compose().scaling):
            importlib.import_module(module)
    gc.collect()
    gc.freeze()


@pytest.fixture
def one_thread():
    """For tensors this small, threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_job(tiny_data):
    """A job of the recipe with overrides, as `dvc exp run -S` composes them, on the tiny data."""

    def make(stage, recipe="elsa_swin_tiny", group=None, model=MICRO, scaling=ON_CPU, **values):
        params = compose([f"recipe={recipe}", *([f"{stage}={group}"] if group else [])])
        sections = {"model": model, "scaling": scaling, stage: values}
        params = override(params, flatten(sections | {"loader": {"data_workers": 0}}), "test")
        name = DATASETS[stage]
        classes = json.loads((tiny_data / name / "manifest.json").read_text())["classes"]
        return Job(stage, params, Dataset(name, str(tiny_data / name), tuple(classes), {}, ""))

    return make


@pytest.fixture
def small_heads(monkeypatch):
    monkeypatch.setattr("pipelines.mm.train.build_config", small_config)
