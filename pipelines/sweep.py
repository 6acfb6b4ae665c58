"""An ablation or search over a training stage: trials of a space, compared over their seeds."""

import base64
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.commands.compare import compare, markdown, verdict
from pipelines.commands.compare import write as write_comparison
from pipelines.errors import PipelineError
from pipelines.params import Params, nested
from pipelines.results.scores import write_csv
from pipelines.run.stage import Stage, run_stage
from pipelines.sweeps.queue import Outcome, Trials, cost_of
from pipelines.sweeps.space import NONE, Point, Space, Trial, label, load_space, make_trial, plan
from pipelines.tasks.subjects import SUBJECTS, Subject


@dataclass
class Plan:
    """What `check` found out before anything was started."""

    space: Space
    trials: list[Trial]
    base: Trial
    """What all trials have in common."""
    checked: dict[str, Any]
    """What the stage's own check gave: `data`, the data set, and more."""

    @property
    def subject(self) -> Subject:
        return SUBJECTS[self.space.stage]

    @property
    def data(self) -> dict[str, Any]:
        return self.checked["data"]


def check(params: Params) -> Plan | None:
    if params.sweep.space == NONE:
        return None
    space = load_space(params.sweep.space)
    checked = SUBJECTS[space.stage].check(params)
    trials = plan(params, space)
    for trial in trials:
        cost_of(trial)
    return Plan(space, trials, make_trial(params, space, {}), checked)


def run(stage: Stage, plan: Plan | None) -> None:
    from pipelines.run import fit as launch
    from pipelines.sweeps.tuning import run_trials

    folder = stage.output("sweeps")
    folder.mkdir(parents=True)
    if plan is None:
        stage.tracker.set_tags({"space": NONE})
        (folder / "README.md").write_text(
            "Nothing was swept: `sweep.space` is `none`. Choose a space, as in"
            " `dvc exp run sweep -S sweep.space=ghost_head`.\n"
        )
        stage.write_metrics({"space": NONE, "trials": 0})
        return
    reference = label(plan.space.reference or plan.trials[0].point) if plan.trials else ""
    stage.tracker.set_tags({"space": stage.section.space, "reference": reference})
    dataset = plan.subject.dataset
    stage.tracker.log_dataset(dataset, plan.data["digest"], Path(dataset), "training")
    largest = max((t.params for t in (plan.base, *plan.trials)), key=_workers)
    trials = Trials(stage, plan.space, plan.trials, plan.base)
    try:
        asha = trials.asha
        run_trials(
            trials,
            plan.subject,
            plan.checked,
            name=stage.run_name,
            storage=launch.storage_path(stage.params),
            concurrent=launch.at_once("sweep", largest, {dataset: plan.data["place"]}),
            metric=trials.score,
            asha=(asha.grace_epochs, asha.reduction_factor, plan.base.epochs) if asha else None,
        )
    finally:
        trials.close()
    _write(stage, plan, trials, reference, folder)


def _workers(params: Params) -> int:
    return params.scaling.num_workers * params.scaling.cpus_per_worker


