"""An ablation or search over pretraining: trials of a space, compared over their seeds."""

import base64
import csv
import functools
import io
import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import pretrain
from pipelines.compare import compare, markdown, verdict
from pipelines.compare import write as write_comparison
from pipelines.errors import PipelineError
from pipelines.params import ROOT, Model, Params
from pipelines.run.identity import HeldError, RunState, hold
from pipelines.run.stage import Stage, run_stage
from pipelines.spaces import NONE, Choice, Point, Space, Trial, label, load_space, make_trial, plan

if TYPE_CHECKING:
    from pipelines.run.tuning import Job


@dataclass
class Plan:
    """What `check` found out before anything was started."""

    space: Space
    trials: list[Trial]
    base: Trial
    """What all trials have in common."""
    data: dict[str, Any]


@functools.cache
def cost(model: Model, num_classes: int, img_size: int) -> tuple[int, float]:
    """Parameters, and GFLOPs of an image's forward pass (2 per multiply-add)."""
    import torch

    from pipelines.train.classify import build_model
    from pipelines.train.cost import flops_per_image

    with torch.device("meta"):
        network = build_model(model, num_classes)
    return sum(p.numel() for p in network.parameters()), flops_per_image(network, img_size) / 1e9


def cost_of(trial: Trial) -> tuple[int, float]:
    """`cost` of a trial's model and images.

    Raises:
        PipelineError: the model can't be built.
    """
    p = trial.params.pretrain
    try:
        return cost(trial.params.model, p.num_classes, p.img_size)
    except PipelineError as error:
        raise PipelineError(f"point {trial.label}: {error}") from error


def check(params: Params) -> Plan | None:
    if params.sweep.space == NONE:
        return None
    space = load_space(params.sweep.space)
    data = pretrain.check(params)
    trials = plan(params, space)
    for trial in trials:
        cost_of(trial)
    return Plan(space, trials, make_trial(params, space, {}), data)


@dataclass
class Outcome:
    """What became of a trial."""

    trial: Trial
    run_id: str = ""
    run_name: str = ""
    state: str = "not run"
    """finished, stopped, failed, running or not run."""
    reused: bool = False
    reason: str = ""
    locks: ExitStack = field(default_factory=ExitStack)
    started: float = 0.0


