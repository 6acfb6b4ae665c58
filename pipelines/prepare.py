"""Prepare the data sets in their public layouts, with data cards and digests.

`prepare.source: demo` draws them into `data/`. `public` verifies those of section `data` where
they are (archives are unpacked first) and leaves only their manifests in `data/`.
"""

from pathlib import Path
from typing import Any

from pipelines.data.errors import DataError
from pipelines.data.files import write_json
from pipelines.data.layout import DATASETS, LAYOUTS
from pipelines.data.manifest import MANIFEST
from pipelines.data.store import Dataset
from pipelines.data.weights import PRETRAINED, weights_file
from pipelines.params import Params
from pipelines.run.stage import Stage, StageRun, run_stage
from pipelines.tasks import TASKS
from pipelines.tasks.dense import DenseTask
from pipelines.train.job import Job


def check(params: Params) -> None:
    if params.prepare.source == "public" and not any(
        getattr(params.data, name) for name in DATASETS
    ):
        raise DataError(
            "prepare.source is public, but data.imagenet, data.coco and data.ade20k are null",
            "Set those that you have to their folders (`-S data.imagenet=...`), or take the"
            " demo's data sets with `-S prepare.source=demo`",
        )
    if params.prepare.source == "public":
        check_tasks(params)
    check_weights(params)
    check_options(params)


def check_weights(params: Params) -> None:
    """Tell of weights to start from that are not there, or would not be used.

    Raises:
        PipelineError: names them.
    """
    for task in (TASKS[name] for name in params.tasks):
        if isinstance(task, DenseTask):
            given = task.given_weights(params)
        else:
            given = task.section(params).weights
        if given and given != PRETRAINED:
            weights_file(given)
    if params.pretrain.teacher and "classify" in params.tasks:
        from pipelines.train.distillation import load_teacher  # with timm, which takes seconds

        load_teacher(params.pretrain)


def check_options(params: Params) -> None:
    """Tell of a `config` and `cfg_options` that can't be before anything is prepared or trained.

    Raises:
        PipelineError: one can't be read, has no place, changes nothing, or makes no model.
    """
    for task in (TASKS[name] for name in params.tasks):
        if isinstance(task, DenseTask) and task.has_changed_config(params):
            from pipelines.mm.checks import check_model  # with mmdet, which takes seconds

            classes = tuple(str(i) for i in range(task.section(params).num_classes))
            check_model(Job(task.stage, params, Dataset(task.dataset, "", classes, {}, "")))


def check_tasks(params: Params) -> None:
    """Tell what the parameters and the folders show to be impossible, before anything is read.

    Raises:
        DataError: a task without data, or data with other classes than its task.
    """
    from pipelines.data.dataset import given_place, locate
    from pipelines.data.public.chunks import class_names
    from pipelines.data.store import is_shards

    tasks = [TASKS[name] for name in params.tasks]
    absent = [task for task in tasks if getattr(params.data, task.dataset) is None]
    if absent:
        rest = [task.name for task in tasks if task not in absent]
        raise DataError(
            f"tasks={[task.name for task in tasks]}, but there is no data for"
            f" {', '.join(task.name for task in absent)}:"
            f" {', '.join(f'data.{task.dataset}' for task in absent)} is null",
            f"Set it, or leave it out: -S 'tasks=[{','.join(rest)}]'",
        )
    for task in tasks:
        given = given_place(params, task.dataset)
        place = Path(locate(params, task.dataset))
        if is_shards(given) or not (place / LAYOUTS[task.dataset].images["val"]).is_dir():
            continue  # archives and shards, which `run` looks into
        found = len(class_names(place, task.dataset, splits=("val",)))
        wanted = task.section(params).num_classes
        if found != wanted:
            raise DataError(
                f"{place} has {found} classes, but {task.stage}.num_classes is {wanted}",
                f"Set {task.stage}.num_classes={found}; `elsa finetune` sets all that follows",
            )


def run(stage: StageRun, _: None) -> None:
    from pipelines.data.dataset import locate

    root = stage.output("data")
    make = draw if stage.section.source == "demo" else take
    metrics: dict[str, int] = {}
    digests: dict[str, str] = {}
    for name, manifest in make(stage, root).items():
        place = locate(stage.params, name)
        stage.tracker.log_dataset(name, manifest["digest"], place, "prepared")
        metrics |= {f"{name}_{split}": count for split, count in manifest["counts"].items()}
        digests[f"{name}_digest"] = manifest["digest"][:12]
        if manifest.get("skipped"):
            metrics[f"{name}_skipped"] = len(manifest["skipped"])
    stage.tracker.log_artifact(root / "cards")
    stage.write_metrics(metrics, **digests)


def draw(stage: StageRun, root: Path) -> dict[str, dict[str, Any]]:
    """Draw the demo's data sets; their manifests."""
    import ray

    from pipelines.data.demo import draw as demo
    from pipelines.run.display import track
    from pipelines.run.session import on_this_node

    render = ray.remote(demo.render_shard).options(scheduling_strategy=on_this_node())
    tasks = [render.remote(shard, str(root)) for shard in demo.shards(stage.section)]
    records = [record for shard in track(tasks, "prepare", "shards") for record in shard]
    return demo.finish(stage.section, root, records)


def take(stage: StageRun, root: Path) -> dict[str, dict[str, Any]]:
    """Unpack and verify the public data sets that are there; their manifests."""
    from pipelines.data import dataset
    from pipelines.data.public import card
    from pipelines.data.public.take import take_one
    from pipelines.run.session import each

    manifests = {}
    (root / "cards").mkdir(parents=True)
    for name in DATASETS:
        if getattr(stage.params.data, name) is None:
            write_json(root / name / MANIFEST, {"dataset": name, "absent": True}, indent=1)
            continue
        manifests[name] = take_one(stage.params, name, each)
        write_json(root / name / MANIFEST, manifests[name], indent=1)
        card.write_public_card(root, name, manifests[name], dataset.locate(stage.params, name))
    return manifests


STAGE = Stage("prepare", __doc__ or "", run, check)

if __name__ == "__main__":
    run_stage(STAGE)
