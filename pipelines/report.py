"""Write one self-contained page and its Markdown twin: results, curves, pictures, lineage."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.data.dataset import locate
from pipelines.data.manifest import MANIFEST, read_manifest
from pipelines.data.store import Dataset
from pipelines.params import Params, changed
from pipelines.paths import ROOT
from pipelines.results.page import Drawn, Page, StageRow, write_html, write_markdown
from pipelines.results.tables import duration, load_lineage, load_metrics, result_rows
from pipelines.run.stage import Stage, StageRun, pipeline_name, run_stage
from pipelines.tasks import TASKS, Scene, Task

Metrics = dict[str, dict[str, Any]]
CURVES = Drawn("curves", "Learning curves", "Loss and scores by epoch.")


def tasks_of(params: Params) -> list[Task]:
    """The tasks of the pipeline, in the registry's order."""
    return [task for task in TASKS.values() if task.name in params.tasks]


def check(params: Params) -> Metrics:
    stages = ["prepare", "build_op", *(task.stage for task in tasks_of(params))]
    return load_metrics(ROOT, stages)


def draw(name: str, scene: Scene, stages: Sequence[str], target: str) -> bool:
    """Draw a picture into the PNG `target`; whether there is one.

    Args:
        stages: the training stages that ran, for the curves.
    """
    from pipelines.results import plots

    if name == CURVES.name:
        files = {stage: scene.root / "plots" / stage / "curves.csv" for stage in stages}
        figure = plots.curves({stage: plots.read_curves(file) for stage, file in files.items()})
    else:
        pictures = {one.name: one for task in TASKS.values() for one in task.pictures}
        found = pictures[name].draw(scene)
        if found is None:
            return False
        figure = found
    figure.savefig(target)
    return True


def run(stage: StageRun, metrics: Metrics) -> None:
    from pipelines.run import tracking

    reports = stage.output("reports")
    (reports / "pictures").mkdir(parents=True)
    tasks = tasks_of(stage.params)
    pictures = _draw_all(stage, tasks, reports / "pictures")
    page = _page(stage, tasks, metrics, pictures)
    write_html(reports / "index.html", page, reports / "pictures", ROOT / "data/cards")
    write_markdown(reports / "report.md", page)
    stage.tracker.log_artifact(reports)
    summary = {f"{row.stage}/{row.metric}": row.number for row in page.results}
    tracking.end_pipeline(pipeline_name(stage.params), summary)
    stage.write_metrics({"pictures": len(pictures)})


def _draw_all(stage: StageRun, tasks: Sequence[Task], folder: Path) -> list[Drawn]:
    """The pictures that there are, drawn by Ray tasks."""
    import ray

    from pipelines.run.display import track
    from pipelines.run.session import on_this_node

    wanted = [CURVES]
    wanted += [Drawn(p.name, p.title, p.caption) for task in tasks for p in task.pictures]
    scene = Scene(ROOT, _datasets(stage.params), stage.section.samples)
    stages = [task.stage for task in tasks]
    task = ray.remote(draw).options(scheduling_strategy=on_this_node())
    waiting = [
        task.remote(one.name, scene, stages, str(folder / f"{one.name}.png")) for one in wanted
    ]
    drawn = track(waiting, "report", "pictures")
    return [one for one, there in zip(wanted, drawn, strict=True) if there]


def _datasets(params: Params) -> dict[str, Dataset]:
    """The data sets that there are, whether a task of the pipeline uses them or not."""
    found = {}
    for name in (task.dataset for task in TASKS.values()):
        manifest = read_manifest(ROOT / "data" / name / MANIFEST)
        if manifest:
            classes, skipped = tuple(manifest["classes"]), tuple(manifest["skipped"])
            place = locate(params, name)
            found[name] = Dataset(
                name, place, classes, manifest["counts"], manifest["digest"], skipped
            )
    return found


