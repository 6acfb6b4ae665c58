"""A real sweep at toy size: Ray Tune, Ray Train, MLflow; killed, started again, extended.

The tests of this file build on each other's workspace and run in their order.
"""

import csv
import json
import os
import re
import signal
import sys
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from mlflow.tracking import MlflowClient

from pipelines.data.weights import WeightsDescription, write_weights
from pipelines.params import compose, flatten, override, read_yaml
from pipelines.train.loading import split_holdout
from pipelines.train.models import build_model

from .conftest import Workspace, free_port, needs_chromium, rendered

SPACE = """about: a test
fixed:
  scaling.num_workers: 1
  scaling.max_failures: 0
  pretrain.epochs: 2
  pretrain.img_size: 28
points:
  - {model.operator: elsa, pretrain.lr: 1.0e-3}
  - {model.operator: window, pretrain.lr: 1.0e-3}
  - {model.operator: elsa, pretrain.lr: 1.0e+30}
"""
ADDED = "  - {model.operator: depthwise, pretrain.lr: 1.0e-3}\n"
COMMAND = (sys.executable, "-u", "-m", "pipelines.sweep")


@pytest.fixture(scope="module")
def sweep(prepared: Workspace) -> Workspace:
    edit(prepared.root, "space: none", "space: test")
    edit(prepared.root, "seeds: 3", "seeds: 1")
    (prepared.root / "pipelines/recipes/sweeps/test.yaml").write_text(SPACE)
    return prepared


def edit(root: Path, old: str, new: str) -> None:
    """An edit of params.yaml by hand."""
    text = (root / "params.yaml").read_text()
    assert text.count(old) == 1, text
    (root / "params.yaml").write_text(text.replace(old, new))


def outcomes(workspace: Workspace) -> dict[str, dict]:
    with (workspace.root / "sweeps/trials.csv").open() as file:
        return {row["point"]: row for row in csv.DictReader(file)}


def summary(workspace: Workspace) -> dict:
    """Its numbers and its lineage."""
    files = (workspace.root / f"{folder}/sweep.json" for folder in ("metrics", "lineage"))
    return {key: value for file in files for key, value in json.loads(file.read_text()).items()}


def client(workspace: Workspace) -> MlflowClient:
    return MlflowClient(f"sqlite:///{workspace.root / 'mlflow.db'}")


def checkpoints(workspace: Workspace) -> dict[str, int]:
    found = workspace.root.glob("storage/pretrain-*/checkpoint_*/state.pt")
    return {str(path): path.stat().st_mtime_ns for path in found}


def test_a_killed_sweep_keeps_what_finished_and_a_bad_trial_does_not_end_it(sweep) -> None:
    with sweep.start(*COMMAND) as process:
        shown = ""
        for line in process.stdout:
            shown += line
            if "/3 operator=" in line and ": finished" in line:
                break
        assert process.poll() is None or ": finished" in shown, shown
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    _, left = psutil.wait_procs(children, timeout=10)
    # Only Ray's agents outlive their driver for a while: nothing trains on behind our back.
    assert not [p for p in left if "RayTrainWorker" in p.name() or "ImplicitFunc" in p.name()]
    for agent in left:
        with suppress(psutil.NoSuchProcess):
            agent.kill()
    kept = re.search(r"sweep: 1/3 (operator=\S+ lr=0.001) seed", shown)
    assert kept, shown
    assert not (sweep.root / "sweeps").exists()
    before, deadline = checkpoints(sweep), time.time_ns()

    code, output = sweep.run(*COMMAND)
    assert code == 0, output[-5000:]
    assert "taken over from this sweep, before it was interrupted" in output
    found, metrics = outcomes(sweep), summary(sweep)
    assert found[kept[1]]["reused"] == "True"
    mine = {p: t for p, t in checkpoints(sweep).items() if found[kept[1]]["identity"] in p}
    assert mine
    assert all(t < deadline and before[p] == t for p, t in mine.items())  # not trained again
    bad = found["operator=elsa lr=1e+30"]
    assert (bad["state"], bad["top1"]) == ("failed", "")
    assert "the loss is nan" in bad["reason"]
    assert (metrics["trials_finished"], metrics["trials_failed"]) == (2, 1)
    run = client(sweep).get_run(bad["mlflow_run_id"])
    assert run.info.status == "FAILED"
    assert "the loss is nan" in run.data.tags["error"]


