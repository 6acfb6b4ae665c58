"""All six stages at toy size through real DVC, Ray, MLflow, mmdet and mmseg, then what must
not be lost: a killed worker, a killed pipeline, and a second start beside a running one.

The tests of this file build on each other's workspace and run in their order.
"""

import base64
import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from PIL import Image

from elsa.predict import load_predictor
from ops import library
from pipelines.results import scores

from . import models
from .conftest import (
    Workspace,
    checkpoints,
    kill_all,
    needs_chromium,
    rendered,
    train_workers,
    wait_for_checkpoint,
)

STAGES = ("prepare", "build_op", "pretrain", "detect", "segment", "export", "report")


def metrics(workspace: Workspace, stage: str) -> dict:
    return json.loads((workspace.root / f"metrics/{stage}.json").read_text())


def lineage(workspace: Workspace, stage: str) -> dict:
    return json.loads((workspace.root / f"lineage/{stage}.json").read_text())


def mlflow_run(workspace: Workspace, stage: str) -> tuple[MlflowClient, Run]:
    client = MlflowClient(f"sqlite:///{workspace.root / 'mlflow.db'}")
    return client, client.get_run(lineage(workspace, stage)["mlflow_run_id"])


def weights(workspace: Workspace, stage: str = "pretrain") -> dict:
    return json.loads((workspace.root / f"weights/{stage}/model.json").read_text())


@pytest.mark.timeout(1800)
def test_dvc_repro_runs_every_stage(workspace: Workspace) -> None:
    with workspace.start("dvc", "repro") as process, workspace.watch_sockets(process):
        output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output[-5000:]
    lock = (workspace.root / "dvc.lock").read_text()
    for stage in STAGES:
        assert f"  {stage}:" in lock
        assert lineage(workspace, stage)["identity"]
        assert all(isinstance(value, int | float) for value in metrics(workspace, stage).values())


