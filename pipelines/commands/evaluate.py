"""Evaluate a checkpoint, published or our own, on a validation set, without training."""

import csv
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elsa.run_exported import Exported
from pipelines.commands import evaluate_export
from pipelines.commands import exported as exported_files
from pipelines.commands.recognise import choose_params, load_model
from pipelines.data import store
from pipelines.data.errors import DataError
from pipelines.data.files import sha256_file
from pipelines.data.layout import LAYOUTS
from pipelines.data.manifest import MANIFEST, read_manifest
from pipelines.data.store import Dataset
from pipelines.data.weights import DESCRIPTION, weights_file
from pipelines.errors import PipelineError
from pipelines.params import Params, load_params, override, parse_change
from pipelines.paths import ROOT
from pipelines.tasks import TASKS, Prediction, Task
from pipelines.tasks.task import require_operator

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipelines.run.session import Session
    from pipelines.train.reporter import Reporter

SHOWN_CLASSES = 10


@dataclass(frozen=True)
class Options:
    """What a user asks for."""

    task: str
    weights: str
    """A published checkpoint, safetensors, a folder such as weights/pretrain, or an export."""
    recipe: str | None = None
    """Whose model and settings to use; None takes params.yaml, or what fits the weights."""
    ms_flip: bool = False
    no_ema: bool = False
    """Of a file with both, take the weights that are no average."""
    data: str | None = None
    """A data set in its public layout; None takes the one that `prepare` verified."""
    changes: tuple[str, ...] = ()
    """Such as `detect=mask-rcnn_3x` or `scaling.num_workers=8`."""
    out: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated on what."""

    task: Task
    what: Prediction
    state: "dict[str, Tensor]"
    """State dict of the whole model; empty of an export."""
    sha256: str
    """Of the file with the weights."""
    upstream_run: str
    """MLflow run that made the weights; empty if it is not known."""
    parameters: int | None
    """Of the whole model; None of an export, which does not say whose model it is."""


@dataclass(frozen=True)
class EvaluationJob:
    """What the workers get."""

    task: str
    what: Prediction
    state: Any
    """Reference of the state dict in Ray's object store."""


def find_data(task: Task, params: Params, given: str | None) -> Dataset:
    """The data set with the validation images.

    Args:
        given: a folder in the public layout, or shards; only its validation part is read, and
            it need not have been verified. None takes the data that `prepare` verified.

    Raises:
        DataError: what is missing or does not fit.
    """
    if given is None:
        return task.find_dataset(params)
    name, num_classes = task.dataset, task.section(params).num_classes
    layout = LAYOUTS[name]
    place = given.rstrip("/") if store.is_url(given) else str(Path(given).expanduser().resolve())
    if store.is_url(place) and layout.annotations:
        raise DataError(f"--data {given}: only ImageNet's shards can be at a URL")
    if not layout.annotations and store.is_shards(place):
        classes = store.ShardSet(place).classes
    elif not (Path(place) / layout.images["val"]).is_dir():
        raise DataError(f"--data {given}: there is no folder {layout.images['val']} in it")
    elif (manifest := read_manifest(Path(place) / MANIFEST)) and manifest["dataset"] == name:
        classes = manifest["classes"]  # the demo's
    else:
        from pipelines.data.public.chunks import class_names

        classes = class_names(Path(place), name, splits=("val",))
    if len(classes) != num_classes:
        raise DataError(
            f"--data {given} has {len(classes)} classes, but {task.stage}.num_classes is"
            f" {num_classes}",
            f"Use -S {task.stage}.num_classes={len(classes)}",
        )
    return Dataset(name, place, tuple(classes), {}, "")


def predict(job: EvaluationJob, device: "torch.device", reporter: "Reporter") -> None:
    """What each worker runs; rank 0 hands the predictions over."""
    import ray

    state = ray.get(job.state)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "predictions"
        folder.mkdir()
        TASKS[job.task].predict(job.what, state, device, reporter, folder)
        reporter.keep(folder if reporter.rank == 0 else None)