def test_trials_are_children_of_the_sweep_with_params_and_curves(sweep) -> None:
    mlflow, sweep_run = client(sweep), summary(sweep)["mlflow_run_id"]
    assert mlflow.get_run(sweep_run).info.status == "FINISHED"
    for name in ("elsa", "window"):
        row = outcomes(sweep)[f"operator={name} lr=0.001"]
        run = mlflow.get_run(row["mlflow_run_id"])
        assert run.data.tags["mlflow.parentRunId"] == sweep_run
        assert run.data.params["model.operator"] == name
        assert run.data.metrics["final/top1"] == float(row["top1"])
        steps = [m.step for m in mlflow.get_metric_history(run.info.run_id, "train_loss")]
        assert steps == [0, 1]  # each epoch once, though the sweep was killed


def test_the_best_trial_is_the_champion_and_its_parameters_can_be_taken_over(sweep) -> None:
    metrics, mlflow = summary(sweep), client(sweep)
    version = mlflow.get_model_version_by_alias("elsa-smoke-test", "champion")
    best = outcomes(sweep)[metrics["best"]]
    assert version.run_id == best["mlflow_run_id"]
    weights = json.loads((sweep.root / "sweeps/champion/model.json").read_text())
    assert version.tags["sha256"] == weights["sha256"]
    assert version.tags["sweep_run_id"] == metrics["mlflow_run_id"]
    assert "Limits" in version.description
    values = flatten(read_yaml(sweep.root / "sweeps/best.yaml"))
    params = override(compose(["recipe=smoke"]), values, "best.yaml")
    assert f"operator={params.model.operator} lr={params.pretrain.lr:.3g}" == metrics["best"]
    assert params.pretrain.epochs == 2


def test_an_added_point_runs_alone_and_the_comparison_has_all(sweep) -> None:
    first = outcomes(sweep)
    (sweep.root / "pipelines/recipes/sweeps/test.yaml").write_text(
        SPACE.replace("1.0e+30", "2.0e-3") + ADDED
    )
    edit(sweep.root, "max_trials: 0", "max_trials: 1")
    before = checkpoints(sweep)
    code, output = sweep.run(*COMMAND)
    assert code == 0, output[-5000:]
    assert output.count(": taken over from run") == 2
    assert "sweep.max_trials=1 have run" in output
    found = outcomes(sweep)
    for point in ("operator=elsa lr=0.001", "operator=window lr=0.001"):
        assert found[point]["mlflow_run_id"] == first[point]["mlflow_run_id"]
    assert {p: t for p, t in checkpoints(sweep).items() if p in before} == before
    assert summary(sweep)["trials_not_run"] == 1
    assert found["operator=depthwise lr=0.001"]["state"] == "not run"

    code, output = sweep.run(sys.executable, "-m", "pipelines.cli", "compare", "--sweep", "test")
    assert code == 0, output
    ours = json.loads((sweep.root / "sweeps/comparison.json").read_text())
    theirs = json.loads((sweep.root / "comparison/comparison.json").read_text())
    assert [(r["point"], r["mean"]) for r in theirs["rows"]] == [
        (r["point"], r["mean"]) for r in ours["rows"]
    ]
    assert len(theirs["rows"]) == 3
    page = (sweep.root / "sweeps/sweep.html").read_text()
    assert "http://" not in page
    assert page.count("<img alt=") == page.count("data:image/png;base64,") == 6
    for row in ours["rows"]:
        assert f"{row['mean']:.1f}" in page


def answers(url: str) -> bool:
    with suppress(OSError):
        return urllib.request.urlopen(url, timeout=5).status == 200
    return False


@needs_chromium
def test_mlflow_opens_on_charts_of_the_points(sweep: Workspace, tmp_path: Path) -> None:
    """At the address that `make ui` prints."""
    code, output = sweep.run(sys.executable, "-m", "pipelines.cli", "compare", "--url")
    assert code == 0, output
    view = output.split("5000/")[-1].strip()
    host, port = "127.0.0.1", str(free_port())
    store = f"sqlite:///{sweep.root / 'mlflow.db'}"
    command = ("mlflow", "ui", "--backend-store-uri", store, "--host", host, "--port", port)
    sweep.env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    with sweep.start(*command, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 120
            while not answers(f"http://{host}:{port}/health"):
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.5)
            page = rendered(f"http://{host}:{port}/{view}", tmp_path)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
    assert "Error loading shared view" not in page
    assert "final/top1" in page
    for point, row in outcomes(sweep).items():
        assert (point in page) == (row["state"] == "finished")


