"""What the stages `detect` and `segment` share: checks before, outputs after."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.data import dataset as places
from pipelines.data.weights import check_architecture, read_description
from pipelines.params import Params
from pipelines.paths import ROOT
from pipelines.run.stage import Stage

PRETRAINED = ROOT / "weights" / "pretrain"


def check(name: str, dataset: str, params: Params) -> dict[str, Any]:
    """Check data, pretrained weights and config of a stage; what `run` needs of them.

    Raises:
        PipelineError, DataError: what does not fit.
    """
    from pipelines.mm.train import Job, build_config

    data = places.check(params, dataset, getattr(params, name).num_classes)
    upstream = None
    if getattr(params, name).pretrained:
        upstream = read_description(PRETRAINED)
        check_architecture(upstream, params.model.model_dump(mode="json"))
    job = Job(
        stage=name,
        params=params,
        data=data["place"],
        classes=tuple(data["classes"]),
        weights=str(PRETRAINED / "model.safetensors") if upstream else None,
        left_out=data["skipped"],
    )
    build_config(job, ROOT, params.scaling.num_workers)
    if params.scaling.use_gpu:
        from pipelines.commands.plan import flops, model_of

        job = replace(job, flops=flops(*model_of(params, name)))
    return {"job": job, "data": data, "upstream": upstream}


def run(stage: Stage, checked: dict[str, Any], headline: Sequence[str]) -> None:
    """Train on Ray and write the stage's outputs, from the last epoch's checkpoint.

    Args:
        headline: metrics that go into the description of the weights.
    """
    from pipelines.mm.train import train_loop_per_worker
    from pipelines.run.fit import fit

    job, data, upstream = checked["job"], checked["data"], checked["upstream"]
    if upstream:
        stage.tracker.set_tags(
            {"upstream_weights": upstream["sha256"], "upstream_run_id": upstream["mlflow_run_id"]}
        )
    name = data["dataset"]
    stage.tracker.log_dataset(name, data["digest"], Path(name), "training")
    checkpoint = fit(
        train_loop_per_worker,
        {"job": job},
        stage.params,
        name=stage.run_name,
        mlflow_run_id=stage.tracker.run_id,
        data={name: data["place"]},
        stops=True,
    )
    with checkpoint.as_directory() as folder:
        _write_outputs(stage, Path(folder), upstream, headline)


def _write_outputs(
    stage: Stage, folder: Path, upstream: dict[str, Any] | None, headline: Sequence[str]
) -> None:
    from safetensors.torch import load_file

    from pipelines.data.weights import write_weights
    from pipelines.mm.hooks import CONFIG, HISTORY, PREDICTIONS, WEIGHTS

    history = json.loads((folder / HISTORY).read_text())
    speeds = [row["images_per_second"] for row in history]
    last = {key: value for key, value in history[-1].items() if key not in ("epoch", "val_seconds")}
    # Epochs are of equal length, so the mean speed is the harmonic mean.
    metrics = last | {"images_per_second": len(speeds) / sum(1 / speed for speed in speeds)}
    if "energy_wh" in last:
        metrics["energy_wh"] = sum(row["energy_wh"] for row in history)
    model = stage.params.model.model_dump(mode="json")
    model |= {"method": stage.section.method, "schedule": stage.section.schedule}
    weights = stage.output(f"weights/{stage.name}")
    write_weights(
        weights,
        load_file(str(folder / WEIGHTS)),
        model=model,
        identity=stage.identity,
        mlflow_run_id=stage.tracker.run_id,
        metrics={key: metrics[key] for key in headline if key in metrics},
        upstream=upstream,
    )
    shutil.copytree(folder / PREDICTIONS, stage.output(f"results/{stage.name}"))
    stage.write_curves(history)
    stage.tracker.log_model(stage.name, weights, model)
    stage.tracker.log_artifact(folder / CONFIG, "config")
    stage.tracker.log_artifact(stage.output(f"plots/{stage.name}"))
    stage.write_metrics({key: round(value, 4) for key, value in metrics.items()})