class Trials:
    """The queue of a sweep: gives Ray Tune its trials and keeps what became of them.

    What was done before is found by the trials' identities: in `.runs/pretrain-<identity>` is
    their MLflow run, and that says whether they finished.
    """

    def __init__(self, stage: Stage, plan: Plan) -> None:
        from pipelines.run.reporting import Progress

        self.stage, self.space, self.sweep = stage, plan.space, stage.tracker.run_id
        self.waiting = deque(plan.trials)
        self.outcomes: dict[str, Outcome] = {t.identity: Outcome(t) for t in plan.trials}
        self.score = "holdout_top1" if plan.base.params.pretrain.holdout else "val_top1"
        """What points are chosen by: the accuracy that also chooses a run's best epoch."""
        search = plan.space.search
        self.asha = search.asha if search else None
        self.study = _Study(search, self.sweep) if search and search.method == "optuna" else None
        self.total = len(plan.trials) + (search.trials if search and self.study else 0)
        self.retry = stage.state.attempt > 1
        self._spent_trials = self._spent_epochs = 0
        self._began = time.monotonic()
        self._progress = Progress("sweep")

    def next(self) -> "Job | None":
        """The next trial that must run, or whose epochs the scheduler must see again."""
        for trial in self._upcoming():
            outcome = self.outcomes.setdefault(trial.identity, Outcome(trial))
            try:
                job = self._start(outcome)
            except HeldError as error:
                self._end(outcome, "failed", str(error))
                continue
            if job:
                return job
        return None

    def finished(self, key: str, result: Mapping[str, Any]) -> None:
        """A trial ended: log its summary, and free it."""
        from pipelines.run.tracking import Tracker

        outcome = self.outcomes[key]
        tracker = Tracker(outcome.run_id)
        kept = ("top1", "top5", "loss", "best_epoch", "images_per_second")
        seconds = round(time.monotonic() - outcome.started, 1)
        tracker.log_summary({k: result[k] for k in kept} | {"wall_time_s": seconds})
        tracker.finish()
        self._end(outcome, "finished", f"top1 {result['top1']:.1f}")

    def stopped(self, key: str, epoch: int) -> None:
        """ASHA stopped a trial."""
        from pipelines.run.tracking import Tracker

        outcome, reason = self.outcomes[key], f"stopped by ASHA after epoch {epoch + 1}"
        tracker = Tracker(outcome.run_id)
        tracker.set_tags({"stopped": reason})
        tracker.finish()
        self._end(outcome, "stopped", reason)

    def failed(self, key: str, reason: str) -> None:
        """A trial failed: keep the reason, and go on with the others."""
        from pipelines.run.tracking import Tracker

        outcome = self.outcomes[key]
        tracker = Tracker(outcome.run_id)
        tracker.set_tags({"error": reason[:500]})
        tracker.finish("FAILED")
        self._end(outcome, "failed", reason)

    def close(self) -> None:
        """Free what still runs, which only an interrupted sweep has."""
        from pipelines.run.tracking import Tracker

        self._progress.close()
        for outcome in self.outcomes.values():
            if outcome.state == "running":
                Tracker(outcome.run_id).finish("KILLED")
            outcome.locks.close()

    def scores(self, run_id: str) -> list[tuple[int, float]]:
        """The score of each epoch of a run."""
        from pipelines.run.tracking import metric_history

        return metric_history(run_id).get(self.score, [])

    def _upcoming(self) -> Iterator[Trial]:
        """Trials in order, while the budget lasts."""
        budget, study = self.stage.params.sweep, self.study
        while self.waiting or (study and study.left > 0):
            hours = (time.monotonic() - self._began) / 3600
            if budget.max_hours and hours >= budget.max_hours:
                return self._progress.line(f"sweep.max_hours={budget.max_hours} are over")
            if budget.max_trials and self._spent_trials >= budget.max_trials:
                return self._progress.line(f"sweep.max_trials={budget.max_trials} have run")
            if self.waiting:
                trial = self.waiting[0]
            else:
                assert study is not None
                trial = make_trial(self.stage.params, self.space, study.ask())
                study.name(trial.identity)
            if budget.max_epochs and self._spent_epochs + trial.epochs > budget.max_epochs:
                return self._progress.line(f"sweep.max_epochs={budget.max_epochs} are used up")
            if self.waiting:
                self.waiting.popleft()
            yield trial
        return None

    def _start(self, outcome: Outcome) -> "Job | None":
        """Hold a trial and open its MLflow run; None if it need not run, and is ended."""
        from pipelines.run import tracking
        from pipelines.run.tuning import Job

        trial = outcome.trial
        folder = ROOT / ".runs" / f"pretrain-{trial.identity}"
        outcome.locks.enter_context(hold(folder))
        state = RunState.load(folder)
        outcome.run_name = folder.name + (f"-{state.attempt}" if state.attempt > 1 else "")
        outcome.started = time.monotonic()
        before = tracking.read_run(state.mlflow_run_id) if state.mlflow_run_id else None
        if before:
            outcome.run_id = before.run_id
            own = before.tags.get("mlflow.parentRunId") == self.sweep
            ended = self._earlier(outcome, before, own)
            if own or not ended:
                self._count(trial)
            if ended:
                self._mark(before.tags, outcome)
                self._end(outcome, ended, outcome.reason)
                if not (self.asha and ended in ("finished", "stopped")):
                    return None
                epochs = [
                    {self.score: value, "epoch": step} for step, value in self.scores(before.run_id)
                ]
                return Job(trial.identity, {}, "", "", replay=epochs)
        else:
            self._count(trial)
        tracker = tracking.start_run(
            f"{trial.label} seed {trial.seed}",
            "sweep",
            {
                "stage": "pretrain",
                "identity": trial.identity,
                "ray_run": outcome.run_name,
                "recipe": trial.params.recipe,
                **tracking.git_tags(),
            },
            state.mlflow_run_id,
            parent=self.sweep,
        )
        outcome.run_id = state.mlflow_run_id = tracker.run_id
        state.save(folder)
        resolved = trial.params.model_dump(mode="json")
        tracker.log_params({name: resolved[name] for name in ("scaling", "model", "pretrain")})
        tracker.log_dict(resolved, "params.json")
        self._mark(before.tags if before else {}, outcome)
        outcome.state = "running"
        return Job(trial.identity, resolved, outcome.run_name, tracker.run_id)

    def _earlier(self, outcome: Outcome, before: Any, own: bool) -> str:
        """How a trial ended before; empty if it must run, or go on."""
        from pipelines.run import launch

        if before.status == "FINISHED" and "final/top1" in before.metrics:
            if launch.last_checkpoint(outcome.run_name, outcome.trial.params) is None:
                return ""  # its weights are gone
            outcome.reused = True
            where = "this sweep, before it was interrupted" if own else f"run {before.name!r}"
            outcome.reason = f"taken over from {where}: top1 {before.metrics['final/top1']:.1f}"
            return "finished"
        if before.status == "FINISHED" and "stopped" in before.tags and self.asha:
            outcome.reused, outcome.reason = True, before.tags["stopped"]
            return "stopped"
        if before.status == "FAILED" and not self.retry and own:
            outcome.reused = True
            outcome.reason = before.tags.get("error", "failed")
            return "failed"
        return ""

    def _count(self, trial: Trial) -> None:
        self._spent_trials += 1
        self._spent_epochs += trial.epochs

    def _mark(self, tags: Mapping[str, str], outcome: Outcome) -> None:
        """Tag a run as one of this sweep's, by which the comparison finds it."""
        from pipelines.run.tracking import Tracker

        tracker, trial = Tracker(outcome.run_id), outcome.trial
        sweeps = json.loads(tags.get("sweeps", "{}")) | {self.sweep: trial.label}
        order = list(self.outcomes).index(trial.identity)
        tracker.set_tags(
            {
                "sweeps": json.dumps(sweeps),
                "trial": f"{order:04d}",
                "point": json.dumps(trial.point),
            }
        )
        parameters, gflops = cost_of(trial)
        tracker.log_summary({"parameters": parameters, "gflops": gflops})

    def _end(self, outcome: Outcome, state: str, reason: str) -> None:
        outcome.state, outcome.reason = state, reason
        outcome.locks.close()
        if self.study:
            scores = self.scores(outcome.run_id) if outcome.run_id else []
            best = max((value for _, value in scores), default=None)
            self.study.tell(outcome.trial.identity, None if state == "failed" else best)
        done = sum(o.state not in ("running", "not run") for o in self.outcomes.values())
        trial = outcome.trial
        self._progress.line(
            f"{done}/{self.total} {trial.label} seed {trial.seed}: {state}"
            + (f": {reason}" if reason else "")
        )
        self._progress.update(done, self.total, "trials")