ASHA = """about: a test
fixed:
  scaling.num_workers: 1
  scaling.max_failures: 0
  pretrain.epochs: 8
  pretrain.img_size: 28
search:
  method: random
  trials: 4
  seed: 7
  parameters:
    pretrain.weights: {values: [weights/least, weights/most]}
    pretrain.lr: {low: 1.0e-9, high: 1.0e-8}
  asha: {grace_epochs: 1, reduction_factor: 2}
"""
"""Its points are `most`, `most`, `least` and `least`."""


def write_constant(folder: Path, label: int) -> None:
    """Weights of a classifier that takes everything for one class."""
    params = compose(["recipe=smoke"])
    model = build_model(params.model, params.pretrain.num_classes)
    with torch.no_grad():
        model.get_classifier().bias[label] = 20.0
    about = params.model.model_dump(mode="json"), "0" * 12, "0" * 32, {"top1": 10.0}
    write_weights(folder, model.state_dict(), WeightsDescription(*about))


def test_asha_stops_what_falls_behind_and_the_sweep_goes_on(sweep: Workspace) -> None:
    images = sorted((sweep.root / "data/imagenet/train").rglob("*.JPEG"))
    names = sorted({image.parent.name for image in images})
    pretrain = compose(["recipe=smoke"]).pretrain
    _, held = split_holdout(len(images), pretrain.holdout, pretrain.seed)
    shares = Counter(names.index(images[index].parent.name) for index in held)
    labels = sorted(range(len(names)), key=lambda label: shares[label])
    assert shares[labels[0]] < shares[labels[-1]]
    write_constant(sweep.root / "weights/least", labels[0])
    write_constant(sweep.root / "weights/most", labels[-1])
    (sweep.root / "pipelines/recipes/sweeps/test.yaml").write_text(ASHA)
    edit(sweep.root, "max_trials: 1", "max_trials: 0")
    code, output = sweep.run(*COMMAND, timeout=400)
    assert code == 0, output[-5000:]
    found = outcomes(sweep).values()
    states = [row["state"] for row in found]
    assert set(states) == {"finished", "stopped"}, states
    assert len(states) == 4
    for row in found:
        run = client(sweep).get_run(row["mlflow_run_id"])
        assert run.info.status == "FINISHED"
        epochs = len(client(sweep).get_metric_history(run.info.run_id, "holdout_top1"))
        if row["state"] == "stopped":
            assert row["reason"] == "stopped by ASHA after epoch 1"
        # One that is stopped is in its next epoch already, and may end that before it hears of it.
        assert (epochs < 8) == (row["state"] == "stopped")
    assert not sweep.left_running()


SEGMENT = """about: a test
stage: segment
fixed:
  scaling.num_workers: 1
  segment.epochs: 1
  segment.epoch_iters: 2
  segment.warmup_iters: 0
grid:
  segment.pretrained: [true, false]
"""


@pytest.mark.skipif(
    not os.environ.get("ELSA_TEST_CLUSTER"), reason="two minutes: run it by `make test-cluster`"
)
def test_a_sweep_can_be_of_segmentation(sweep: Workspace) -> None:
    """From given weights and from scratch, through the code of the stage."""
    params = compose(["recipe=smoke"])
    write_weights(
        sweep.root / "weights/pretrain",
        build_model(params.model, params.pretrain.num_classes).state_dict(),
        WeightsDescription(
            params.model.model_dump(mode="json"), "0" * 12, "0" * 32, {"top1": 10.0}
        ),
    )
    (sweep.root / "pipelines/recipes/sweeps/test.yaml").write_text(SEGMENT)
    code, output = sweep.run(*COMMAND)
    assert code == 0, output[-5000:]
    found = outcomes(sweep)
    assert {point: row["state"] for point, row in found.items()} == {
        "pretrained=True": "finished",
        "pretrained=False": "finished",
    }
    losses = {}
    for point, row in found.items():
        run = client(sweep).get_run(row["mlflow_run_id"])
        assert run.data.tags["stage"] == "segment"
        assert run.data.metrics["final/mIoU"] == float(row["mIoU"])
        losses[point] = run.data.metrics["final/loss"]
    assert losses["pretrained=True"] != losses["pretrained=False"]
    champion = json.loads((sweep.root / "sweeps/champion/model.json").read_text())
    assert champion["model"]["method"] == "upernet"
    assert summary(sweep)["best_mIoU"] == champion["metrics"]["mIoU"]
