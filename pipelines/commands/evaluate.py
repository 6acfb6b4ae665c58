"""Evaluate a checkpoint, published or our own, on a validation set, without training."""

import csv
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.data import store
from pipelines.data.errors import DataError
from pipelines.data.files import sha256_file
from pipelines.data.layout import LAYOUTS
from pipelines.data.manifest import MANIFEST, read_manifest
from pipelines.data.store import Dataset
from pipelines.data.weights import DESCRIPTION, weights_file
from pipelines.errors import PipelineError
from pipelines.params import Params, compose, load_params, override, parse_change, recipe_names
from pipelines.paths import RECIPES, ROOT
from pipelines.tasks import TASKS, Prediction, Task
from pipelines.tasks.task import require_operator

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipelines.train.reporter import Reporter

SHOWN_CLASSES = 10


@dataclass(frozen=True)
class Options:
    """What a user asks for."""

    task: str
    weights: str
    """A published checkpoint, safetensors, or a folder such as weights/pretrain."""
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
    """State dict of the whole model."""
    sha256: str
    """Of the file with the weights."""
    upstream_run: str
    """MLflow run that made the weights; empty if it is not known."""
    parameters: int
    """Of the whole model."""


@dataclass(frozen=True)
class EvaluationJob:
    """What the workers get."""

    task: str
    what: Prediction
    state: Any
    """Reference of the state dict in Ray's object store."""


def choose_params(
    task: Task, weights: Path, recipe: str | None, changes: list[str], use_ema: bool = True
) -> Params:
    """The parameters that the weights belong to: the recipe if given, else those of `params.yaml`
    if the weights fit their model, else the first recipe whose model they fit.

    Raises:
        PipelineError: none fits.
    """
    described = _description(weights)
    group = f"{described.get('method')}_{described.get('schedule')}"
    given = any(change.startswith(f"{task.stage}=") for change in changes)
    if (RECIPES / task.stage / f"{group}.yaml").is_file() and not given:
        own = [f"{task.stage}.config={described['config']}"] if "config" in described else []
        changes = [f"{task.stage}={group}", *own, *changes]
    if recipe:
        return _as_described(compose([f"recipe={recipe}", *changes]), task, described)
    faults = {}
    for name in ("params.yaml", *recipe_names()):
        try:
            params = _params_yaml(changes) if name == "params.yaml" else None
            params = params or compose([f"recipe={name}", *changes])
            params = _as_described(params, task, described)
        except PipelineError as error:
            faults[name] = str(error)  # a change that is not for this recipe
            continue
        fault = _misfit(task, weights, params, use_ema)
        if fault is None:
            return params
        faults[name] = fault
    shown = "\n".join(f"  {name}: {fault.splitlines()[0]}" for name, fault in faults.items())
    raise PipelineError(
        f"{weights} fits the model of no recipe. Tried:\n{shown}",
        "Name one with --recipe, and change it with -S model.<key>=<value>, to see what differs",
    )


def _as_described(params: Params, task: Task, described: Mapping[str, Any]) -> Params:
    """With the changes to the config that the weights were trained with, unless it has others."""
    options = described.get("cfg_options")
    if not options or task.section(params).cfg_options:
        return params
    section = task.section(params).model_copy(update={"cfg_options": options})
    return params.model_copy(update={task.stage: section})


def _params_yaml(changes: list[str]) -> Params:
    """`params.yaml` with the changes.

    Raises:
        PipelineError: a change that is not for it, such as one of a group.
    """
    return override(load_params(), dict(map(parse_change, changes)), " ".join(changes))


def _description(weights: Path) -> dict[str, Any]:
    """What `model.json` beside the weights says of the model; empty without one."""
    file = weights.parent / DESCRIPTION
    found: dict[str, Any] = json.loads(file.read_text())["model"] if file.is_file() else {}
    return found