class _Study:
    """Optuna's TPE, fed with what this sweep's trials gave before it was interrupted."""

    def __init__(self, search: Any, sweep_id: str) -> None:
        import optuna

        from pipelines.run import tracking

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.left = optuna, search.trials
        earlier = tracking.sweep_trials(sweep_id)
        # Points that are asked again take no random numbers: the same seed would draw them twice.
        sampler = optuna.samplers.TPESampler(seed=search.seed + len(earlier))
        self.study = optuna.create_study(direction="maximize", sampler=sampler)
        self.distributions: dict[str, Any] = {
            name: optuna.distributions.CategoricalDistribution(domain.values)
            if isinstance(domain, Choice)
            else optuna.distributions.FloatDistribution(domain.low, domain.high, log=domain.log)
            for name, domain in search.parameters.items()
        }
        for run in earlier:
            self.study.enqueue_trial(json.loads(run.tags["point"]), skip_if_exists=True)
        self._asked: Any = None
        self._open: dict[str, Any] = {}

    def ask(self) -> Point:
        """The next point: first those that were asked before."""
        self.left -= 1
        self._asked = self.study.ask(self.distributions)
        return dict(self._asked.params)

    def name(self, identity: str) -> None:
        """The trial of the last point."""
        self._open[identity] = self._asked

    def tell(self, identity: str, score: float | None) -> None:
        """A trial's score; None: it failed."""
        trial = self._open.pop(identity, None)
        if trial is not None:
            state = self.optuna.trial.TrialState
            self.study.tell(trial, score, None if score is not None else state.FAIL)


