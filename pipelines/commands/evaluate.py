"""Evaluate a checkpoint, published or our own, on a validation set, without training."""

import argparse
import csv
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pipelines.data import dataset as places
from pipelines.data import images
from pipelines.data.errors import DataError
from pipelines.data.manifest import MANIFEST, read_manifest
from pipelines.data.public import verify
from pipelines.errors import PipelineError
from pipelines.params import Params, load_params, parse_change, recipe_names
from pipelines.paths import ROOT

STAGES = {"classify": "pretrain", "detect": "detect", "segment": "segment"}
DATASETS = {"classify": "imagenet", "detect": "coco", "segment": "ade20k"}
SHOWN_CLASSES = 10


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated on what."""

    task: str
    params: Params
    state: dict[str, Any]
    """State dict of the whole model."""
    sha256: str
    """Of the file with the weights."""
    parameters: int
    upstream_run: str
    """MLflow run that made the weights; empty if it is not known."""
    place: str
    skipped: tuple[str, ...]
    classes: tuple[str, ...]
    ms_flip: bool

    @property
    def stage(self) -> str:
        """The section of the parameters that the task belongs to."""
        return STAGES[self.task]


def choose_params(
    task: str, weights: Path, recipe: str | None, changes: Mapping[str, Any]
) -> Params:
    """The parameters that the weights belong to: the recipe if given, else those of `params.yaml`
    if the weights fit their model, else the first recipe whose model they fit.

    Raises:
        PipelineError: none fits.
    """
    if recipe:
        return load_params(recipe, changes=changes)
    faults = {}
    for name in (None, *recipe_names()):
        try:
            params = load_params(name, changes=changes)
        except PipelineError as error:
            if name is None:
                raise
            faults[name] = str(error)  # a change that is not for this recipe
            continue
        fault = _misfit(task, weights, params)
        if fault is None:
            return params
        faults[name or "params.yaml"] = fault
    shown = "\n".join(f"  {name}: {fault.splitlines()[0]}" for name, fault in faults.items())
    raise PipelineError(
        f"{weights} fits the model of no recipe; name one with --recipe, and change it with -S"
        f" model.<key>=<value>, to see all that differs. Tried:\n{shown}"
    )


def _misfit(task: str, weights: Path, params: Params) -> str | None:
    """Why the weights are not of the parameters' backbone; None if they are."""
    import timm

    import elsa

    description = weights.parent / "model.json"
    if description.is_file():
        theirs = json.loads(description.read_text())["model"]
        section = getattr(params, STAGES[task])
        ours = params.model.model_dump(mode="json")
        ours |= {key: getattr(section, key) for key in ("method", "schedule") if key in theirs}
        differing = [key for key in ours if theirs.get(key) != ours[key]]
        return f"model.json has another {', '.join(differing)}" if differing else None
    kind = (
        {"num_classes": params.pretrain.num_classes}
        if task == "classify"
        else {"features_only": True}
    )
    try:
        _load(timm.create_model(params.model.name, **params.model.overrides(), **kind), weights)
    except (elsa.CheckpointError, TypeError, ValueError, RuntimeError) as error:
        return str(error)
    return None


def _load(model: Any, file: Path) -> None:
    import elsa

    if any(isinstance(part, elsa.ELSASwin) for part in model.modules()):
        elsa.load_checkpoint(model, file)
    else:
        model.load_state_dict(elsa.read_state_dict(file))


def load_model(task: str, params: Params, classes: Sequence[str], place: str, file: Path) -> Any:
    """The whole model with the weights of `file`.

    Raises:
        PipelineError: they don't fit; names what differs.
    """
    import elsa

    if task == "classify":
        from pipelines.train.models import build_model

        model = build_model(params.model, params.pretrain.num_classes)
    else:
        from pipelines.mm import evaluation

        model = evaluation.build_model(_job(task, params, classes, place))
    try:
        if any(isinstance(part, elsa.ELSASwin) for part in model.modules()):
            elsa.load_checkpoint(model, file)
        else:
            model.load_state_dict(elsa.read_state_dict(file))
    except (elsa.CheckpointError, RuntimeError) as error:
        hint = "" if task == "classify" else " Method and schedule are --method and --schedule."
        raise PipelineError(
            f"{error}\nThe model is that of recipe {params.recipe}.{hint}"
        ) from None
    return model