def _write(stage: Stage, plan: Plan, trials: Trials, reference: str, folder: Path) -> None:
    from pipelines.run import tracking

    outcomes = list(trials.outcomes.values())
    if unfinished := [o for o in outcomes if o.state == "running"]:
        raise RuntimeError(f"Ray Tune ended without a result of {unfinished[0].trial.label}")
    finished = {o.run_id: o for o in outcomes if o.state == "finished"}
    if not finished:
        reasons = "; ".join(dict.fromkeys(o.reason for o in outcomes if o.reason))
        raise PipelineError(f"no trial finished: {reasons or 'the budget is too small for one'}")
    runs = [run for run in (tracking.read_run(run_id) for run_id in finished) if run]
    labels = {run_id: outcome.trial.label for run_id, outcome in finished.items()}
    metric = plan.subject.metric
    comparison = compare(runs, labels, reference, metric)
    for row in comparison["rows"]:
        ids = row["run_ids"]
        scores = {run_id: max(value for _, value in trials.scores(run_id)) for run_id in ids}
        row[trials.score] = sum(scores.values()) / len(scores)
        row["best_run"] = max(ids, key=lambda run_id: scores[run_id])
    write_comparison(comparison, folder)
    rows = comparison["rows"]
    most = max(row["runs"] for row in rows)
    best = max((row for row in rows if row["runs"] == most), key=lambda row: row[trials.score])
    champion = finished[best["best_run"]]
    values = {**plan.space.fixed, **champion.trial.point}
    (folder / "best.yaml").write_text(
        _best_yaml(stage, champion.trial.stage, values, best, trials.score)
    )
    rows_of_trials = _trial_rows(outcomes, runs, metric)
    write_csv(folder / "trials.csv", rows_of_trials)
    version = _register(stage, plan, champion, best, comparison, trials.score, folder)
    counts = {
        f"trials_{state}": sum(o.state == state for o in outcomes)
        for state in ("finished", "failed", "stopped")
    }
    summary = {
        "space": stage.section.space,
        "points": len(rows),
        **counts,
        "trials_not_run": trials.total - sum(counts.values()),
        "trials_reused": sum(o.reused for o in outcomes),
        "reference": comparison["reference"],
        f"reference_{metric}": next(
            r["mean"] for r in rows if r["point"] == comparison["reference"]
        ),
        "best": best["point"],
        f"best_{metric}": best["mean"],
        f"best_{metric}_ci95": best["ci95"],
    }
    context = {
        "recipe": stage.params.recipe,
        "space": plan.space,
        "name": stage.section.space,
        "fixed": {k: json.dumps(v) for k, v in plan.space.fixed.items()},
        "seeds": stage.section.seeds,
        "score": trials.score,
        "summary": summary,
        "comparison": comparison,
        "verdicts": [
            f"{row['point']}: {verdict(row, comparison['reference'])}."
            for row in rows
            if row["point"] != comparison["reference"]
        ],
        "pictures": list(_pictures(plan.space, outcomes, comparison)),
        "trials": rows_of_trials,
        "best_yaml": (folder / "best.yaml").read_text(),
        "champion": version,
        "sweep_run": stage.tracker.run_id,
        "git": tracking.git_tags(),
        "data": plan.data["digest"][:12],
    }
    _write_page(folder / "sweep.html", context)
    stage.tracker.log_artifact(folder, "sweeps")
    stage.write_metrics(summary)
    print(markdown(comparison))


def _best_yaml(
    stage: Stage, trained: str, values: Mapping[str, Any], best: Mapping[str, Any], score: str
) -> str:
    from ruamel.yaml import YAML

    text = io.StringIO()
    YAML().dump(nested(values), text)
    options = " ".join(f"-S '{k}={json.dumps(v)}'" for k, v in values.items())
    return (
        f"# The best point of sweep {stage.section.space} (recipe {stage.params.recipe}) by"
        f" {score}, the mean over {best['runs']} seeds.\n"
        "# Into params.yaml or a recipe, or as options:\n"
        f"#   dvc exp run {trained} {options}\n{text.getvalue()}"
    )


def _trial_rows(outcomes: list[Outcome], runs: list[Any], metric: str) -> list[dict[str, Any]]:
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


def _register(
    stage: Stage,
    plan: Plan,
    champion: Outcome,
    best: Mapping[str, Any],
    comparison: Mapping[str, Any],
    score: str,
    folder: Path,
) -> str:
    """Export and register the champion's weights, with a model card; its name and version."""
    from safetensors.torch import load_file

    from pipelines.data.weights import write_weights
    from pipelines.run import fit as launch
    from pipelines.run import tracking

    params, trial = champion.trial.params, champion.trial
    checkpoint = launch.last_checkpoint(champion.run_name, params)
    if checkpoint is None:
        raise PipelineError(f"the checkpoint of {champion.run_name} is gone from the storage")
    with checkpoint.as_directory() as source:
        weights = load_file(f"{source}/{plan.subject.weights}")
    metric = plan.subject.metric
    own, demo = best["seeds"][str(trial.seed)], params.prepare.source == "demo"
    description = write_weights(
        folder / "champion",
        weights,
        model=_model(trial),
        identity=trial.identity,
        mlflow_run_id=champion.run_id,
        metrics={metric: own},
    )
    git = tracking.git_tags()
    name = f"elsa-{stage.params.recipe}-{stage.section.space}"
    spread = "" if best["ci95"] is None else f" ± {best['ci95']:.1f} (95%)"
    card = f"""# {name}

{params.model.name} with {trial.label}, the best of {len(comparison["rows"])} points of sweep
`{stage.section.space}` by {score}, a mean over seeds; these are its best seed's weights.

- Data: {", ".join(f"{k} {v}" for k, v in plan.data["counts"].items())} images,
  {len(plan.data["classes"])} classes, digest {plan.data["digest"][:12]}.
- Recipe: `{stage.params.recipe}` with {json.dumps({**plan.space.fixed, **trial.point})}, seed
  {trial.seed}; all parameters are in `params.json` of run {champion.run_id}.
- {metric} on the validation images: {own:.1f} with this seed; {best["mean"]:.1f}{spread} over
  {best["runs"]} seeds.
- Limits: chosen among {len(comparison["rows"])} points and {best["runs"]} seeds, so expect a
  little less on new images.{" The images are the demo's." if demo else ""}
- Lineage: sweep run {stage.tracker.run_id}, trial run {champion.run_id}, identity {trial.identity},
  commit {git.get("mlflow.source.git.commit", "unknown")[:12]}, SHA-256 {description["sha256"]}.
"""
    (folder / "champion" / "README.md").write_text(card)
    tags = {
        "sha256": description["sha256"],
        "identity": trial.identity,
        "sweep_run_id": stage.tracker.run_id,
        "space": stage.section.space,
        "data_digest": plan.data["digest"],
        **git,
    }
    tracker = tracking.Tracker(champion.run_id)
    version = tracking.register(name, "champion", tracker, folder / "champion", card, tags)
    return f"{name} version {version}"


