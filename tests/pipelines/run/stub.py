"""Stands in for what stages compute, in a copy of the checkout: tested is only which compute.

What decides that is real: DVC, dvc.yaml, the identities, the outputs in DVC's cache, checkpoints.
`computed.log` gets a line for each stage that computes.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from pipelines.data.dataset import find_dataset
from pipelines.paths import ROOT
from pipelines.train.job import Job


def check(stage: Any, params: Any) -> Job | None:
    """The job of a training stage, without a look at what it needs."""
    from pipelines.tasks import TASKS

    task = next((one for one in TASKS.values() if one.stage == stage.name), None)
    if task is None:
        return None
    dataset = find_dataset(params, task.dataset, task.section(params).num_classes)
    return Job(stage.name, params, dataset)


def compute(stage: Any, run: Any, job: Job | None) -> None:
    """Write outputs that depend on the run's identity alone, and note that it was computed."""
    with (ROOT / "computed.log").open("a") as log:
        log.write(f"{stage.name}\n")
    if "ELSA_TEST_INTERRUPT" in os.environ:
        raise KeyboardInterrupt
    if stage.name == "prepare":
        from pipelines.data.demo.draw import prepare

        prepare(run.section, run.output("data"))
        run.write_metrics({"images": 1})
    elif stage.name == "build_op":
        _copy_library(run.output("build/op"))
        run.write_metrics({"nodes": 1})
    else:
        assert job is not None
        _train(run, job)


def _copy_library(target: Path) -> None:
    from ops import library

    shutil.copytree(os.environ["ELSA_TEST_LIBRARY"], target)
    record = json.loads((target / "build.json").read_text()) | library.environment(cuda=False)
    (target / "build.json").write_text(json.dumps(record))


def _train(run: Any, job: Job) -> None:
    from pipelines.run.checkpoints import seal
    from pipelines.tasks import task_of_stage
    from pipelines.tasks.training import write_outputs

    task = task_of_stage(run.name)
    folder = ROOT / "storage" / run.run_name / "checkpoint_2026-01-01"
    folder.mkdir(parents=True)
    number = int(hashlib.sha256(run.identity.encode()).hexdigest()[:6], 16)
    save_file({"weight": np.array([number], np.float32)}, folder / task.weights)
    history = [{"epoch": 1, "loss": 1.0, "images_per_second": 10.0}]
    if run.name == "pretrain":
        count = len(job.dataset.classes)
        predictions = {
            "name": np.array([f"{i}.png" for i in range(count)]),
            "target": np.arange(count),
            "classes": np.tile(np.arange(5), (count, 1)),
            "probabilities": np.full((count, 5), 0.2),
            "loss": np.ones(count),
        }
        np.savez(folder / "predictions.npz", **predictions)
        result = {"top1": 50.0, "top5": 90.0, "loss": 1.0, "history": history}
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "config.json").write_text("{}")
    else:
        (folder / "history.json").write_text(json.dumps(history))
        (folder / "inference.py").write_text("model = dict()\n")
        (folder / "config.py").write_text("model = dict()\n")
        (folder / "predictions").mkdir()
        (folder / "predictions/found.json").write_text("[]")
    seal(folder)
    write_outputs(task, run, folder, job)