def _job(task: str, params: Params, classes: Sequence[str], place: str) -> Any:
    from pipelines.mm.train import Job

    return Job(task, params, place, tuple(classes), None)


def find_data(task: str, params: Params, given: str | None) -> dict[str, Any]:
    """`place`, `skipped` and `classes` of the validation images.

    Args:
        given: a folder in the public layout, or shards; only its validation part is read, and
            it need not have been verified. None takes the data that `prepare` verified.

    Raises:
        DataError: what is missing or does not fit.
    """
    name, num_classes = DATASETS[task], getattr(params, STAGES[task]).num_classes
    if given is None:
        return places.check(params, name, num_classes)
    place = given.rstrip("/") if images.is_url(given) else str(Path(given).expanduser().resolve())
    if images.is_url(place) and task != "classify":
        raise DataError(f"--data {given}: only ImageNet's shards can be at a URL")
    needed = {"classify": "val", "detect": "val2017", "segment": "images/validation"}[task]
    if task == "classify" and images.is_shards(place):
        classes = images.ShardSet(place).classes
    elif not (Path(place) / needed).is_dir():
        raise DataError(f"--data {given}: there is no folder {needed} in it")
    elif (manifest := read_manifest(Path(place) / MANIFEST)) and manifest["dataset"] == name:
        classes = manifest["classes"]  # the demo's
    else:
        classes = verify.class_names(Path(place), name, splits=("val",))
    if len(classes) != num_classes:
        raise DataError(
            f"--data {given} has {len(classes)} classes, but {STAGES[task]}.num_classes is"
            f" {num_classes}; use -S {STAGES[task]}.num_classes={len(classes)}"
        )
    return {"place": place, "skipped": (), "classes": classes}