def _page(
    stage: StageRun, tasks: Sequence[Task], metrics: Metrics, pictures: Sequence[Drawn]
) -> Page:
    from pipelines.run import tracking

    params, git = stage.params, tracking.git_tags()
    return Page(
        pipeline=pipeline_name(params),
        recipe=params.recipe,
        commit=git.get("mlflow.source.git.commit", "unknown")[:12],
        dirty=git.get("git_dirty") == "true",
        public=params.prepare.source == "public",
        results=result_rows([task.facts(params) for task in tasks], metrics),
        choice=" ".join(filter(None, (task.choice(params) for task in tasks))),
        stages=[_stage_row(name, metrics[name], params) for name in metrics],
        total=duration(sum(values["wall_time_s"] for values in metrics.values())),
        changed=changed(params),
        ablation=_ablation(),
        commands=[
            f"elsa evaluate --task {task.name} --weights weights/{task.stage}" for task in tasks
        ],
        pictures=pictures,
    )


def _stage_row(name: str, metrics: dict[str, Any], params: Params) -> StageRow:
    description = ROOT / "weights" / name / "model.json"
    weights = json.loads(description.read_text()) if description.exists() else {}
    lineage = load_lineage(ROOT, name)
    hours = metrics["wall_time_s"] / 3600 * params.scaling.num_workers
    trained = "images_per_second" in metrics
    return StageRow(
        stage=name,
        time=duration(metrics["wall_time_s"]),
        quoted=_quoted(metrics),
        cost=_cost(metrics, params) if trained else "",
        rate=f"{metrics['images_per_second']:.0f}" if trained else "",
        gpu_hours=f"{hours:.2f}" if trained and params.scaling.use_gpu else "",
        energy=f"{metrics['energy_wh'] / 1000:.2f}" if "energy_wh" in metrics else "",
        identity=lineage["identity"],
        run=lineage["mlflow_run_id"],
        weights=weights.get("sha256", "")[:12],
        upstream=_upstream(weights["upstream"]) if weights.get("upstream") else "",
    )


def _quoted(metrics: dict[str, Any]) -> str:
    """What `elsa plan --probe` said before; empty where nobody asked it."""
    if "quoted_s" not in metrics:
        return ""
    low, high = (duration(metrics[f"quoted_{end}_s"]) for end in ("low", "high"))
    return f"{duration(metrics['quoted_s'])} ({low} to {high})"


def _cost(metrics: dict[str, Any], params: Params) -> str:
    """Money by the price of a worker, and what it was quoted; empty without a price."""
    hourly = params.budget.price * params.scaling.num_workers / 3600
    if not hourly:
        return ""
    quoted = f", quoted {metrics['quoted_s'] * hourly:.3g}" if "quoted_s" in metrics else ""
    return f"{metrics['wall_time_s'] * hourly:.3g}{quoted}"


def _upstream(upstream: dict[str, Any]) -> str:
    """Which weights a stage started from: those of a run, with its scores, or a file given."""
    run = upstream["mlflow_run_id"]
    if not run:
        return f"{upstream['sha256'][:12]}, a file that was given"
    scores = ", ".join(
        f"{k} {v:.2f}" for k, v in upstream["metrics"].items() if isinstance(v, float)
    )
    return f"{upstream['sha256'][:12]} of run {run[:12]} ({scores})"


def _ablation() -> dict[str, Any] | None:
    """What the last sweep in this workspace found; None where there was none."""
    comparison = ROOT / "sweeps/comparison.json"
    if not comparison.exists() or not (ROOT / "lineage/sweep.json").exists():
        return None
    found = json.loads(comparison.read_text())
    rows = [
        {
            "point": row["point"],
            "runs": row["runs"],
            "score": f"{row['mean']:.1f}" + (f" ± {row['ci95']:.1f}" if row["ci95"] else ""),
            "verdict": (
                row.get("finding", "of an earlier version: run the sweep again")
                if "difference" in row
                else "the reference"
            ),
        }
        for row in found["rows"]
    ]
    return {"metric": found["metric"], "rows": rows, "sweep": load_lineage(ROOT, "sweep")}


STAGE = Stage("report", __doc__ or "", run, check)

if __name__ == "__main__":
    run_stage(STAGE)
