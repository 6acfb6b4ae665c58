"""What a sweep leaves: the comparison of its points, the best one, a page, and all trials."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.errors import PipelineError
from pipelines.results.comparison import Scored, compare, markdown, write_comparison
from pipelines.results.scores import write_csv
from pipelines.run import tracking
from pipelines.run.stage import StageRun
from pipelines.run.tracking import RunRecord
from pipelines.sweeps.champion import Champion, best_yaml, register_champion
from pipelines.sweeps.page import write_page
from pipelines.sweeps.plan import Plan
from pipelines.sweeps.queue import Outcome, Trials


def write_findings(stage: StageRun, plan: Plan, trials: Trials, folder: Path) -> None:
    """Write all outputs of the stage into `folder`.

    Raises:
        PipelineError: no trial finished.
    """
    outcomes = list(trials.outcomes.values())
    if unfinished := [o for o in outcomes if o.state == "running"]:
        raise RuntimeError(f"Ray Tune ended without a result of {unfinished[0].trial.label}")
    finished = {o.run_id: o for o in outcomes if o.state == "finished"}
    if not finished:
        reasons = "; ".join(dict.fromkeys(o.reason for o in outcomes if o.reason))
        raise PipelineError(f"no trial finished: {reasons or 'the budget is too small for one'}")
    runs = [run for run in (tracking.read_run(run_id) for run_id in finished) if run]
    comparison = _compare(plan, trials, runs, finished)
    write_comparison(comparison, folder)
    champion = _choose(comparison, trials.score, finished)
    (folder / "best.yaml").write_text(best_yaml(stage, plan, champion))
    rows = _trial_rows(outcomes, runs, plan.task.metric)
    write_csv(folder / "trials.csv", rows)
    version = register_champion(stage, plan, champion, folder)
    summary = _summary(plan, trials, comparison, champion)
    write_page(
        folder / "sweep.html",
        stage,
        plan,
        comparison,
        {
            "score": trials.score,
            "summary": summary,
            "best": champion.row["point"],
            "points_of": {o.trial.label: o.trial.point for o in outcomes},
            "trials": rows,
            "best_yaml": (folder / "best.yaml").read_text(),
            "champion": version,
            "study": trials.study.study if trials.study else None,
        },
    )
    stage.tracker.log_artifact(folder, "sweeps")
    stage.write_metrics(
        summary,
        space=stage.section.space,
        reference=comparison["reference"],
        best=champion.row["point"],
    )
    print(markdown(comparison))


def scored(run: RunRecord, stage: str) -> Scored:
    """A run of a training stage, as a comparison needs it."""
    seed = int(run.params.get(f"{stage}.seed", 0))
    return Scored(run.run_id, run.name, run.params, run.metrics, seed)


def _compare(
    plan: Plan, trials: Trials, runs: Sequence[RunRecord], finished: dict[str, Outcome]
) -> dict[str, Any]:
    """The comparison, with the score that points are chosen by and each point's best run."""
    labels = {run_id: outcome.trial.label for run_id, outcome in finished.items()}
    known = [scored(run, plan.task.stage) for run in runs]
    comparison = compare(known, plan.task.metric, labels, plan.reference, plan.design)
    for row in comparison["rows"]:
        ids = row["run_ids"]
        scores = {run_id: max(value for _, value in trials.scores(run_id)) for run_id in ids}
        row[trials.score] = sum(scores.values()) / len(scores)
        row["best_run"] = max(scores, key=lambda run_id: scores[run_id])
    return comparison


def _choose(comparison: dict[str, Any], score: str, finished: dict[str, Outcome]) -> Champion:
    """The point with the highest mean score, among those that were decided or have most seeds."""
    rows = comparison["rows"]
    most = max(row["runs"] for row in rows)
    known = (row for row in rows if row["runs"] == most or row.get("decided_after"))
    best = max(known, key=lambda row: row[score])
    return Champion(finished[best["best_run"]], best, len(rows), score)


def _trial_rows(
    outcomes: Sequence[Outcome], runs: Sequence[RunRecord], metric: str
) -> list[dict[str, Any]]:
    metrics = {run.run_id: run.metrics for run in runs}
    return [
        {
            "point": o.trial.label,
            "seed": o.trial.seed,
            "state": o.state,
            metric: metrics.get(o.run_id, {}).get(f"final/{metric}"),
            "wall_time_s": metrics.get(o.run_id, {}).get("final/wall_time_s"),
            "reused": o.reused,
            "reason": "" if o.state == "finished" and not o.reused else o.reason,
            "identity": o.trial.identity,
            "mlflow_run_id": o.run_id,
        }
        for o in outcomes
    ]


def _summary(
    plan: Plan, trials: Trials, comparison: dict[str, Any], champion: Champion
) -> dict[str, Any]:
    outcomes, metric, best = trials.outcomes.values(), plan.task.metric, champion.row
    counts = {
        f"trials_{state}": sum(o.state == state.replace("_", " ") for o in outcomes)
        for state in ("finished", "failed", "stopped", "not_needed")
    }
    reference = next(r for r in comparison["rows"] if r["point"] == comparison["reference"])
    return {
        "points": len(comparison["rows"]),
        **counts,
        "trials_not_run": trials.total - sum(counts.values()),
        "trials_reused": sum(o.reused for o in outcomes),
        f"reference_{metric}": reference["mean"],
        f"best_{metric}": best["mean"],
        f"best_{metric}_ci95": best["ci95"],
    }