def run(stage: Stage, plan: Plan | None) -> None:
    from pipelines.data.images import DataPlace
    from pipelines.run import launch
    from pipelines.run.tuning import run_trials

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
    stage.tracker.log_dataset("imagenet", plan.data["digest"], Path("imagenet"), "training")
    largest = max((t.params for t in (plan.base, *plan.trials)), key=_workers)
    trials = Trials(stage, plan)
    try:
        asha = trials.asha
        run_trials(
            trials,
            pretrain.train_loop_per_worker,
            {"data": DataPlace(plan.data["place"], plan.data["skipped"])},
            name=stage.run_name,
            storage=launch.storage_path(stage.params),
            concurrent=launch.at_once("sweep", largest, {"imagenet": plan.data["place"]}),
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
    comparison = compare(runs, labels, reference, "top1")
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
    (folder / "best.yaml").write_text(_best_yaml(stage, values, best, trials.score))
    _write_trials(outcomes, runs, folder / "trials.csv")
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
        "reference_top1": next(r["mean"] for r in rows if r["point"] == comparison["reference"]),
        "best": best["point"],
        "best_top1": best["mean"],
        "best_top1_ci95": best["ci95"],
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
        "trials": _trial_rows(outcomes, runs),
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


def _best_yaml(stage: Stage, values: Mapping[str, Any], best: Mapping[str, Any], score: str) -> str:
    from ruamel.yaml import YAML

    nested: dict[str, Any] = {}
    for name, value in values.items():
        section = nested
        *parents, key = name.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[key] = value
    text = io.StringIO()
    YAML().dump(nested, text)
    options = " ".join(f"-S '{k}={json.dumps(v)}'" for k, v in values.items())
    return (
        f"# The best point of sweep {stage.section.space} (recipe {stage.params.recipe}) by"
        f" {score}, the mean over {best['runs']} seeds.\n"
        "# Into params.yaml or a recipe, or as options:\n"
        f"#   dvc exp run pretrain {options}\n{text.getvalue()}"
    )


def _trial_rows(outcomes: list[Outcome], runs: list[Any]) -> list[dict[str, Any]]:
    metrics = {run.run_id: run.metrics for run in runs}
    return [
        {
            "point": o.trial.label,
            "seed": o.trial.seed,
            "state": o.state,
            "top1": metrics.get(o.run_id, {}).get("final/top1"),
            "wall_time_s": metrics.get(o.run_id, {}).get("final/wall_time_s"),
            "reused": o.reused,
            "reason": "" if o.state == "finished" and not o.reused else o.reason,
            "identity": o.trial.identity,
            "mlflow_run_id": o.run_id,
        }
        for o in outcomes
    ]


def _write_trials(outcomes: list[Outcome], runs: list[Any], path: Path) -> None:
    rows = _trial_rows(outcomes, runs)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


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

    from pipelines.run import launch, tracking
    from pipelines.run.checkpoint import write_weights

    params, trial = champion.trial.params, champion.trial
    checkpoint = launch.last_checkpoint(champion.run_name, params)
    if checkpoint is None:
        raise PipelineError(f"the checkpoint of {champion.run_name} is gone from the storage")
    with checkpoint.as_directory() as source:
        weights = load_file(f"{source}/best.safetensors")
    own, demo = best["seeds"][str(trial.seed)], params.prepare.source == "demo"
    description = write_weights(
        folder / "champion",
        weights,
        model=params.model.model_dump(mode="json"),
        identity=trial.identity,
        mlflow_run_id=champion.run_id,
        metrics={"top1": own},
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
- top1 on the validation images: {own:.1f} with this seed; {best["mean"]:.1f}{spread} over
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


def _pictures(
    space: Space, outcomes: list[Outcome], comparison: Mapping[str, Any]
) -> Iterator[dict[str, str]]:
    """Title, text, alternative text and PNG of each plot."""
    from pipelines import figures

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
    for name in names:
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
