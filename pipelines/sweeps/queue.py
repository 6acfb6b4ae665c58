"""The trials of a sweep as Ray Tune asks for them: what is done, what must run, what is left."""

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipelines.run import tracking
from pipelines.run.budget import MARGIN_S, limit_of
from pipelines.run.display import Progress
from pipelines.run.identity import HeldError, RunState, hold
from pipelines.run.session import storage_path
from pipelines.run.stage import RUNS, StageRun
from pipelines.run.tracking import RunRecord, Tracker
from pipelines.sweeps.cost import cost_of
from pipelines.sweeps.plan import Plan
from pipelines.sweeps.space import Trial, make_trial
from pipelines.sweeps.study import Study
from pipelines.tasks import Result

if TYPE_CHECKING:
    from pipelines.sweeps.tuning import TrialJob


@dataclass
class Outcome:
    """What became of a trial."""

    trial: Trial
    run_id: str = ""
    run_name: str = ""
    state: str = "not run"
    """finished, stopped, failed, running, not needed or not run."""
    score: float | None = None
    """The metric of its stage, of a finished one."""
    reused: bool = False
    reason: str = ""
    locks: ExitStack = field(default_factory=ExitStack)
    started: float = 0.0


class Trials:
    """The queue of a sweep: gives Ray Tune its trials and keeps what became of them.

    What was done before is found by the trials' identities: in `.runs/<stage>-<identity>` is
    their MLflow run, and that says whether they finished.

    Args:
        plan: its trials are those that are known before the first one starts.
        concurrent: trials that may run at once.
    """

    def __init__(self, stage: StageRun, plan: Plan, concurrent: int = 1) -> None:
        trials, space = plan.trials, plan.space
        self.stage, self.space, self.sweep = stage, space, stage.tracker.run_id
        self.waiting = deque(trials)
        self.outcomes: dict[str, Outcome] = {t.identity: Outcome(t) for t in trials}
        self.task = plan.task
        self.score = self.task.epoch_score(plan.base.params)
        """What points are chosen by: the accuracy that also chooses a run's best epoch."""
        self.reference, self.design = plan.reference, plan.design
        search = space.search
        self.asha = search.asha if search else None
        self.study = None
        if search and search.method == "optuna":
            self.study = Study(search, self.sweep, stage.folder / "optuna.db")
        self.total = len(trials) + (search.trials if search and self.study else 0)
        self.retry = stage.state.attempt > 1
        self._spent_trials = self._spent_epochs = 0
        self._longest_s = MARGIN_S
        workers = plan.base.params.scaling.num_workers * concurrent
        self._limit = limit_of(stage.params.budget, workers)
        self.spent = ""
        """Why the budget ended the sweep; empty if it did not."""
        self._progress = Progress("sweep")

    def next(self) -> "TrialJob | None":
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

    def finished(self, key: str, result: Result) -> None:
        """A trial ended: log its summary, and free it."""
        outcome = self.outcomes[key]
        tracker = Tracker(outcome.run_id)
        seconds = round(time.monotonic() - outcome.started, 1)
        self._longest_s = max(self._longest_s, seconds)
        tracker.log_summary({**result.metrics, "wall_time_s": seconds})
        tracker.finish()
        metric = self.task.metric
        outcome.score = result.metrics[metric]
        self._end(outcome, "finished", f"{metric} {outcome.score:.1f}")

    def stopped(self, key: str, epoch: int) -> None:
        """ASHA stopped a trial."""
        outcome, reason = self.outcomes[key], f"stopped by ASHA after epoch {epoch + 1}"
        tracker = Tracker(outcome.run_id)
        tracker.set_tags({"stopped": reason})
        tracker.finish()
        self._end(outcome, "stopped", reason)

    def interrupted(self, key: str) -> None:
        """The budget is spent: a trial stopped after a checkpoint, from which it can resume."""
        self.spent = f"{self._limit.about} is spent; a larger one resumes"
        Tracker(self.outcomes[key].run_id).finish("KILLED")
        self._end(self.outcomes[key], "not run", self.spent)

    def failed(self, key: str, reason: str) -> None:
        """A trial failed: keep the reason, and continue with the others."""
        outcome = self.outcomes[key]
        tracker = Tracker(outcome.run_id)
        tracker.set_tags({"error": reason[:500]})
        tracker.finish("FAILED")
        self._end(outcome, "failed", reason)

    def close(self) -> None:
        """Free what still runs, which only an interrupted sweep has."""
        self._progress.close()
        for outcome in self.outcomes.values():
            if outcome.state == "running":
                Tracker(outcome.run_id).finish("KILLED")
            outcome.locks.close()

    def scores(self, run_id: str) -> list[tuple[int, float]]:
        """The score of each epoch of a run."""
        return tracking.metric_history(run_id).get(self.score, [])

    def _upcoming(self) -> Iterator[Trial]:
        """Trials in order, while the budget lasts."""
        limits, study = self.stage.params.sweep, self.study
        while self.waiting or (study and study.left > 0):
            if limits.max_trials and self._spent_trials >= limits.max_trials:
                return self._progress.line(f"sweep.max_trials={limits.max_trials} have run")
            if not self.waiting and (spent := self._spent()):
                return self._progress.line(spent)
            if self.waiting:
                trial = self.waiting[0]
            else:
                assert study is not None
                trial = make_trial(self.stage.params, self.space, study.ask())
                study.name(trial.identity)
            if limits.max_epochs and self._spent_epochs + trial.epochs > limits.max_epochs:
                return self._progress.line(f"sweep.max_epochs={limits.max_epochs} are used up")
            if self.waiting:
                self.waiting.popleft()
            yield trial
        return None

    def _spent(self) -> str:
        """Why another trial, as long as the longest so far, would pass the budget; empty if not."""
        spent_s = self.stage.state.seconds  # of all starts of this sweep
        if not self.spent and spent_s + self._longest_s > self._limit.seconds:
            self.spent = f"{self._limit.about} has no room for another trial"
        return self.spent

    def _start(self, outcome: Outcome) -> "TrialJob | None":
        """Hold a trial and open its MLflow run; None if it need not run, and is ended."""
        from pipelines.sweeps.tuning import TrialJob

        trial = outcome.trial
        folder = RUNS / f"{trial.stage}-{trial.identity}"
        outcome.locks.enter_context(hold(folder))
        state = RunState.load(folder)
        outcome.run_name = folder.name + (f"-{state.attempt}" if state.attempt > 1 else "")
        outcome.started = time.monotonic()
        before = tracking.read_run(state.mlflow_run_id) if state.mlflow_run_id else None
        if before:
            outcome.run_id = before.run_id
            own = before.tags.get("mlflow.parentRunId") == self.sweep
            ended = self._earlier(outcome, before, own)
            if ended:
                if own:
                    self._count(trial)
                self._mark(before.tags, outcome)
                self._end(outcome, ended, outcome.reason)
                if not (self.asha and ended in ("finished", "stopped")):
                    return None
                epochs = [
                    {self.score: value, "epoch": step} for step, value in self.scores(before.run_id)
                ]
                return TrialJob(trial.identity, {}, "", "", replay=epochs)
        if reason := self._decided(trial):
            self._end(outcome, "not needed", reason)
            return None
        if reason := self._spent():
            self._end(outcome, "not run", reason)
            return None
        self._count(trial)
        tracker = tracking.start_run(
            f"{trial.label} seed {trial.seed}",
            "sweep",
            {
                "stage": trial.stage,
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
        tracker.log_params({name: resolved[name] for name in ("scaling", "model", trial.stage)})
        tracker.log_dict(resolved, "params.json")
        self._mark(before.tags if before else {}, outcome)
        outcome.state = "running"
        return TrialJob(
            trial.identity,
            resolved,
            outcome.run_name,
            tracker.run_id,
            stop_after_s=self._limit.left_s(self.stage.state.seconds),
        )

    def _earlier(self, outcome: Outcome, before: RunRecord, own: bool) -> str:
        """How a trial ended before; empty if it must run, or resume."""
        from pipelines.run.fit import last_checkpoint

        metric = self.task.metric
        if before.status == "FINISHED" and f"final/{metric}" in before.metrics:
            if last_checkpoint(outcome.run_name, storage_path(outcome.trial.params)) is None:
                return ""  # its weights are gone
            outcome.reused = True
            self._longest_s = max(self._longest_s, before.metrics.get("final/wall_time_s", 0.0))
            where = "this sweep, before it was interrupted" if own else f"run {before.name!r}"
            outcome.score = before.metrics[f"final/{metric}"]
            outcome.reason = f"taken over from {where}: {metric} {outcome.score:.1f}"
            return "finished"
        if before.status == "FINISHED" and "stopped" in before.tags and self.asha:
            outcome.reused, outcome.reason = True, before.tags["stopped"]
            return "stopped"
        if before.status == "FAILED" and not self.retry and own:
            outcome.reused = True
            outcome.reason = before.tags.get("error", "failed")
            return "failed"
        return ""

    def _decided(self, trial: Trial) -> str:
        """Why a trial need not run; empty if it must: its point is open, or a point beside the
        reference is."""
        points = {o.trial.label for o in self.outcomes.values()} - {self.reference}
        if self.design.seeds < 2 or not points:
            return ""
        of_reference = self._scores_of(self.reference)
        if trial.label != self.reference:
            points = {trial.label}
        reasons = []
        for point in points:
            own = self._scores_of(point)
            pairs = sorted(own.keys() & of_reference.keys())
            found = self.design.decide([own[seed] - of_reference[seed] for seed in pairs])
            if found.verdict == "open":
                return ""
            reasons.append(f"{found.verdict} after {found.seeds} seeds")
        return reasons[0] if len(reasons) == 1 else "all points are decided"

    def _scores_of(self, label: str) -> dict[int, float]:
        """By seed, those of a point's finished trials."""
        outcomes = (o for o in self.outcomes.values() if o.trial.label == label)
        return {o.trial.seed: o.score for o in outcomes if o.score is not None}

    def _count(self, trial: Trial) -> None:
        self._spent_trials += 1
        self._spent_epochs += trial.epochs

    def _mark(self, tags: Mapping[str, str], outcome: Outcome) -> None:
        """Tag a run as one of this sweep's, by which the comparison finds it."""
        tracker, trial = Tracker(outcome.run_id), outcome.trial
        sweeps = json.loads(tags.get("sweeps", "{}")) | {self.sweep: trial.label}
        order = list(self.outcomes).index(trial.identity)
        tracker.set_tags(
            {
                "sweeps": json.dumps(sweeps),
                "trial": f"{order:04d}",
                "point": json.dumps(trial.point),
                "label": trial.label,
            }
        )
        parameters, gflops = cost_of(trial)
        tracker.log_summary({"parameters": parameters, "gflops": gflops})

    def _end(self, outcome: Outcome, state: str, reason: str) -> None:
        outcome.state, outcome.reason = state, reason
        outcome.locks.close()
        if self.study and state != "not run":
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