def _misfit(task: Task, weights: Path, params: Params, use_ema: bool) -> str | None:
    """Why the weights are not of the parameters' backbone; None if they are."""
    import timm

    import elsa

    theirs = _description(weights)
    if theirs:
        known = {*theirs, "cfg_options", "config"}  # which are left out where there are none
        ours = {key: value for key, value in task.model(params).items() if key in known}
        differing = [key for key in ours if theirs.get(key) != ours[key]]
        return f"{DESCRIPTION} has another {', '.join(differing)}" if differing else None
    whole = task.name == "classify"
    kind = {"num_classes": params.pretrain.num_classes} if whole else {"features_only": True}
    try:
        model = timm.create_model(params.model.name, **params.model.overrides(), **kind)
        _load(model, weights, use_ema)
    except (elsa.CheckpointError, TypeError, ValueError, RuntimeError) as error:
        return str(error)
    return None


def _load(model: Any, file: Path, use_ema: bool) -> None:
    import elsa

    if any(isinstance(part, elsa.ELSASwin) for part in model.modules()):
        elsa.load_checkpoint(model, file, use_ema=use_ema)
    else:
        model.load_state_dict(elsa.read_state_dict(file, use_ema=use_ema))


def load_model(task: Task, what: Prediction, file: Path, use_ema: bool = True) -> Any:
    """The whole model with the weights of `file`.

    Raises:
        PipelineError: they don't fit; names what differs.
    """
    import elsa

    model = task.evaluation_model(what)
    try:
        _load(model, file, use_ema)
    except (elsa.CheckpointError, RuntimeError) as error:
        group = f"-S {task.stage}=<group> chooses another method and schedule"
        fix = group if (RECIPES / task.stage).is_dir() else ""
        raise PipelineError(
            f"{error}\nThe model is that of recipe {what.params.recipe}", fix
        ) from None
    return model


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


def run(evaluation: Evaluation, out: Path) -> dict[str, float]:
    """Evaluate on Ray, record it in MLflow, write the folder `out`; the metrics in percent."""
    import ray

    from pipelines.run import checkpoints
    from pipelines.run.fit import RunSpec, fit, forget
    from pipelines.run.session import ray_session, storage_path

    task, what = evaluation.task, evaluation.what
    with ray_session() as session, _tracked(evaluation) as tracker:
        spec = RunSpec(
            stage="evaluate",
            name=f"evaluate-{task.name}-{time.time_ns():x}",
            mlflow_run_id=tracker.run_id,
            scaling=what.params.scaling,
            storage=storage_path(what.params),
            data={task.dataset: what.dataset.place},
            local=session.local,
        )
        job = EvaluationJob(task.name, what, ray.put(evaluation.state))
        checkpoint = fit(predict, job, spec)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            staged = Path(scratch) / out.name
            checkpoint.to_directory(str(staged))
            forget(checkpoint)
            (staged / checkpoints.SEAL).unlink()
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
        "recipe": params.recipe,
        "weights": evaluation.sha256,
        "upstream_run_id": evaluation.upstream_run,
        "data": store.public_url(evaluation.what.dataset.place),
        **tracking.git_tags(),
    }
    tracker = tracking.start_run("evaluate", pipeline_name(params), tags)
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
        "recipe": what.params.recipe,
        "model": what.params.model.model_dump(mode="json"),
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

    from pipelines.results.tables import published_beside

    console, task, params = Console(), evaluation.task, evaluation.what.params
    facts = replace(task.facts(params), evaluated=True)
    published = published_beside(metrics, facts)
    table = Table("metric", title=f"{params.model.name}, recipe {params.recipe}")
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


def evaluate(options: Options) -> None:
    """Evaluate, and print and write the scores.

    Raises:
        PipelineError: what does not fit, or failed.
    """
    evaluation = prepare(options)
    how = "-ms-flip" if options.ms_flip else ""
    default = ROOT / "evaluations" / f"{options.task}{how}-{evaluation.sha256[:12]}"
    out = Path(options.out).resolve() if options.out else default
    if options.out and out.exists() and not (out / "metrics.json").is_file():
        raise PipelineError(f"--out {out} exists and holds no evaluation", "Name another folder")
    metrics = run(evaluation, out)
    show(evaluation, metrics, out)
