"""The page of a sweep."""

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.results import plots
from pipelines.run import tracking
from pipelines.run.stage import StageRun
from pipelines.sweeps.plan import Plan
from pipelines.sweeps.space import Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure
    from optuna.study import Study


@dataclass(frozen=True)
class PagePicture:
    """A plot of the page."""

    group: str
    """`cost`, `parallel`, `factor` or `search`."""
    title: str
    text: str
    alt: str
    data: str
    """PNG in base64."""


def write_page(
    path: Path,
    stage: StageRun,
    plan: Plan,
    comparison: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Write the page, with all of its pictures in it.

    Args:
        facts: `score`, `summary`, `best` (its point), `points_of` (points by label), `trials`,
            `best_yaml` and `champion` (name and version), as the page shows them; `study`,
            Optuna's, or None.
    """
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    )
    reference = comparison["reference"]
    page = environment.get_template("page.html.jinja").render(
        **facts,
        recipe=stage.params.recipe,
        space=plan.space,
        name=stage.section.space,
        fixed={key: json.dumps(value) for key, value in plan.space.fixed.items()},
        seeds=stage.section.seeds,
        comparison=comparison,
        verdicts=[
            f"{row['point']}: {row['finding']}."
            for row in comparison["rows"]
            if row["point"] != reference
        ],
        pictures=[
            *_cost_pictures(comparison),
            *_parameter_pictures(plan, facts["points_of"], comparison),
            *_search_pictures(facts["study"], facts["score"]),
        ],
        sweep_run=stage.tracker.run_id,
        git=tracking.git_tags(),
        data=plan.job.dataset.digest[:12],
    )
    path.write_text(page)


def _cost_pictures(comparison: Mapping[str, Any]) -> Iterator[PagePicture]:
    rows, metric = comparison["rows"], comparison["metric"]
    for cost, (name, scale) in plots.COSTS.items():
        values = "; ".join(
            f"{row['point']}: {row['mean']:.1f} at {row[cost] * scale:.3g}"
            for row in rows
            if row[cost] is not None
        )
        picture = _png(plots.tradeoff(rows, metric, cost))
        yield PagePicture("cost", name, "", f"{metric} by {name}: {values}", picture)


def _parameter_pictures(
    plan: Plan, points: Mapping[str, Point], comparison: Mapping[str, Any]
) -> Iterator[PagePicture]:
    rows, metric = comparison["rows"], comparison["metric"]
    names = dict.fromkeys(name for point in points.values() for name in point)
    varied = [n for n in names if len({json.dumps(p.get(n)) for p in points.values()}) > 1]
    if len(varied) > 1:
        means, named = [row["mean"] for row in rows], [points[row["point"]] for row in rows]
        yield PagePicture(
            "parallel",
            "Parallel coordinates",
            "A line per point; darker ones score higher.",
            f"{metric}: " + "; ".join(f"{row['point']}: {row['mean']:.1f}" for row in rows),
            _png(plots.parallel(varied, named, means, metric)),
        )
    for name in varied:
        if len({json.dumps(p[name]) for p in points.values() if name in p}) < 2:
            continue
        chosen = _slice(name, rows, points, points[comparison["reference"]])
        values = [points[row["point"]][name] for row in chosen]
        shown = zip(values, chosen, strict=True)
        published = plan.space.findings.get(name)
        yield PagePicture(
            "factor",
            name,
            f"Published: {published}" if published else "",
            f"{metric} by {name}: " + "; ".join(f"{v}: {row['mean']:.1f}" for v, row in shown),
            _png(plots.factor(name, values, chosen, metric)),
        )


def _search_pictures(study: "Study | None", score: str) -> Iterator[PagePicture]:
    """Optuna's own plots."""
    if study is None:
        return
    from optuna.importance import get_param_importances
    from optuna.visualization import matplotlib as drawn

    scores = [trial.value for trial in study.get_trials() if trial.value is not None]
    shown = "; ".join(f"{value:.1f}" for value in scores)
    history = drawn.plot_optimization_history(study, target_name=score)
    yield PagePicture("search", "History", "", f"{score} by trial: {shown}", _png(history.figure))
    if len(set(scores)) > 1:
        shares = "; ".join(f"{k}: {v:.2f}" for k, v in get_param_importances(study).items())
        chart = drawn.plot_param_importances(study, target_name=score)
        text = "How much of the variance of the scores a parameter explains, by fANOVA."
        yield PagePicture("search", "Importance", text, shares, _png(chart.figure))


def _slice(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    points: Mapping[str, Point],
    reference: Point,
) -> list[Mapping[str, Any]]:
    """Points that differ from the reference in one parameter; all that have it where there are no
    two such, as in a random search."""
    having = [row for row in rows if name in points[row["point"]]]
    chosen = [row for row in having if _alike(points[row["point"]], reference, name)]
    return chosen if len(chosen) > 1 else having


def _alike(point: Point, reference: Point, but: str) -> bool:
    """The same as the reference in all parameters that both name."""
    return all(point[k] == reference[k] for k in point.keys() & reference.keys() - {but})


def _png(figure: "Figure | SubFigure") -> str:
    data = io.BytesIO()
    figure.figure.savefig(data, format="png")
    return base64.b64encode(data.getvalue()).decode()
