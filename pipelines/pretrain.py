"""Pretrain the backbone as an image classifier, and export its best weights."""

import json
from pathlib import Path
from typing import Any

from pipelines.build_op import check_library
from pipelines.data import dataset as places
from pipelines.params import Params
from pipelines.run.stage import Stage, run_stage

LARGEST_CONFUSION = 100
"""With more classes than this there is no plot of the confusion matrix."""


def check(params: Params) -> dict[str, Any]:
    check_library()
    if params.pretrain.weights:
        from pipelines.train.models import build_model, load_weights

        # Here, so that a fault is told before Ray starts; each worker loads them for itself.
        load_weights(build_model(params.model, params.pretrain.num_classes), params.pretrain)
    return places.check(params, "imagenet", params.pretrain.num_classes)


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    from ray.train.torch import get_device

    from pipelines.run.reporter import RayReporter
    from pipelines.train.classify import Classifier

    reporter = RayReporter(config["reporting"])
    planned = config["params"].scaling.num_workers
    if reporter.world_size < planned:
        reporter.tell(
            f"on {reporter.world_size} of scaling.num_workers={planned} workers; with more as soon"
            " as there are nodes for them"
        )
    try:
        Classifier(config["params"], config["data"], get_device(), reporter).fit()
    finally:
        reporter.close()


def run(stage: Stage, data: dict[str, Any]) -> None:
    import numpy as np
    from safetensors.torch import load_file

    from pipelines.data.images import DataPlace
    from pipelines.data.weights import write_weights
    from pipelines.results import scores
    from pipelines.run.fit import fit

    stage.tracker.log_dataset("imagenet", data["digest"], Path("imagenet"), "training")
    checkpoint = fit(
        train_loop_per_worker,
        {"params": stage.params, "data": DataPlace(data["place"], data["skipped"])},
        stage.params,
        name=stage.run_name,
        mlflow_run_id=stage.tracker.run_id,
        stops=True,
        elastic=True,
        data={"imagenet": data["place"]},
    )
    with checkpoint.as_directory() as folder:
        result = json.loads((Path(folder) / "result.json").read_text())
        weights = load_file(f"{folder}/best.safetensors")
        with np.load(f"{folder}/predictions.npz", allow_pickle=False) as file:
            predictions = dict(file)
    history, classes = result.pop("history"), data["classes"]
    model = stage.params.model.model_dump(mode="json")
    write_weights(
        stage.output("weights/pretrain"),
        weights,
        model=model,
        identity=stage.identity,
        mlflow_run_id=stage.tracker.run_id,
        metrics={key: result[key] for key in ("top1", "top5", "loss")},
    )
    stage.tracker.log_model("pretrain", stage.output("weights/pretrain"), model)
    stage.write_curves(history)
    results = stage.output("results/pretrain")
    results.mkdir()
    scores.write_tables(results, scores.classification(predictions, classes))
    scores.write_predictions(results / "predictions.csv", predictions, classes)
    if len(classes) <= LARGEST_CONFUSION:
        scores.write_csv(
            stage.output("plots/pretrain") / "confusion.csv",
            [
                {"actual": classes[target], "predicted": classes[label]}
                for target, label in zip(
                    predictions["target"], predictions["classes"][:, 0], strict=True
                )
            ],
        )
    stage.tracker.log_artifact(results)
    stage.tracker.log_artifact(stage.output("plots/pretrain"))
    stage.write_metrics(result)


if __name__ == "__main__":
    run_stage("pretrain", __doc__ or "", run, check)
