"""Write one self-contained page and its Markdown twin: results, curves, pictures, lineage."""

import base64
import json
from pathlib import Path
from typing import Any

from pipelines.commands.compare import verdict
from pipelines.commands.summary import STAGES, duration, load_metrics, result_rows
from pipelines.data import dataset as places
from pipelines.data.images import DataPlace
from pipelines.params import Params, changed
from pipelines.paths import ROOT
from pipelines.run.stage import Stage, pipeline_name, run_stage

PICTURES = {
    "curves": ("Learning curves", "Loss and scores by epoch."),
    "detections": (
        "Detections",
        "Validation images, spread evenly over the set: truth above, predictions below.",
    ),
    "segmentations": (
        "Segmentations",
        "Validation images, spread evenly over the set: image, truth, prediction.",
    ),
    "mistakes": ("Failures: classification", "The wrong answers that the classifier is surest of."),
    "worst_detections": (
        "Failures: detection",
        "The validation images with most missed objects and false detections per object (at a"
        " score and a mask IoU of 0.5): truth above, predictions below.",
    ),
    "worst_segmentations": (
        "Failures: segmentation",
        "The validation images with the lowest IoU over their own classes: image, truth,"
        " prediction.",
    ),
    "confusion": (
        "Confusion matrix",
        "Counts on the validation images; shade is percent of a row.",
    ),
    "reliability": (
        "Calibration",
        "How often the classifier is right when it is so sure, and how many images it is so sure"
        " of. Label smoothing, mixup and cutmix make a classifier less sure than it is right.",
    ),
    "attention": (
        "Hadamard attention",
        "Attention of the pretrained model's first ELSA layer around three query points,"
        " averaged over heads.",
    ),
}
STAGE_COMMANDS = {
    "pretrain": "python -m pipelines.commands.evaluate --task classify --weights weights/pretrain",
    "detect": "python -m pipelines.commands.evaluate --task detect --weights weights/detect",
    "segment": "python -m pipelines.commands.evaluate --task segment --weights weights/segment",
}


def draw(name: str, root: str, data: dict[str, DataPlace], samples: int, target: str) -> None:
    """Draw one of `PICTURES` from the stage outputs below `root` into the PNG `target`.

    `data` has the places of the data sets.
    """
    from pipelines.results import figures

    base, results = Path(root), Path(root) / "results"
    coco, ade20k = Path(data["coco"].place), Path(data["ade20k"].place)
    classes = json.loads((base / "data/ade20k/manifest.json").read_text())["classes"]
    worst = name.startswith("worst_")
    if name == "curves":
        figure = figures.curves(
            {
                stage: figures.read_curves(base / "plots" / stage / "curves.csv")
                for stage in ("pretrain", "detect", "segment")
            }
        )
    elif name == "confusion":
        figure = figures.confusion(base / "plots/pretrain/confusion.csv")
    elif name == "reliability":
        figure = figures.reliability(results / "pretrain/predictions.csv")
    elif name == "mistakes":
        images = data["imagenet"].images("val")
        figure = figures.mistakes(images, results / "pretrain/predictions.csv", 2 * samples)
    elif name.endswith("detections"):
        figure = figures.detections(coco, results / "detect", samples, worst)
    elif name.endswith("segmentations"):
        figure = figures.segmentations(ade20k, results / "segment", classes, samples, worst)
    else:
        figure = figures.attention(base / "weights/pretrain", coco)
    figure.savefig(target)


def check(params: Params) -> dict[str, dict[str, Any]]:
    return load_metrics(STAGES)


def run(stage: Stage, metrics: dict[str, dict[str, Any]]) -> None:
    import ray

    from pipelines.run import tracking
    from pipelines.run.display import track
    from pipelines.run.fit import on_this_node

    names = [
        name
        for name in PICTURES
        if name != "confusion" or (ROOT / "plots/pretrain/confusion.csv").exists()
    ]
    pictures = stage.output("reports") / "pictures"
    pictures.mkdir(parents=True)
    task = ray.remote(draw).options(scheduling_strategy=on_this_node())
    data = {name: _place(stage.params, name) for name in ("imagenet", "coco", "ade20k")}
    samples = stage.section.samples
    track(
        [
            task.remote(name, str(ROOT), data, samples, str(pictures / f"{name}.png"))
            for name in names
        ],
        "report",
        "pictures",
    )
    context = _context(stage, metrics)
    _write_html(stage.output("reports") / "index.html", context, pictures)
    _write_markdown(stage.output("reports") / "report.md", context, names)
    stage.tracker.log_artifact(stage.output("reports"))
    summary = {f"{row['stage']}/{row['metric']}": row["number"] for row in context["results"]}
    tracking.end_pipeline(pipeline_name(stage.params), summary)
    stage.write_metrics({"pictures": len(names)})


def _place(params: Params, name: str) -> DataPlace:
    manifest = json.loads((ROOT / "data" / name / "manifest.json").read_text())
    return DataPlace(places.locate(params, name), tuple(manifest.get("skipped", ())))


