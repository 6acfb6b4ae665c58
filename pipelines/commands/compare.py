"""Compare runs in MLflow over their seeds: mean, 95% interval, and difference to a reference.

python -m pipelines.commands.compare RUN RUN ...   # ids of MLflow runs
python -m pipelines.commands.compare --sweep demo  # all trials of the last sweep of a space
"""

import argparse
import csv
import io
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import PipelineError
from pipelines.paths import ROOT

if TYPE_CHECKING:
    from pipelines.run.tracking import RunRecord

METRICS = ("top1", "bbox_mAP", "mIoU")
"""What a run is judged by: the first of these that it has."""
COST = ("parameters", "gflops", "images_per_second")
SEEDS = ("pretrain.seed", "detect.seed", "segment.seed")
UI = "http://127.0.0.1:5000"


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95% interval by Student's t; None for a single value."""
    from scipy.stats import t

    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return mean, None
    return mean, float(t.ppf(0.975, count - 1)) * statistics.stdev(values) / count**0.5


def difference(
    values: Mapping[int, float], others: Mapping[int, float]
) -> tuple[float, float | None, int]:
    """Mean of `values` less that of `others`, by seed; half its 95% interval; how many seeds pair.

    Paired where two or more seeds are the same, else Welch's interval.
    """
    from scipy.stats import ttest_ind

    shared = sorted(values.keys() & others.keys())
    if len(shared) > 1:
        return *interval([values[seed] - others[seed] for seed in shared]), len(shared)
    mean = statistics.fmean(values.values()) - statistics.fmean(others.values())
    if min(len(values), len(others)) < 2:
        return mean, None, 0
    test = ttest_ind(list(values.values()), list(others.values()), equal_var=False)
    ends = test.confidence_interval(0.95)
    return mean, float(ends.high - ends.low) / 2, 0


def compare(
    runs: Sequence["RunRecord"],
    labels: Mapping[str, str] | None = None,
    reference: str | None = None,
    metric: str | None = None,
) -> dict[str, Any]:
    """Runs that differ only in their seed are one row: the metric's mean, and what it costs.

    Args:
        runs: finished ones.
        labels: the name of each run's row, by run id; by default the parameters that differ.
        reference: the row that the others are compared with; by default the first.

    Raises:
        PipelineError: no runs, or none of the metrics in all of them.
    """
    if not runs:
        raise PipelineError("there are no finished runs to compare")
    shared = [m for m in METRICS if all(f"final/{m}" in run.metrics for run in runs)]
    if metric is None and not shared:
        raise PipelineError(
            f"the runs share none of the metrics {', '.join(METRICS)}; compare finished runs of"
            " one stage, or name a metric (--metric)"
        )
    metric = metric or shared[0]
    for run in runs:
        if f"final/{metric}" not in run.metrics:
            raise PipelineError(f"run {run.run_id} ({run.name}) has no metric {metric}")
    names = sorted({name for run in runs for name in run.params} - set(SEEDS))
    varying = [n for n in names if len({run.params.get(n, "None") for run in runs}) > 1]

    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        own = " ".join(f"{n.rsplit('.', 1)[-1]}={run.params.get(n, 'None')}" for n in varying)
        groups.setdefault(labels[run.run_id] if labels else own or "all", []).append(run)
    if reference not in groups:
        reference = next(iter(groups))
    scores = {
        name: {_seed(run): run.metrics[f"final/{metric}"] for run in group}
        for name, group in groups.items()
    }
    rows = []
    for name, group in groups.items():
        mean, half = interval(list(scores[name].values()))
        row: dict[str, Any] = {"point": name, "runs": len(scores[name]), "mean": mean, "ci95": half}
        if name != reference:
            row["difference"], row["difference_ci95"], row["paired_seeds"] = difference(
                scores[name], scores[reference]
            )
        for key in COST:
            known = [r.metrics[f"final/{key}"] for r in group if f"final/{key}" in r.metrics]
            row[key] = statistics.fmean(known) if known else None
        row["params"] = {n: group[0].params.get(n) for n in varying}
        row["seeds"] = {str(seed): value for seed, value in sorted(scores[name].items())}
        row["run_ids"] = [run.run_id for run in group]
        rows.append(row)
    return {"metric": metric, "reference": reference, "rows": rows}


def _seed(run: "RunRecord") -> int:
    return next((int(run.params[name]) for name in SEEDS if name in run.params), 0)


def verdict(row: Mapping[str, Any], reference: str) -> str:
    """One sentence on a row of `compare`, other than the reference's."""
    half = row["difference_ci95"]
    if half is None:
        return f"{row['difference']:+.1f} to {reference}, at one seed: no interval"
    span = f"{row['difference']:+.1f} ± {half:.1f} to {reference}"
    if abs(row["difference"]) > half:
        return f"{span}: {'better' if row['difference'] > 0 else 'worse'}"
    return f"{span}: no difference shown"


