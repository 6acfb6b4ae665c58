"""What the processes of a stage load: each package is seconds of its start, or hundreds of MB."""

from pathlib import Path

import pytest

from .conftest import Workspace

RAY, MLFLOW = {"ray", "pyarrow"}, {"mlflow", "pandas", "scipy"}
TRAIN = RAY | {"ray.train", "ray.data", "pandas", "torch"}
DENSE = {"mmengine", "timm", "torchvision"}
DRIVERS = {
    "prepare": RAY | MLFLOW | {"pycocotools"},
    "build_op": RAY | MLFLOW | {"torch"},
    "pretrain": TRAIN | MLFLOW,
    "detect": TRAIN | MLFLOW | DENSE,
    "segment": TRAIN | MLFLOW | DENSE | {"mmcv", "mmseg"},
    "report": RAY | MLFLOW,
}
CLASSIFIES = TRAIN | MLFLOW | {"timm", "torchvision", "ray.tune"}  # Ray asks: is this a trial?
WORKERS = {
    "pipelines.train.classify": CLASSIFIES,
    "pipelines.mm.train": CLASSIFIES
    | {"mmengine", "mmcv", "mmdet", "mmseg", "pycocotools", "matplotlib", "sklearn"},
}


@pytest.fixture(scope="module")
def processes(workspace: Workspace) -> list[tuple[str, set[str]]]:
    """Command and packages of each process of `dvc repro` and of what the tests before this file
    have run."""
    code, output = workspace.run("dvc", "repro", "report")
    assert code == 0, output[-5000:]
    found = []
    for file in Path(workspace.env["ELSA_TEST_LOADED"]).glob("*[0-9]"):
        command, *packages = file.read_text().splitlines() or [""]
        found.append((command, set(packages)))
    return found


@pytest.mark.parametrize("stage", DRIVERS)
def test_a_driver_loads_only_what_it_needs(processes, stage: str) -> None:
    drivers = [loaded for command, loaded in processes if command.endswith(f"pipelines.{stage}")]
    assert any("ray" in loaded for loaded in drivers)
    for loaded in drivers:
        assert loaded - {"dvc"} <= DRIVERS[stage]  # which restores outputs, and reads --force


@pytest.mark.parametrize("loop", WORKERS)
def test_a_worker_loads_only_what_it_needs(processes, loop: str) -> None:
    workers = [
        loaded - WORKERS.keys()
        for command, loaded in processes
        if "default_worker.py" in command and loop in loaded
    ]
    assert len(workers) > 1
    for loaded in workers:
        assert loaded <= WORKERS[loop]