def evaluate_per_worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs; rank 0 hands predictions over."""
    import ray
    from ray.train.torch import get_device

    from pipelines.run.reporter import RayReporter

    reporter, what = RayReporter(config["reporting"]), config["evaluation"]
    state = ray.get(config["state"])
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "predictions"
            folder.mkdir()
            if what["task"] == "classify":
                _predict_classes(what, state, get_device(), reporter, folder)
            else:
                from pipelines.mm.evaluation import predict

                job = _job(what["task"], what["params"], what["classes"], what["place"])
                predict(job, state, what["ms_flip"], folder, reporter)
            reporter.keep(folder if reporter.rank == 0 else None)
    finally:
        reporter.close()


def _predict_classes(
    what: dict[str, Any], state: Any, device: Any, reporter: Any, folder: Path
) -> None:
    import numpy as np

    from pipelines.train.evaluation import predict
    from pipelines.train.models import build_model

    p = what["params"].pretrain
    model = build_model(what["params"].model, p.num_classes)
    model.load_state_dict(state)
    data = images.DataPlace(what["place"], what["skipped"])
    found = predict(p, model, data, device, reporter)
    if found is not None:
        np.savez(folder / "predictions.npz", **cast("dict[str, Any]", found))


def run(evaluation: Evaluation, out: Path) -> dict[str, float]:
    """Evaluate on Ray, record it in MLflow, write the folder `out`; the metrics in percent."""
    import ray

    from pipelines.run import checkpoints as storage
    from pipelines.run import fit as launch
    from pipelines.run import tracking
    from pipelines.run.stage import pipeline_name

    params, what = evaluation.params, vars(evaluation) | {}
    state = what.pop("state")
    with launch.ray_session():
        tags = {
            "stage": "evaluate",
            "task": evaluation.task,
            "recipe": params.recipe,
            "weights": evaluation.sha256,
            "upstream_run_id": evaluation.upstream_run,
            "data": images.public_url(evaluation.place),
            **tracking.git_tags(),
        }
        tracker = tracking.start_run("evaluate", pipeline_name(params), tags)
        sections = params.model_dump(mode="json", include={"model", evaluation.stage})
        tracker.log_params(sections)
        try:
            checkpoint = launch.fit(
                evaluate_per_worker,
                {"evaluation": what, "state": ray.put(state)},
                params,
                name=f"evaluate-{evaluation.task}-{time.time_ns():x}",
                mlflow_run_id=tracker.run_id,
                data={DATASETS[evaluation.task]: evaluation.place},
            )
            with tempfile.TemporaryDirectory(dir=_parent(out)) as scratch:
                staged = Path(scratch) / out.name
                checkpoint.to_directory(str(staged))
                launch.forget(checkpoint)
                (staged / storage.SEAL).unlink()
                metrics = write_results(evaluation, staged, tracker.run_id)
                tracker.log_summary(metrics)
                for file in sorted(staged.iterdir()):
                    if file.suffix in (".csv", ".png", ".json") and file.stat().st_size < 2**24:
                        tracker.log_artifact(file)
                shutil.rmtree(out, ignore_errors=True)
                staged.replace(out)
        except BaseException as error:
            tracker.fail(error)
            raise
        tracker.finish()
    return metrics


def _parent(out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent


def write_results(evaluation: Evaluation, folder: Path, run_id: str) -> dict[str, float]:
    """Score the predictions in `folder` and write the tables and pictures beside them."""
    from pipelines.results import figures, scores

    place, classes, params = Path(evaluation.place), evaluation.classes, evaluation.params
    count = params.report.samples
    if evaluation.task == "classify":
        import numpy as np

        data = images.DataPlace(evaluation.place, evaluation.skipped).images("val")
        with np.load(folder / "predictions.npz", allow_pickle=False) as file:
            predictions = dict(file)
        found = scores.classification(predictions, classes)
        scores.write_predictions(folder / "predictions.csv", predictions, classes)
        (folder / "predictions.npz").unlink()
        figure = figures.mistakes(data, folder / "predictions.csv", 2 * count)
    elif evaluation.task == "detect":
        found = scores.detection(place / "annotations/instances_val2017.json", folder)
        figure = figures.detections(place, folder, count)
    else:
        masks = folder / "masks"
        masks.mkdir()
        for file in folder.glob("*.png"):
            file.replace(masks / file.name)
        found = scores.segmentation(place / "annotations/validation", masks, classes)
        figure = figures.segmentations(place, masks, classes, count)
    figure.savefig(folder / "samples.png")
    suffix = "_ms_flip" if evaluation.ms_flip else ""
    metrics = {f"{name}{suffix}": value for name, value in found.metrics.items()}
    scores.write_tables(folder, found)
    summary = {
        **{name: round(value, 4) for name, value in metrics.items()},
        "task": evaluation.task,
        "recipe": params.recipe,
        "model": params.model.model_dump(mode="json"),
        "parameters": evaluation.parameters,
        "weights_sha256": evaluation.sha256,
        "mlflow_run_id": run_id,
    }
    (folder / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n")
    return metrics


def show(evaluation: Evaluation, metrics: Mapping[str, float], out: Path) -> None:
    """Print the scores, beside the published ones where there are any, and the worst classes."""
    from rich.console import Console
    from rich.table import Table

    from pipelines.commands.summary import published_beside

    console = Console()
    published = published_beside(metrics, evaluation.stage, evaluation.params)
    table = Table(
        "metric", title=f"{evaluation.params.model.name}, recipe {evaluation.params.recipe}"
    )
    table.add_column("value", justify="right")
    if published:
        table.add_column("published")
    for name, value in metrics.items():
        digits = 4 if name == "loss" else 2
        row = [name, f"{value:.{digits}f}"]
        table.add_row(*row, *([published.get(name, "")] if published else []))
    console.print(table)
    with (out / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    key = next(k for k in rows[0] if k in ("top1", "bbox_mAP", "IoU"))
    rows = sorted((r for r in rows if r.get(key)), key=lambda row: float(row[key]))
    worst = ", ".join(f"{r['class']} {float(r[key]):.1f}" for r in rows[:SHOWN_CLASSES])
    console.print(f"Lowest {key}: {worst}", highlight=False)
    console.print(f"Written to {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")


def prepare(arguments: argparse.Namespace) -> Evaluation:
    """Check everything that can be checked before Ray starts."""
    from pipelines.build_op import check_library
    from pipelines.run.identity import content_digest, weights_file

    task = arguments.task
    if arguments.ms_flip and task != "segment":
        raise PipelineError("--ms-flip: only segmentation has test-time augmentation here")
    if task == "classify" and (arguments.method or arguments.schedule):
        raise PipelineError("--method and --schedule are of detection and segmentation")
    changes = dict(parse_change(text) for text in arguments.set)
    changes |= {
        f"{STAGES[task]}.{key}": value
        for key, value in (("method", arguments.method), ("schedule", arguments.schedule))
        if value
    }
    check_library()
    file = weights_file(arguments.weights, Path.cwd())
    description = file.parent / "model.json"
    upstream = json.loads(description.read_text()) if description.is_file() else {}
    params = choose_params(task, file, arguments.recipe, changes)
    data = find_data(task, params, arguments.data)
    model = load_model(task, params, data["classes"], data["place"], file)
    return Evaluation(
        task=task,
        params=params,
        state={name: value.contiguous() for name, value in model.state_dict().items()},
        sha256=content_digest(file),
        parameters=sum(p.numel() for p in model.parameters()),
        upstream_run=upstream.get("mlflow_run_id", ""),
        place=data["place"],
        skipped=tuple(data["skipped"]),
        classes=tuple(data["classes"]),
        ms_flip=arguments.ms_flip,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.commands.evaluate",
        description=f"{__doc__} Prints the scores beside the published ones, and writes scores of"
        " each class, confusions, predictions in the public formats and pictures to a folder.",
    )
    parser.add_argument("--task", required=True, choices=STAGES)
    parser.add_argument(
        "--weights",
        required=True,
        help="a published checkpoint, safetensors, or a folder such as weights/pretrain",
    )
    parser.add_argument(
        "--recipe",
        choices=recipe_names(),
        help="whose model and settings to use; by default params.yaml, or what fits the weights",
    )
    parser.add_argument("--method", help="of detection: mask-rcnn or cascade-mask-rcnn")
    parser.add_argument("--schedule", help="1x, 3x or 160k: whose config to use")
    parser.add_argument("--ms-flip", action="store_true", help="several scales, and mirrored")
    parser.add_argument(
        "--data",
        help="a data set in its public layout, of which only the validation part is needed;"
        " by default the one that `dvc repro prepare` verified",
    )
    parser.add_argument(
        "-S",
        dest="set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a parameter, such as -S scaling.num_workers=8 (repeatable)",
    )
    parser.add_argument("--out", help="folder to write; by default evaluations/<task>-<weights>")
    arguments = parser.parse_args()
    try:
        evaluation = prepare(arguments)
        how = "-ms-flip" if evaluation.ms_flip else ""
        default = ROOT / "evaluations" / f"{evaluation.task}{how}-{evaluation.sha256[:12]}"
        out = Path(arguments.out).resolve() if arguments.out else default
        if arguments.out and out.exists() and not (out / "metrics.json").is_file():
            raise PipelineError(f"--out {out} exists and holds no evaluation; name another folder")
        metrics = run(evaluation, out)
    except PipelineError as error:
        sys.exit(f"error: evaluate: {error}")
    show(evaluation, metrics, out)


if __name__ == "__main__":
    main()
