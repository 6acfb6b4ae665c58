"""Show the results on the terminal: `python -m pipelines.commands.summary`."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.errors import PipelineError
from pipelines.params import Downstream, Params, load_params
from pipelines.paths import ROOT
from pipelines.results.published import compare

STAGES = ("prepare", "build_op", "pretrain", "detect", "segment")
TASKS = {"pretrain": "classify", "detect": "detect", "segment": "segment"}
PUBLIC_CLASSES = {"pretrain": 1000, "detect": 80, "segment": 150}
"""Of ImageNet-1K, COCO and ADE20K: results on other classes are compared with nothing."""

RESULTS = (
    ("pretrain", "classification (ImageNet layout)", ("top1", "top5")),
    (
        "detect",
        "detection and masks (COCO layout)",
        ("bbox_mAP", "bbox_mAP_50", "segm_mAP", "segm_mAP_50"),
    ),
    ("segment", "segmentation (ADE20K layout)", ("mIoU", "mIoU_ms_flip", "aAcc")),
)


def load_metrics(stages: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`metrics/<stage>.json` of each stage.

    Raises:
        PipelineError: a stage has not run.
    """
    missing = [name for name in stages if not (ROOT / f"metrics/{name}.json").exists()]
    if missing:
        raise PipelineError(f"no metrics of {', '.join(missing)} yet: run `dvc repro`")
    return {name: json.loads((ROOT / f"metrics/{name}.json").read_text()) for name in stages}


def result_rows(metrics: dict[str, dict[str, Any]], params: Params) -> list[dict[str, Any]]:
    """Rows of the results table: stage, task, metric, number, value and published (as shown).

    `published` is empty where the paper has no number for this model, data, method and schedule.
    """
    rows = []
    for stage, task, keys in RESULTS:
        published = published_beside(metrics[stage], stage, params)
        rows += [
            {
                "stage": stage,
                "task": task,
                "metric": key,
                "number": metrics[stage][key],
                "value": f"{metrics[stage][key]:.1f}",
                "published": published.get(key, ""),
            }
            for key in keys
        ]
    return rows


def published_beside(metrics: Mapping[str, Any], stage: str, params: Params) -> dict[str, str]:
    """By metric: the published number, the difference, and whether that is within tolerance.

    Args:
        metrics: ours, of `stage` (`pretrain`, `detect` or `segment`), in percent.
    """
    section = getattr(params, stage)
    if params.model.overrides() or section.num_classes != PUBLIC_CLASSES[stage]:
        return {}
    how = {}
    if isinstance(section, Downstream):
        how = {"method": section.method, "schedule": section.schedule}
    found = compare(metrics, model=params.model.name, task=TASKS[stage], **how)
    return {
        one.published.metric: f"{one.published.value:.1f} ({one.difference:+.1f}, "
        f"{'within' if one.within else 'not within'} {one.published.tolerance})"
        for one in found
    }


def duration(seconds: float) -> str:
    """Minutes and seconds, as in `4:05`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m pipelines.commands.summary",
        description="Show the results of the last run, and where to look further.",
    ).parse_args()
    try:
        metrics = load_metrics(STAGES)
        rows = result_rows(metrics, load_params())
    except PipelineError as error:
        sys.exit(f"error: {error}")
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("task", "metric", title="Results (percent, validation images)")
    table.add_column("value", justify="right")
    compared = any(row["published"] for row in rows)
    if compared:
        table.add_column("published")
    for row in rows:
        shown = [row["published"]] if compared else []
        table.add_row(row["task"], row["metric"], row["value"], *shown)
    console.print(table)
    times = "  ".join(f"{name} {duration(metrics[name]['wall_time_s'])}" for name in STAGES)
    console.print(f"Wall time: {times}", highlight=False)
    console.print("Report:    reports/index.html", highlight=False)
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    where = "your MLflow server" if uri else "`make ui`, then http://127.0.0.1:5000"
    console.print(f"MLflow UI: {where}", highlight=False)


if __name__ == "__main__":
    main()
