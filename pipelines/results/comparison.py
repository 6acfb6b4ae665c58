"""Runs compared over their seeds: mean, 95% interval, difference to a reference, and verdict."""

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import PipelineError
from pipelines.results.sequential import Decision, Design

COST = ("parameters", "gflops", "images_per_second")


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95% interval by Student's t; None for a single value."""
    from scipy.stats import t

    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return mean, None
    return mean, float(t.ppf(0.975, count - 1)) * statistics.stdev(values) / count**0.5


def difference(
    values: Mapping[int, float], others: Mapping[int, float], design: Design
) -> dict[str, Any]:
    """`values` less `others`, by seed: the columns of a row of `compare`.

    Paired where two or more seeds are the same, else by Welch's test, which is one look.
    """
    shared = sorted(values.keys() & others.keys())
    if len(shared) > 1:
        differences = [values[seed] - others[seed] for seed in shared]
        decided = design.decide(differences)
        mean, half, pairs = statistics.fmean(differences), design.half(differences), len(shared)
    else:
        mean = statistics.fmean(values.values()) - statistics.fmean(others.values())
        half, pairs = _welch(values, others, 1 - design.error), 0
        decided = Decision(design.verdict(mean, half), 0, mean, half)
    return {
        "difference": mean,
        "difference_ci95": half,
        "paired_seeds": pairs,
        "verdict": decided.verdict,
        "decided_after": None if decided.verdict == "open" else decided.seeds,
    }


def _welch(
    values: Mapping[int, float], others: Mapping[int, float], confidence: float
) -> float | None:
    from scipy.stats import ttest_ind

    if min(len(values), len(others)) < 2:
        return None
    test = ttest_ind(list(values.values()), list(others.values()), equal_var=False)
    ends = test.confidence_interval(confidence)
    return float(ends.high - ends.low) / 2


@dataclass(frozen=True)
class Scored:
    """A finished run, as the comparison needs it."""

    run_id: str
    name: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    """Final ones, with the prefix `final/`."""
    seed: int


def compare(
    runs: Sequence[Scored],
    metric: str,
    labels: Mapping[str, str] | None = None,
    reference: str | None = None,
    design: Design | None = None,
) -> dict[str, Any]:
    """Runs that differ only in their seed are one row: the metric's mean, and what it costs.

    The intervals of the differences hold for all rows together.

    Args:
        runs: finished ones.
        labels: the name of each run's row, by run id; by default the parameters that differ.
        reference: the row that the others are compared with; by default the first.
        design: of a sweep; by default that of these runs, where any difference matters.

    Raises:
        PipelineError: no runs, or one without the metric.
    """
    if not runs:
        raise PipelineError("there are no finished runs to compare")
    for run in runs:
        if f"final/{metric}" not in run.metrics:
            raise PipelineError(f"run {run.run_id} ({run.name}) has no metric {metric}")
    names = sorted({n for run in runs for n in run.params if not n.endswith(".seed")})
    varying = [n for n in names if len({run.params.get(n, "None") for run in runs}) > 1]
    groups: dict[str, list[Scored]] = {}
    for run in runs:
        own = " ".join(f"{n.rsplit('.', 1)[-1]}={run.params.get(n, 'None')}" for n in varying)
        groups.setdefault(labels[run.run_id] if labels else own or "all", []).append(run)
    if reference not in groups:
        reference = next(iter(groups))
    scores = {
        name: {run.seed: run.metrics[f"final/{metric}"] for run in group}
        for name, group in groups.items()
    }
    design = design or Design(max(len(groups) - 1, 1), max(map(len, scores.values())))
    rows = []
    for name, group in groups.items():
        row = _row(name, group, scores[name], varying)
        if name != reference:
            row |= difference(scores[name], scores[reference], design)
            row["finding"] = _finding(row, reference)
        rows.append(row)
    return {"metric": metric, "reference": reference, "rows": rows}


def _row(
    name: str, group: Sequence[Scored], scores: Mapping[int, float], varying: Sequence[str]
) -> dict[str, Any]:
    mean, half = interval(list(scores.values()))
    row: dict[str, Any] = {"point": name, "runs": len(scores), "mean": mean, "ci95": half}
    for key in COST:
        known = [r.metrics[f"final/{key}"] for r in group if f"final/{key}" in r.metrics]
        row[key] = statistics.fmean(known) if known else None
    row["params"] = {n: group[0].params.get(n) for n in varying}
    row["seeds"] = {str(seed): value for seed, value in sorted(scores.items())}
    row["run_ids"] = [run.run_id for run in group]
    return row


def _finding(row: Mapping[str, Any], reference: str) -> str:
    """One sentence on a row of `compare`, other than the reference's."""
    half, runs = row["difference_ci95"], row["runs"]
    after = f"after {runs} seed{'s' if runs > 1 else ''}"
    if half is None:
        return f"{row['difference']:+.1f} to {reference} {after}: no interval"
    span = f"{row['difference']:+.1f} ± {half:.1f} to {reference}"
    if row["verdict"] == "open":
        return f"{span} {after}: open"
    if decided := row["decided_after"]:
        after = f"decided after {decided} seeds"
    return f"{span}: {row['verdict']}, {after}"


def markdown(comparison: Mapping[str, Any]) -> str:
    """The comparison as a table."""
    lines = [
        f"| point | runs | {comparison['metric']} | ± 95% | difference | ± 95%, all rows |"
        " verdict | parameters, M | GFLOPs | images/s |",
        "|---|---:|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for row in comparison["rows"]:
        cells = [
            row["point"],
            row["runs"],
            _number(row["mean"], 1),
            _number(row["ci95"], 1),
            _number(row.get("difference"), 1, "+") if "difference" in row else "reference",
            _number(row.get("difference_ci95"), 1),
            row.get("verdict", ""),
            _number(row["parameters"] and row["parameters"] / 1e6, 2),
            _number(row["gflops"], 3),
            _number(row["images_per_second"], 0),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.{digits}f}"


def write_comparison(comparison: Mapping[str, Any], folder: Path) -> None:
    """`comparison.md`, `.csv` and `.json` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.md").write_text(markdown(comparison))
    (folder / "comparison.json").write_text(json.dumps(comparison, indent=2) + "\n")
    names = list(comparison["rows"][0]["params"])
    columns = ["mean", "ci95", "difference", "difference_ci95", "paired_seeds", "verdict", *COST]
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["point", *names, "runs", *columns])
    for row in comparison["rows"]:
        values = [row["params"][name] for name in names]
        table.writerow([row["point"], *values, row["runs"], *(row.get(c) for c in columns)])
    (folder / "comparison.csv").write_text(text.getvalue())