def _context(stage: Stage, metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    from pipelines.run import tracking

    lineage = []
    for name in STAGES:
        description = ROOT / "weights" / name / "model.json"
        weights = json.loads(description.read_text()) if description.exists() else {}
        upstream = weights.get("upstream")
        lineage.append(
            {
                "stage": name,
                "identity": metrics[name]["identity"],
                "run": metrics[name]["mlflow_run_id"],
                "weights": weights.get("sha256", "")[:12],
                "upstream": _upstream(upstream) if upstream else "",
            }
        )
    git = tracking.git_tags()
    holdout = stage.params.pretrain.holdout
    return {
        "pipeline": pipeline_name(stage.params),
        "recipe": stage.params.recipe,
        "commit": git.get("mlflow.source.git.commit", "unknown")[:12],
        "dirty": git.get("git_dirty") == "true",
        "results": result_rows(metrics, stage.params),
        "choice": (
            f"The classifier is the best epoch on {holdout:.0%} of the training images held out."
            if holdout
            else "The classifier is the best epoch on these images, as is usual with ImageNet."
        ),
        "times": [_cost(name, metrics[name], stage.params) for name in STAGES],
        "total": duration(sum(metrics[name]["wall_time_s"] for name in STAGES)),
        "changed": changed(stage.params),
        "lineage": lineage,
        "ablation": _ablation(),
        "commands": STAGE_COMMANDS,
        "public": stage.params.prepare.source == "public",
    }


def _ablation() -> dict[str, Any] | None:
    """What the last sweep in this workspace found; None where there was none."""
    comparison, summary = ROOT / "sweeps/comparison.json", ROOT / "metrics/sweep.json"
    if not (comparison.exists() and summary.exists()):
        return None
    found, sweep = json.loads(comparison.read_text()), json.loads(summary.read_text())
    rows = [
        {
            "point": row["point"],
            "runs": row["runs"],
            "score": f"{row['mean']:.1f}" + (f" ± {row['ci95']:.1f}" if row["ci95"] else ""),
            "verdict": (
                verdict(row, found["reference"]) if "difference" in row else "the reference"
            ),
        }
        for row in found["rows"]
    ]
    return {"metric": found["metric"], "rows": rows, "sweep": sweep}


def _cost(name: str, metrics: dict[str, Any], params: Params) -> dict[str, str]:
    hours = metrics["wall_time_s"] / 3600 * params.scaling.num_workers
    trained = "images_per_second" in metrics
    return {
        "stage": name,
        "time": duration(metrics["wall_time_s"]),
        "rate": f"{metrics['images_per_second']:.0f}" if trained else "",
        "gpu_hours": f"{hours:.2f}" if trained and params.scaling.use_gpu else "",
        "energy": f"{metrics['energy_wh'] / 1000:.2f}" if "energy_wh" in metrics else "",
    }


def _upstream(upstream: dict[str, Any]) -> str:
    scores = ", ".join(
        f"{k} {v:.2f}" for k, v in upstream["metrics"].items() if isinstance(v, float)
    )
    return f"{upstream['sha256'][:12]} of run {upstream['mlflow_run_id'][:12]} ({scores})"


def _write_html(target: Path, context: dict[str, Any], pictures: Path) -> None:
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(ROOT / "pipelines"), autoescape=True)
    drawn = [
        {"title": title, "caption": caption, "data": _base64(pictures / f"{name}.png")}
        for name, (title, caption) in PICTURES.items()
        if (pictures / f"{name}.png").exists()
    ]
    cards = [
        {"name": card.stem, "text": card.read_text(), "data": _base64(card.with_suffix(".png"))}
        for card in sorted((ROOT / "data/cards").glob("*.md"))
    ]
    page = environment.get_template("report.html.jinja")
    target.write_text(page.render(**context, pictures=drawn, cards=cards))


def _write_markdown(target: Path, context: dict[str, Any], names: list[str]) -> None:
    lines = [
        f"# ELSA pipeline: {context['pipeline']}",
        "",
        f"Recipe `{context['recipe']}`, commit `{context['commit']}`"
        + (" with uncommitted changes." if context["dirty"] else "."),
        "",
        "| task | metric | value |",
        "|---|---|---:|",
        *(f"| {row['task']} | {row['metric']} | {row['value']} |" for row in context["results"]),
        "",
        f"Percent, on the validation images. {context['choice']}",
        "",
        "| stage | wall time | images/s | identity | MLflow run | started from |",
        "|---|---:|---:|---|---|---|",
        *(
            f"| {time['stage']} | {time['time']} | {time['rate']} | `{line['identity']}`"
            f" | `{line['run']}` | {line['upstream']} |"
            for time, line in zip(context["times"], context["lineage"], strict=True)
        ),
        "",
        *_ablation_lines(context["ablation"]),
        *(f"![{PICTURES[name][0]}](pictures/{name}.png)\n" for name in names),
    ]
    target.write_text("\n".join(lines))


def _ablation_lines(ablation: dict[str, Any] | None) -> list[str]:
    if ablation is None:
        return []
    sweep = ablation["sweep"]
    return [
        f"Sweep `{sweep['space']}` (MLflow run `{sweep['mlflow_run_id']}`), 95% intervals:",
        "",
        f"| point | runs | {ablation['metric']} | finding |",
        "|---|---:|---:|---|",
        *(
            f"| {row['point']} | {row['runs']} | {row['score']} | {row['verdict']} |"
            for row in ablation["rows"]
        ),
        "",
    ]


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


if __name__ == "__main__":
    run_stage("report", __doc__ or "", run, check)
