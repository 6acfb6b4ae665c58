"""Rows of results, as the terminal and the report show them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import PipelineError
from pipelines.results.published import compare


@dataclass(frozen=True)
class TaskFacts:
    """What a table needs to know of a task of the pipeline."""

    name: str
    stage: str
    title: str
    reported: tuple[str, ...]
    """Metrics in the order of the table."""
    model: str
    """timm's name; empty where the model is not a published one, or has other classes."""
    published_as: Mapping[str, str]
    """Method and schedule of the published rows."""
    evaluated: bool = False
    """The weights were given, and only evaluated."""


@dataclass(frozen=True)
class ResultRow:
    """One metric of one task."""

    stage: str
    task: str
    metric: str
    number: float
    """Percent."""
    published: str
    """The published number beside ours; empty where there is none."""

    @property
    def value(self) -> str:
        """As it is shown."""
        return f"{self.number:.1f}"


def load_metrics(root: Path, stages: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`metrics/<stage>.json` of each stage that was not left out.

    Raises:
        PipelineError: a stage has not run.
    """
    files = {name: root / f"metrics/{name}.json" for name in stages}
    missing = [name for name, file in files.items() if not file.exists()]
    if missing:
        raise PipelineError(f"there are no metrics of {', '.join(missing)}", "Run `dvc repro`")
    found = {name: json.loads(file.read_text()) for name, file in files.items()}
    return {name: values for name, values in found.items() if not values.get("left_out")}


def load_lineage(root: Path, stage: str) -> dict[str, str]:
    """`lineage/<stage>.json`: identity, MLflow run and what else tells where a result is from."""
    lineage: dict[str, str] = json.loads((root / f"lineage/{stage}.json").read_text())
    return lineage


def result_rows(
    tasks: Sequence[TaskFacts], metrics: Mapping[str, Mapping[str, Any]]
) -> list[ResultRow]:
    """Rows of the results table, of the tasks that have metrics."""
    rows = []
    for task in tasks:
        if task.stage not in metrics:
            continue
        values = metrics[task.stage]
        published = published_beside(values, task)
        rows += [
            ResultRow(task.stage, task.title, key, values[key], published.get(key, ""))
            for key in task.reported
            if key in values
        ]
    return rows


def published_beside(metrics: Mapping[str, Any], task: TaskFacts) -> dict[str, str]:
    """By metric: the published number, the difference, and whether ours reaches it.

    Args:
        metrics: ours, in percent.
    """
    if not task.model:
        return {}
    found = compare(
        metrics,
        model=task.model,
        task=task.name,
        evaluated=task.evaluated,
        **task.published_as,
    )
    return {
        one.published.metric: f"{one.published.value:.1f} ({one.difference:+.1f}, {one.verdict})"
        for one in found
    }


def duration(seconds: float) -> str:
    """Minutes and seconds, as in `4:05`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