def markdown(comparison: Mapping[str, Any]) -> str:
    """The comparison as a table."""
    lines = [
        f"| point | runs | {comparison['metric']} | ± 95% | difference | ± 95% |"
        " parameters, M | GFLOPs | images/s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in comparison["rows"]:
        cells = [
            row["point"],
            row["runs"],
            _number(row["mean"], 1),
            _number(row["ci95"], 1),
            _number(row.get("difference"), 1, "+") if "difference" in row else "reference",
            _number(row.get("difference_ci95"), 1),
            _number(row["parameters"] and row["parameters"] / 1e6, 2),
            _number(row["gflops"], 3),
            _number(row["images_per_second"], 0),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.{digits}f}"


def write(comparison: Mapping[str, Any], folder: Path) -> None:
    """`comparison.md`, `.csv` and `.json` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.md").write_text(markdown(comparison))
    (folder / "comparison.json").write_text(json.dumps(comparison, indent=2) + "\n")
    names = list(comparison["rows"][0]["params"])
    columns = ["mean", "ci95", "difference", "difference_ci95", "paired_seeds", *COST]
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["point", *names, "runs", *columns])
    for row in comparison["rows"]:
        values = [row["params"][name] for name in names]
        table.writerow([row["point"], *values, row["runs"], *(row.get(c) for c in columns)])
    (folder / "comparison.csv").write_text(text.getvalue())


def of_sweep(name: str | None, metric: str | None = None) -> dict[str, Any]:
    """The comparison of the last sweep of a space.

    Raises:
        PipelineError: there is no such sweep, or none of its trials has finished.
    """
    from pipelines.run import tracking

    sweep = tracking.find_sweep(name)
    if sweep is None:
        raise PipelineError(
            f"no sweep{f' of space {name}' if name else ''} at {tracking.tracking_uri()}:"
            f" run `dvc repro sweep`, or `dvc exp run sweep -S sweep.space={name or '...'}`"
        )
    judged = {f"final/{name}" for name in METRICS}
    runs = [r for r in tracking.sweep_trials(sweep.run_id) if judged & r.metrics.keys()]
    labels = {run.run_id: json.loads(run.tags["sweeps"])[sweep.run_id] for run in runs}
    return compare(runs, labels, sweep.tags.get("reference"), metric)


def _of_runs(ids: Sequence[str], metric: str | None) -> dict[str, Any]:
    from pipelines.run import tracking

    found = {run_id: tracking.read_run(run_id) for run_id in dict.fromkeys(ids)}
    missing = [run_id for run_id, run in found.items() if run is None]
    if missing:
        raise PipelineError(
            f"no run {', '.join(missing)} at {tracking.tracking_uri()}: ids of MLflow runs are in"
            " metrics/*.json and in MLflow's table of runs"
        )
    return compare([run for run in found.values() if run], metric=metric)


def _where() -> str:
    """What to open: MLflow's page, and the last sweep's trials in it if there was one."""
    from pipelines.run import tracking

    sweep = tracking.find_sweep()
    lines = [f"All runs: {UI}"]
    trials = tracking.sweep_trials(sweep.run_id) if sweep else []
    judged = [m for m in METRICS if any(f"final/{m}" in run.metrics for run in trials)]
    if sweep and judged:
        path = tracking.comparison_path(sweep.run_id, judged[0])
        lines.append(f"The last sweep's trials: {UI}{path}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.commands.compare", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="id of an MLflow run")
    parser.add_argument("--sweep", metavar="NAME", help="a space: all trials of its last sweep")
    parser.add_argument("--metric", help=f"default: the first of {', '.join(METRICS)} they have")
    parser.add_argument("--out", type=Path, default=ROOT / "comparison", help="default: comparison")
    parser.add_argument("--url", action="store_true", help="only print what to open in `make ui`")
    arguments = parser.parse_args()
    if not arguments.url and bool(arguments.runs) == bool(arguments.sweep):
        parser.error("give ids of runs, or --sweep NAME")
    from pipelines.run import tracking

    try:
        tracking.ping(tracking.tracking_uri())
        if arguments.url:
            print(_where())
            return
        comparison = (
            of_sweep(arguments.sweep, arguments.metric)
            if arguments.sweep
            else _of_runs(arguments.runs, arguments.metric)
        )
    except PipelineError as error:
        sys.exit(f"error: compare: {error}")
    write(comparison, arguments.out)
    print(markdown(comparison))
    print(f"Also in {arguments.out}: comparison.md, .csv, .json")


if __name__ == "__main__":
    main()
