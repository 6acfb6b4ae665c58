"""List the published results: recipe, command, number, and ours if there is one."""

from collections import defaultdict
from collections.abc import Sequence
from functools import cache

from rich.console import Console
from rich.table import Table

from pipelines.errors import PipelineError
from pipelines.params import ParamsError, compose, load_params, recipe_names
from pipelines.paths import ROOT
from pipelines.results.published import (
    OTHER_RECIPES,
    Published,
    compare,
    load_published,
    sources,
)
from pipelines.results.tables import load_metrics
from pipelines.tasks import TASKS

Row = tuple[str, str, str | None, str | None]
"""Model, task, method and schedule."""

NOTES = """\
Each command needs the data of its tasks: -S data.imagenet=... -S data.coco=... -S data.ade20k=...
  One GPU           -S scaling.num_workers=1: each step's 8 shares after each other, the same
                    result. With SyncBN (UPerNet, Cascade Mask R-CNN 3x) -S STAGE.shares=1 as well
  Two nodes of 8    -S scaling.num_workers=16 -S pretrain.shares=16, and likewise for detect and
                    segment (ELSA-Swin-B: 64 images on each GPU)
  Without ImageNet  leave classify out of tasks; -S detect.weights=FILE or -S segment.weights=FILE
  What it takes     elsa plan, with the words after each -S of the command
  A checkpoint      elsa evaluate --task classify --weights FILE [--recipe RECIPE] [--no-ema]
  bfloat16          -S precision=bfloat16 (published: float16, and segmentation in float32)"""


@cache
def recipes() -> dict[str, str]:
    """The published recipe of each model."""
    others = ("demo", "smoke", "finetune", *OTHER_RECIPES)
    names = [name for name in recipe_names() if name not in others]
    return {compose([f"recipe={name}"]).model.name: name for name in names}


def command_for(row: Row) -> str:
    """The command that trains for a published row, from ImageNet on."""
    model, task, method, schedule = row
    words = [f"recipe={recipes()[model]}"]
    if task != "classify":
        words.append(f"{TASKS[task].stage}={method}_{schedule}")
    tasks = ["classify"] if task == "classify" else ["classify", task]
    words.append(f"'tasks=[{','.join(tasks)}]'")
    return " ".join(["dvc exp run report", *(f"-S {word}" for word in words)])


def grouped(rows: Sequence[Published]) -> dict[Row, list[Published]]:
    """The published numbers of each model, task, method and schedule."""
    groups: dict[Row, list[Published]] = defaultdict(list)
    for row in rows:
        groups[row.model, row.task, row.method, row.schedule].append(row)
    return groups


def ours(row: Row) -> str:
    """What `metrics/` holds of a row if params.yaml is about it; else empty."""
    model, name, method, schedule = row
    try:
        params = load_params()
        task = TASKS[name]
        facts = task.facts(params)
        found = load_metrics(ROOT, [task.stage])[task.stage] if name in params.tasks else {}
    except (ParamsError, PipelineError, KeyError):
        return ""
    same = {"method": method, "schedule": schedule} if method else {}
    if facts.model != model or dict(facts.published_as) != same:
        return ""
    compared = compare(found, model=model, task=name, evaluated=facts.evaluated, **same)
    return "\n".join(f"{one.published.metric} {one.ours:.1f}, {one.verdict}" for one in compared)


def show_published(prefix: str) -> None:
    """Print the table, the commands and what they may be combined with.

    Raises:
        PipelineError: no model has a name that begins so.
    """
    groups = grouped([row for row in load_published() if row.model.startswith(prefix)])
    if not groups:
        known = sorted({row.model for row in load_published()})
        raise PipelineError(f"--model {prefix}: no such model", f"Choose one of {', '.join(known)}")
    console = Console()
    table = Table("", "model", "task", "published (percent)", "ours")
    commands = []
    for number, (row, numbers) in enumerate(groups.items(), 1):
        model, task, method, schedule = row
        shown = "\n".join(f"{one.metric} {one.value:.1f} ({one.source})" for one in numbers)
        what = f"{task} {method} {schedule}" if method else task
        table.add_row(str(number), model, what, shown, ours(row))
        commands.append(f"{number:3}  {command_for(row)}")
    console.print(table)
    for key, text in sources().items():
        console.print(f"  {key}: {text}", highlight=False)
    print("\n" + "\n".join(commands) + "\n\n" + NOTES)