def predict_on_ray(evaluation: Evaluation, session: "Session", run_id: str, folder: Path) -> None:
    """Write the predictions of the weights to a new folder, by the workers of `scaling`."""
    import ray

    from pipelines.run import checkpoints
    from pipelines.run.fit import RunSpec, fit
    from pipelines.run.session import storage_path

    task, what = evaluation.task, evaluation.what
    spec = RunSpec(
        stage="evaluate",
        name=f"evaluate-{task.name}-{time.time_ns():x}",
        mlflow_run_id=run_id,
        scaling=what.params.scaling,
        storage=storage_path(what.params),
        data={task.dataset: what.dataset.place},
        local=session.local,
    )
    job = EvaluationJob(task.name, what, ray.put(evaluation.state))
    try:
        fit(predict, job, spec).to_directory(str(folder))
    finally:
        checkpoints.delete(spec.path)
    (folder / checkpoints.SEAL).unlink()


def record(
    evaluation: Evaluation, out: Path, predict_to: Callable[[str, Path], None]
) -> dict[str, float]:
    """Predict, score, record it in MLflow, write the folder `out`; the metrics in percent.

    Args:
        predict_to: writes the predictions to a new folder; it gets the id of the MLflow run, too.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with _tracked(evaluation) as tracker, tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        staged = Path(scratch) / out.name
        predict_to(tracker.run_id, staged)
        metrics = write_results(evaluation, staged, tracker.run_id)
        tracker.log_summary(metrics)
        for file in sorted(staged.iterdir()):
            if file.suffix in (".csv", ".png", ".json") and file.stat().st_size < 2**24:
                tracker.log_artifact(file)
        shutil.rmtree(out, ignore_errors=True)
        staged.replace(out)
    return metrics


@contextmanager
def _tracked(evaluation: Evaluation) -> Iterator[Any]:
    """An MLflow run of the evaluation, which ends as the block does."""
    from pipelines.run import tracking
    from pipelines.run.stage import pipeline_name

    task, params = evaluation.task, evaluation.what.params
    tags = {
        "stage": "evaluate",
        "task": task.name,
        "weights": evaluation.sha256,
        "upstream_run_id": evaluation.upstream_run,
        "data": store.public_url(evaluation.what.dataset.place),
        **tracking.git_tags(),
    }
    tracker = tracking.start_run("evaluate", pipeline_name(params), tags)
    if evaluation.parameters is not None:
        tracker.set_tags({"recipe": params.recipe})
        tracker.log_params(params.model_dump(mode="json", include={"model", task.stage}))
    try:
        yield tracker
    except BaseException as error:
        tracker.fail(error)
        raise
    tracker.finish()


def write_results(evaluation: Evaluation, folder: Path, run_id: str) -> dict[str, float]:
    """Score the predictions in `folder` and write the tables and pictures beside them."""
    from pipelines.results import scores

    task, what = evaluation.task, evaluation.what
    found = task.score(what, folder)
    task.draw_samples(what, folder).savefig(folder / "samples.png")
    suffix = "_ms_flip" if what.ms_flip else ""
    metrics = {f"{name}{suffix}": value for name, value in found.metrics.items()}
    scores.write_tables(folder, found)
    summary = {
        **{name: round(value, 4) for name, value in metrics.items()},
        "task": task.name,
        **_about_model(evaluation),
        "weights_sha256": evaluation.sha256,
        "mlflow_run_id": run_id,
    }
    (folder / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n")
    return metrics


def _about_model(evaluation: Evaluation) -> dict[str, Any]:
    """For the summary; nothing of an export."""
    if evaluation.parameters is None:
        return {}
    params = evaluation.what.params
    model = params.model.model_dump(mode="json")
    return {"recipe": params.recipe, "model": model, "parameters": evaluation.parameters}


def show(evaluation: Evaluation, metrics: Mapping[str, float], out: Path) -> None:
    """Print the scores, beside the published ones where there are any, and the worst classes."""
    from rich.console import Console
    from rich.table import Table

    from pipelines.results.tables import published_beside

    console, task, params = Console(), evaluation.task, evaluation.what.params
    facts = replace(task.facts(params), evaluated=True)
    whole = evaluation.parameters is not None
    published = published_beside(metrics, facts) if whole else {}
    title = f"{params.model.name}, recipe {params.recipe}" if whole else f"export, task {task.name}"
    table = Table("metric", title=title)
    table.add_column("value", justify="right")
    if published:
        table.add_column("published")
    for name, value in metrics.items():
        digits = 4 if name == "loss" else 2
        row = [name, f"{value:.{digits}f}"]
        table.add_row(*row, *([published.get(name, "")] if published else []))
    console.print(table)
    with (out / "per_class.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get(task.class_score)]
    rows.sort(key=lambda row: float(row[task.class_score]))
    worst = ", ".join(
        f"{row['class']} {float(row[task.class_score]):.1f}" for row in rows[:SHOWN_CLASSES]
    )
    console.print(f"Lowest {task.class_score}: {worst}", highlight=False)
    console.print(f"Written to {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")


def prepare(options: Options) -> Evaluation:
    """Check everything that can be checked before Ray starts.

    Raises:
        PipelineError: what does not fit.
    """
    task = TASKS[options.task]
    if options.ms_flip and not task.has_ms_flip:
        able = ", ".join(one.name for one in TASKS.values() if one.has_ms_flip)
        raise PipelineError(f"--ms-flip: only {able} has test-time augmentation")
    require_operator()
    file = weights_file(options.weights, Path.cwd())
    description = file.parent / DESCRIPTION
    upstream = json.loads(description.read_text()) if description.is_file() else {}
    use_ema = not options.no_ema
    params = choose_params(task, file, options.recipe, list(options.changes), use_ema)
    if not params.scaling.use_gpu:  # float16 is for GPUs
        params = override(params, {"pretrain.amp": "none"}, "on a CPU")
    what = Prediction(params, find_data(task, params, options.data), options.ms_flip)
    model = load_model(task, what, file, use_ema)
    return Evaluation(
        task,
        what,
        {name: value.contiguous() for name, value in model.state_dict().items()},
        sha256_file(file),
        upstream.get("mlflow_run_id", ""),
        sum(p.numel() for p in model.parameters()),
    )


def prepare_export(options: Options, exported: Exported) -> Evaluation:
    """Check everything that can be checked before an export predicts.

    Raises:
        PipelineError: what does not fit.
    """
    given = {"--recipe": options.recipe, "--ms-flip": options.ms_flip, "--no-ema": options.no_ema}
    for name in (name for name, value in given.items() if value):
        raise PipelineError(f"{name} is not for an export, which predicts in one way only")
    task = TASKS[options.task]
    own = {f"{task.stage}.num_classes": len(exported.classes)}
    changes = own | dict(map(parse_change, options.changes))
    params = override(load_params(), changes, " ".join(options.changes))
    dataset = find_data(task, params, options.data)
    evaluate_export.check_classes(exported, dataset)
    digest = sha256_file(Path(options.weights).expanduser())
    return Evaluation(task, Prediction(params, dataset), {}, digest, "", None)


def evaluate(options: Options) -> None:
    """Evaluate, and print and write the scores.

    Raises:
        PipelineError: what does not fit, or failed.
    """
    exported = None
    if exported_files.is_export(options.weights):
        exported = exported_files.load(options.weights, options.task)
        evaluation = prepare_export(options, exported)
    else:
        evaluation = prepare(options)
    how = "-ms-flip" if options.ms_flip else ""
    default = ROOT / "evaluations" / f"{options.task}{how}-{evaluation.sha256[:12]}"
    out = Path(options.out).resolve() if options.out else default
    if options.out and out.exists() and not (out / "metrics.json").is_file():
        raise PipelineError(f"--out {out} exists and holds no evaluation", "Name another folder")
    if exported:
        write = partial(evaluate_export.predict, exported, evaluation.what.dataset)
        metrics = record(evaluation, out, lambda _, folder: write(folder))
    else:
        from pipelines.run.session import ray_session

        loop, scaling = evaluation.task.loop, evaluation.what.params.scaling
        with ray_session(preload=loop.preload(scaling)) as session:
            metrics = record(evaluation, out, partial(predict_on_ray, evaluation, session))
    show(evaluation, metrics, out)