def test_the_scores_are_those_of_the_predictions(workspace: Workspace) -> None:
    """What a stage reports is what its predictions on the validation images give."""
    with (workspace.root / "results/pretrain/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    right = sum(row["class"] == row["predicted_1"] for row in rows)
    images = list((workspace.root / "data/imagenet/val").rglob("*.JPEG"))
    assert len(rows) == len(images)
    assert metrics(workspace, "pretrain")["top1"] == pytest.approx(100 * right / len(rows))
    annotations = workspace.root / "data/coco/annotations/instances_val2017.json"
    found = scores.detection(annotations, workspace.root / "results/detect").metrics
    for key in ("bbox_mAP", "segm_mAP", "bbox_mAP_50"):
        assert metrics(workspace, "detect")[key] == pytest.approx(found[key], abs=0.06)
    truth = workspace.root / "data/ade20k"
    classes = json.loads((truth / "manifest.json").read_text())["classes"]
    masks = workspace.root / "results/segment"
    found = scores.segmentation(truth / "annotations/validation", masks, classes).metrics
    for key in ("mIoU", "aAcc"):
        assert metrics(workspace, "segment")[key] == pytest.approx(found[key], abs=0.01)


def test_the_same_source_gives_the_same_library(workspace: Workspace, compiled_library) -> None:
    for name in (library.LIBRARY_NAME, library.RECORD_NAME):
        built = (workspace.root / "build/op" / name).read_bytes()
        assert built == (compiled_library / name).read_bytes()


def test_nothing_listened_beyond_loopback(workspace: Workspace) -> None:
    processes = {name for _, name in workspace.listening}
    assert {"gcs_server", "raylet", "ray::RayTrainWorker"} <= processes, processes
    addresses = {ip.removeprefix("::ffff:") for ip, _ in workspace.listening}
    assert addresses <= {"127.0.0.1", "::1"}, workspace.listening


def test_second_repro_does_nothing(workspace: Workspace) -> None:
    code, output = workspace.run("dvc", "repro")
    assert code == 0
    assert "Data and pipelines are up to date" in output


def test_report_is_self_contained_and_shows_results_and_lineage(workspace: Workspace) -> None:
    page = (workspace.root / "reports/index.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert page.count("data:image/png;base64,") == 12  # nine pictures, three contact sheets
    assert page.count("<img alt=") == 12
    for stage in ("pretrain", "detect", "segment"):
        assert lineage(workspace, stage)["mlflow_run_id"] in page
        assert weights(workspace, stage)["sha256"][:12] in page
    text = (workspace.root / "reports/report.md").read_text()
    assert f"| top1 | {metrics(workspace, 'pretrain')['top1']:.1f} |" in text


FRAME = """<body><script>
for (const width of [390, 1280]) {
  const frame = document.createElement("iframe");
  frame.style.width = width + "px";
  frame.onload = () => {
    const page = frame.contentDocument.documentElement;
    const broken = [...page.querySelectorAll("img")].filter(image => !image.naturalWidth).length;
    document.title += `${width}: ${page.scrollWidth - page.clientWidth} over, ${broken} broken; `;
  };
  frame.srcdoc = PAGE;
  document.body.append(frame);
}
</script>"""


@needs_chromium
def test_report_fits_a_phone_and_a_desktop(workspace: Workspace, tmp_path: Path) -> None:
    page = (workspace.root / "reports/index.html").read_text()
    quoted = json.dumps(page).replace("</", "<\\/")
    (tmp_path / "frame.html").write_text(FRAME.replace("PAGE", quoted))
    frame = rendered((tmp_path / "frame.html").as_uri(), tmp_path)
    title = frame.split("<title>")[1].split("</title>")[0]
    looks = {part.strip() for part in title.split(";")}
    assert looks == {"390: 0 over, 0 broken", "1280: 0 over, 0 broken", ""}


def test_downstream_weights_record_what_they_started_from(workspace: Workspace) -> None:
    pretrained = weights(workspace)
    for stage in ("detect", "segment"):
        upstream = weights(workspace, stage)["upstream"]
        assert upstream["sha256"] == pretrained["sha256"]
        assert upstream["mlflow_run_id"] == pretrained["mlflow_run_id"]
        assert upstream["metrics"]["top1"] == pretrained["metrics"]["top1"]
        tags = mlflow_run(workspace, stage)[1].data.tags
        assert tags["upstream_weights"] == pretrained["sha256"]
        assert tags["upstream_run_id"] == pretrained["mlflow_run_id"]


def test_evaluation_of_the_weights_repeats_what_training_reported(workspace: Workspace) -> None:
    code, output = workspace.run(
        *(sys.executable, "-m", "pipelines.cli", "evaluate", "--task", "segment", "--ms-flip"),
        *("--weights", "weights/segment", "--data", "data/ade20k", "--out", "evaluation"),
    )
    assert code == 0, output
    folder = workspace.root / "evaluation"
    found = json.loads((folder / "metrics.json").read_text())
    trained = metrics(workspace, "segment")
    assert found["mIoU_ms_flip"] == pytest.approx(trained["mIoU_ms_flip"], abs=0.01)
    assert found["weights_sha256"] == weights(workspace, "segment")["sha256"]
    validation = workspace.root / "data/ade20k/annotations/validation"
    names = {file.name for file in validation.glob("*.png")}
    assert {file.name for file in (folder / "masks").iterdir()} == names
    run = MlflowClient(f"sqlite:///{workspace.root / 'mlflow.db'}").get_run(found["mlflow_run_id"])
    assert run.data.tags["upstream_run_id"] == lineage(workspace, "segment")["mlflow_run_id"]
    assert run.data.metrics["final/mIoU_ms_flip"] == pytest.approx(found["mIoU_ms_flip"], abs=1e-3)
    assert not list(workspace.root.glob("storage/evaluate-*"))  # nothing to resume, nothing left


def test_the_tools_of_the_field_load_the_weights(workspace, tmp_path, monkeypatch) -> None:
    """And say what the stages said: timm, and the Runner and inferencers of mmdet and mmseg."""
    monkeypatch.chdir(workspace.root)
    top1 = models.score_of_timm(workspace.root)
    assert top1 == pytest.approx(metrics(workspace, "pretrain")["top1"], abs=0.01)
    for stage, name, factor in (("detect", "bbox_mAP", 100), ("segment", "mIoU", 1)):
        found = models.score_of_mm(workspace.root, stage, tmp_path)[name]
        assert factor * found == pytest.approx(metrics(workspace, stage)[name], abs=0.06)
        picture = models.pictures(workspace.root, stage)[0]
        answer = models.inferencer(workspace.root, stage)(str(picture))["predictions"]
        ours = load_predictor(f"weights/{stage}")(models.pixels(picture))
        if stage == "segment":
            assert (answer == ours.labels).mean() > 0.999
        else:
            assert sorted(answer[0]["labels"]) == sorted(ours.labels)


def test_pictures_and_requests_get_the_answer_of_the_weights(workspace, monkeypatch) -> None:
    code, output = workspace.run(
        *(sys.executable, "-m", "pipelines.cli", "predict", "data/coco/val2017"),
        *("--weights", "weights/detect", "--out", "predicted"),
    )
    assert code == 0, output
    found = json.loads((workspace.root / "predicted/predictions.json").read_text())
    reported = json.loads((workspace.root / "results/detect/coco.bbox.json").read_text())
    assert len(found["annotations"]) == len(reported)
    uri = f"sqlite:///{workspace.root / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for stage in ("pretrain", "detect", "segment"):
        picture = models.pictures(workspace.root, stage)[0]
        [logged] = mlflow_run(workspace, stage)[1].outputs.model_outputs
        model = mlflow.pyfunc.load_model(f"models:/{logged.model_id}")
        [answer] = model.predict([picture.read_bytes()])
        predictor = load_predictor(workspace.root / f"weights/{stage}")
        ours = predictor(models.pixels(picture))
        if stage == "segment":
            png = Image.open(io.BytesIO(base64.b64decode(answer["labels"])))
            np.testing.assert_array_equal(np.asarray(png), ours.labels)
        else:
            assert answer["classes"] == [predictor.classes[label] for label in ours.labels]
        if stage == "pretrain":
            with models.served(f"models:/{logged.model_id}", uri) as url:
                status, reply = models.ask(url, picture.read_bytes())
                rejected, told = models.ask(url, str(picture))
            [same] = reply["predictions"]  # by the reference: the model has no compiled operator
            assert (status, same["classes"][0]) == (200, answer["classes"][0])
            assert same["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-4)
            assert (rejected, "no image" in told["message"]) == (400, True)


@pytest.mark.parametrize("stage", STAGES)
def test_mlflow_holds_the_run_of_each_stage(workspace: Workspace, stage: str) -> None:
    client, run = mlflow_run(workspace, stage)
    assert run.info.status == "FINISHED"
    tags = run.data.tags
    assert (tags["stage"], tags["dvc_stage"]) == (stage, stage)
    assert tags["identity"] == lineage(workspace, stage)["identity"]
    assert tags["git_dirty"] == "false"
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=workspace.root, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert tags["mlflow.source.git.commit"] == commit
    parent = client.get_run(tags["mlflow.parentRunId"])
    assert parent.data.tags["stage"] == "pipeline"
    assert "params.json" in [item.path for item in client.list_artifacts(run.info.run_id)]


@pytest.mark.parametrize("stage", ["pretrain", "detect", "segment"])
def test_mlflow_holds_curves_params_data_and_model_of_training(workspace, stage) -> None:
    client, run = mlflow_run(workspace, stage)
    assert float(run.data.params[f"{stage}.lr"]) > 0
    assert run.data.params["model.name"] == "elsa_swin_micro"
    for one in (item.dataset for item in run.inputs.dataset_inputs):
        place = json.loads(one.source)["uri"]
        assert (one.source_type, place) == ("local", str(workspace.root / "data" / one.name))
    assert run.data.tags["mlflow.user"]
    assert any(key.startswith("system/") for key in run.data.metrics)
    epochs = client.get_metric_history(run.info.run_id, "images_per_second")
    assert [m.step for m in epochs] == list(range(int(run.data.params[f"{stage}.epochs"])))
    (model,) = run.outputs.model_outputs
    scores = {m.key: m.value for m in client.get_logged_model(model.model_id).metrics}
    assert scores == {f"final/{k}": v for k, v in weights(workspace, stage)["metrics"].items()}


def git(workspace: Workspace, *arguments: str) -> None:
    user = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run(["git", *user, *arguments], cwd=workspace.root, check=True)


def test_a_clone_pulls_the_results_from_the_remote_and_has_nothing_to_run(
    workspace: Workspace, tmp_path: Path
) -> None:
    remote = ("dvc", "remote", "add", "--local", "--default", "remote", str(tmp_path / "remote"))
    assert workspace.run(*remote)[0] == 0
    code, output = workspace.run("dvc", "push")
    assert code == 0, output
    git(workspace, "add", "-A")
    git(workspace, "commit", "-qm", "results")
    subprocess.run(["git", "clone", "-q", workspace.root, tmp_path / "clone"], check=True)

    clone = Workspace(tmp_path / "clone")
    assert clone.run(*remote)[0] == 0
    code, output = clone.run("dvc", "pull")
    assert code == 0, output
    for command in (("dvc", "status"), ("dvc", "repro")):
        code, output = clone.run(*command)
        assert code == 0
        assert "Data and pipelines are up to date" in output
    for path in ("weights", "plots", "results", "metrics", "lineage", "reports", "build/op"):
        files = [p.relative_to(workspace.root) for p in (workspace.root / path).rglob("*")]
        assert files
        assert all((clone.root / file).exists() for file in files)
    use = (
        "import torch, ops\n"
        "from pathlib import Path\n"
        "from pipelines.train.models import load_classifier\n"
        "ops.load_library('build/op')\n"
        "size = load_classifier(Path('weights/pretrain'))(torch.zeros(1, 3, 32, 32)).shape\n"
        "assert size == (1, 10), size"
    )
    code, output = clone.run(sys.executable, "-c", use)
    assert code == 0, output


def test_nothing_is_lost_when_a_worker_then_the_pipeline_is_killed(
    workspace: Workspace,
) -> None:
    undisturbed = weights(workspace)
    command = ("dvc", "repro", "--force", "--single-item", "pretrain")
    with workspace.start(*command) as process:
        wait_for_checkpoint(workspace, process)
        first = train_workers(process)
        first[0].kill()
        wait_for_checkpoint(workspace, process)  # the run resumed by itself
        second = train_workers(process)
        assert not {worker.pid for worker in first} & {worker.pid for worker in second}
        for worker in second:
            worker.suspend()  # so that the run is unfinished, however fast the machine
        try:
            code, output = workspace.run(sys.executable, "-m", "pipelines.pretrain")
            assert code == 1, output
            assert "is already running: process" in output
        finally:
            kill_all(process)
    assert not (workspace.root / "weights/pretrain").exists()  # nothing half-written
    [state_folder] = workspace.root.glob(".runs/pretrain-*")
    state = json.loads((state_folder / "state.json").read_text())
    assert state["mlflow_run_id"] != undisturbed["mlflow_run_id"]  # --force began a new run

    # The storage loses a part of the newest whole checkpoint; a newer one may be half-written.
    run = state_folder.name if state["attempt"] == 1 else f"{state_folder.name}-{state['attempt']}"
    newest = max(found for found in checkpoints(workspace) if found.parent.name == run)
    with (newest / "state.pt").open("r+b") as file:
        file.truncate(1000)

    code, output = workspace.run(*command)
    assert code == 0, output[-5000:]
    assert f"{newest.name} can't be used: state.pt is not what was written" in output
    assert weights(workspace)["identity"] == undisturbed["identity"]
    assert weights(workspace)["sha256"] == undisturbed["sha256"]
    assert lineage(workspace, "pretrain")["mlflow_run_id"] == state["mlflow_run_id"]
    client, run = mlflow_run(workspace, "pretrain")
    for key in ("train_loss", "holdout_top1"):
        steps = [m.step for m in client.get_metric_history(run.info.run_id, key)]
        assert steps == list(range(int(run.data.params["pretrain.epochs"])))  # each epoch once
