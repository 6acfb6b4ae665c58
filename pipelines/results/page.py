"""The report's page, and its twin in Markdown."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.results.tables import ResultRow

Ablation = Mapping[str, Any]
"""What the last sweep found: `metric`, `rows` (point, runs, score, verdict) and `sweep`, its
metrics."""


@dataclass(frozen=True)
class StageRow:
    """What is known of a stage that ran; empty where there is nothing to say."""

    stage: str
    time: str
    quoted: str
    """The time that was expected, and between which times."""
    cost: str
    """In money, and as it was quoted."""
    rate: str
    """Training images/s."""
    gpu_hours: str
    energy: str
    """kWh of the GPUs."""
    identity: str
    run: str
    """Of MLflow."""
    weights: str
    upstream: str
    """Which weights it started from."""


@dataclass(frozen=True)
class Drawn:
    """A picture of the page."""

    name: str
    title: str
    caption: str


@dataclass(frozen=True)
class Page:
    """What the report shows."""

    pipeline: str
    recipe: str
    commit: str
    dirty: bool
    public: bool
    """The data sets are not the demo's."""
    results: Sequence[ResultRow]
    choice: str
    """How the reported weights were chosen."""
    stages: Sequence[StageRow]
    total: str
    """Wall time of all stages."""
    changed: Mapping[str, tuple[Any, Any]]
    """What differs from the recipe."""
    ablation: Ablation | None
    commands: Sequence[str]
    """That repeat the numbers from the weights."""
    pictures: Sequence[Drawn]


def write_html(target: Path, page: Page, pictures: Path, cards: Path) -> None:
    """Write the page, with all pictures in it.

    Args:
        pictures: folder of `<name>.png`.
        cards: folder of the data cards, `<name>.md` and `.png`.
    """
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    drawn = [
        {"title": one.title, "caption": one.caption, "data": _base64(pictures / f"{one.name}.png")}
        for one in page.pictures
    ]
    found = [
        {"name": card.stem, "text": card.read_text(), "data": _base64(card.with_suffix(".png"))}
        for card in sorted(cards.glob("*.md"))
    ]
    values = vars(page) | {"pictures": drawn, "cards": found}
    values |= {"times": page.stages, "lineage": page.stages}
    target.write_text(environment.get_template("page.html.jinja").render(**values))


def write_markdown(target: Path, page: Page) -> None:
    """Write the twin in Markdown, beside the folder `pictures`."""
    lines = [
        f"# ELSA pipeline: {page.pipeline}",
        "",
        f"Recipe `{page.recipe}`, commit `{page.commit}`"
        + (" with uncommitted changes." if page.dirty else "."),
        "",
        "| task | metric | value |",
        "|---|---|---:|",
        *(f"| {row.task} | {row.metric} | {row.value} |" for row in page.results),
        "",
        f"Percent, on the validation images. {page.choice}",
        "",
        *_stage_lines(page.stages),
        "",
        *_ablation_lines(page.ablation),
        *(f"![{one.title}](pictures/{one.name}.png)\n" for one in page.pictures),
    ]
    target.write_text("\n".join(lines))


def _stage_lines(stages: Sequence[StageRow]) -> list[str]:
    """The table of the stages, with what was quoted and what it cost if that is known of one."""
    named = {"quoted": "quoted (95% within)", "cost": "cost"}
    known = [key for key in named if any(getattr(row, key) for row in stages)]
    more = "".join(f" {named[key]} |" for key in known)
    return [
        f"| stage | wall time |{more} images/s | identity | MLflow run | started from |",
        f"|---|---:|{'---:|' * len(known)}---:|---|---|---|",
        *(
            f"| {row.stage} | {row.time} |"
            + "".join(f" {getattr(row, key)} |" for key in known)
            + f" {row.rate} | `{row.identity}` | `{row.run}` | {row.upstream} |"
            for row in stages
        ),
    ]


def _ablation_lines(ablation: Ablation | None) -> list[str]:
    if ablation is None:
        return []
    sweep = ablation["sweep"]
    return [
        f"Sweep `{sweep['space']}` (MLflow run `{sweep['mlflow_run_id']}`), 95% intervals over"
        " seeds: a score's is its own, a difference's holds for all points together.",
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