def _model(trial: Trial) -> dict[str, Any]:
    """What rebuilds the model."""
    model = trial.params.model.model_dump(mode="json")
    if trial.stage == "pretrain":
        return model
    return model | {"method": trial.section.method, "schedule": trial.section.schedule}


def _pictures(
    space: Space, outcomes: list[Outcome], comparison: Mapping[str, Any]
) -> Iterator[dict[str, str]]:
    """Title, text, alternative text and PNG of each plot."""
    from pipelines.results import figures

    points = {o.trial.label: o.trial.point for o in outcomes}
    rows, metric = comparison["rows"], comparison["metric"]
    for cost, (name, scale) in figures.COSTS.items():
        yield {
            "group": "cost",
            "title": name,
            "text": "",
            "alt": f"{metric} by {name}: "
            + "; ".join(
                f"{row['point']}: {row['mean']:.1f} at {row[cost] * scale:.3g}"
                for row in rows
                if row[cost] is not None
            ),
            "data": _png(figures.tradeoff(rows, metric, cost)),
        }
    reference = points[comparison["reference"]]
    names = dict.fromkeys(name for point in points.values() for name in point)
    varied = [n for n in names if len({json.dumps(p.get(n)) for p in points.values()}) > 1]
    if len(varied) > 1:
        means, named = [row["mean"] for row in rows], [points[row["point"]] for row in rows]
        yield {
            "group": "parallel",
            "title": "Parallel coordinates",
            "text": "A line per point; darker ones score higher.",
            "alt": f"{metric}: " + "; ".join(f"{row['point']}: {row['mean']:.1f}" for row in rows),
            "data": _png(figures.parallel(varied, named, means, metric)),
        }
    for name in varied:
        if len({json.dumps(p[name]) for p in points.values() if name in p}) < 2:
            continue
        chosen = [
            row
            for row in rows
            if name in points[row["point"]] and _alike(points[row["point"]], reference, name)
        ]
        if len(chosen) < 2:  # no slice through the reference, as in a random search
            chosen = [row for row in rows if name in points[row["point"]]]
        values = [points[row["point"]][name] for row in chosen]
        yield {
            "group": "factor",
            "title": name,
            "text": f"Published: {space.findings[name]}" if name in space.findings else "",
            "alt": f"{metric} by {name}: "
            + "; ".join(f"{v}: {row['mean']:.1f}" for v, row in zip(values, chosen, strict=True)),
            "data": _png(figures.factor(name, values, chosen, metric)),
        }


def _alike(point: Point, reference: Point, but: str) -> bool:
    """The same as the reference in all parameters that both name."""
    return all(point[k] == reference[k] for k in point.keys() & reference.keys() - {but})


def _png(figure: Any) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return base64.b64encode(data.getvalue()).decode()


def _write_page(path: Path, context: Mapping[str, Any]) -> None:
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    )
    path.write_text(environment.get_template("sweep.html.jinja").render(context))


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")
    run_stage("sweep", __doc__ or "", run, check)
