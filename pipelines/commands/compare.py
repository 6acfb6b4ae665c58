"""Compare runs in MLflow over their seeds: mean, 95% interval, and difference to a reference."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import PipelineError
from pipelines.results.comparison import Scored, compare, markdown, write_comparison
from pipelines.results.sequential import Design
from pipelines.run import tracking
from pipelines.run.tracking import RunRecord
from pipelines.run.tracking_uri import tracking_uri
from pipelines.tasks import TASKS

UI = "http://127.0.0.1:5000"


def compare_runs(runs: Sequence[str], sweep: str | None, metric: str | None, out: Path) -> None:
    """Print a comparison and write it to the folder `out`.

    Args:
        runs: ids of MLflow runs; or
        sweep: a space: all trials of its last sweep.
        metric: of the runs, without `final/`; None takes that of their task.

    Raises:
        PipelineError: there are no such runs, or they have no metric in common.
    """
    tracking.ping(tracking_uri())
    comparison = of_sweep(sweep, metric) if sweep else _of_runs(runs, metric)
    write_comparison(comparison, out)
    print(markdown(comparison))
    print(f"Also in {out}: comparison.md, .csv, .json")


def of_sweep(name: str | None, metric: str | None = None) -> dict[str, Any]:
    """The comparison of the last sweep of a space.

    Raises:
        PipelineError: there is no such sweep, or none of its trials has finished.
    """
    sweep = tracking.find_sweep(name)
    if sweep is None:
        raise PipelineError(
            f"no sweep{f' of space {name}' if name else ''} at {tracking_uri()}",
            f"Run `dvc repro sweep`, or `dvc exp run sweep -S sweep.space={name or '...'}`",
        )
    judged = {f"final/{task.metric}" for task in TASKS.values()}
    trials = tracking.sweep_trials(sweep.run_id)
    labels = {run.run_id: json.loads(run.tags["sweeps"])[sweep.run_id] for run in trials}
    runs = [run for run in trials if judged & run.metrics.keys()]
    design = Design(
        comparisons=max(len(set(labels.values())) - 1, 1),
        seeds=int(sweep.params["sweep.seeds"]),
        smallest=float(sweep.params.get("sweep.smallest_difference", 0)),
    )
    return _compare(runs, metric, labels, sweep.tags.get("reference"), design)


def _of_runs(ids: Sequence[str], metric: str | None) -> dict[str, Any]:
    found = {run_id: tracking.read_run(run_id) for run_id in dict.fromkeys(ids)}
    missing = [run_id for run_id, run in found.items() if run is None]
    if missing:
        raise PipelineError(
            f"no run {', '.join(missing)} at {tracking_uri()}",
            "Ids of MLflow runs are in lineage/*.json (`dvc pull`) and in MLflow's table of runs",
        )
    return _compare([run for run in found.values() if run], metric)


def _compare(
    runs: Sequence[RunRecord],
    metric: str | None,
    labels: dict[str, str] | None = None,
    reference: str | None = None,
    design: Design | None = None,
) -> dict[str, Any]:
    metrics = [task.metric for task in TASKS.values()]
    shared = [name for name in metrics if all(f"final/{name}" in run.metrics for run in runs)]
    if runs and metric is None and not shared:
        raise PipelineError(
            f"the runs have none of the metrics {', '.join(metrics)} in common",
            "Compare finished runs of one stage, or name a metric (--metric)",
        )
    chosen, scored = metric or (shared or [""])[0], [_scored(run) for run in runs]
    return compare(scored, chosen, labels, reference, design)


def _scored(run: RunRecord) -> Scored:
    seed = int(run.params.get(f"{run.tags.get('stage', '')}.seed", 0))
    return Scored(run.run_id, run.name, run.params, run.metrics, seed)


def pages() -> str:
    """What to open of MLflow's interface: all runs, and the trials of the last sweep."""
    tracking.ping(tracking_uri())
    sweep = tracking.find_sweep()
    lines = [f"All runs: {UI}"]
    trials = tracking.sweep_trials(sweep.run_id) if sweep else []
    judged = [t for t in TASKS.values() if any(f"final/{t.metric}" in r.metrics for r in trials)]
    if sweep and judged:
        path = tracking.comparison_path(sweep.run_id, judged[0].metric, judged[0].loop_metric)
        lines.append(f"The last sweep's trials: {UI}{path}")
    return "\n".join(lines)
