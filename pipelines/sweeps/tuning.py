"""Ray Tune: trials that are Ray Train runs, as many at once as the cluster has room for.

The driver asks a `Queue` for trials and tells it their results; the queue, not Tune, remembers
what was done. So an interrupted sweep is started again like a new one.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C ends the driver like any other stage
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # whose banner ignores verbose=0

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import Searcher

from pipelines.errors import PipelineError
from pipelines.params import Params
from pipelines.run.fit import RunSpec, fit
from pipelines.run.session import storage_path
from pipelines.tasks import TASKS, Job, Result

RESULT, FAILED, SPENT = "result", "failed", "spent"


@dataclass(frozen=True)
class TrialJob:
    """One trial for Tune; JSON can hold it.

    Attributes:
        key: names it between queue and Tune.
        params: resolved parameters.
        replay: reports of its epochs if it ran before; then it is not run again.
        stop_after_s: then the sweep's budget is spent, and it stops after a checkpoint.
    """

    key: str
    params: dict[str, Any]
    run_name: str
    mlflow_run_id: str
    replay: list[dict[str, float]] | None = None
    stop_after_s: float = math.inf


class Queue(Protocol):
    """Where trials come from; every method is called in the driver."""

    def next(self) -> TrialJob | None:
        """The next trial; None: there is no more."""

    def finished(self, key: str, result: Result) -> None:
        """A trial ended."""

    def stopped(self, key: str, epoch: int) -> None:
        """The scheduler stopped a trial after an epoch (counted from 0)."""

    def interrupted(self, key: str) -> None:
        """A trial stopped after a checkpoint, as the budget is spent."""

    def failed(self, key: str, reason: str) -> None:
        """A trial failed for good."""


class _Source(Searcher):
    """A queue as what Tune asks for trials."""

    def __init__(self, queue: Queue) -> None:
        super().__init__()
        self.queue = queue

    def suggest(self, trial_id: str) -> Any:
        job = self.queue.next()
        return {"job": json.dumps(vars(job))} if job else self.FINISHED

    def on_trial_complete(self, trial_id: str, *args: Any, **kwargs: Any) -> None:
        """`_Outcomes` tells the queue, with the reason."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the queue remembers."""


class _Outcomes(tune.Callback):
    """Tells the queue how trials end."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        job, last = json.loads(trial.config["job"]), trial.last_result
        if job["replay"] is not None:
            return
        if FAILED in last:
            self.queue.failed(job["key"], last[FAILED])
        elif SPENT in last:
            self.queue.interrupted(job["key"])
        elif RESULT in last:
            self.queue.finished(job["key"], Result(**last[RESULT]))
        else:
            self.queue.stopped(job["key"], last["epoch"])

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        error = trial.get_error()
        self.queue.failed(json.loads(trial.config["job"])["key"], f"its driver died: {error}")


@dataclass(frozen=True)
class Tuning:
    """What all trials of a sweep have in common."""

    task: str
    """Name of the task that they train."""
    job: Job
    """What the task's check gave."""
    name: str
    """Of the folder in `storage` for Tune's own notes."""
    storage: str
    local: bool
    """The connected Ray is the sweep's own."""
    concurrent: int
    """Trials at the same time."""
    metric: str
    """Of an epoch; more is better."""
    asha: tuple[int, int, int] | None = None
    """Grace epochs, reduction factor and most epochs of asynchronous successive halving."""


def _trial(config: dict[str, Any], tuning: Tuning) -> None:
    trial = TrialJob(**json.loads(config["job"]))
    if trial.replay is not None:
        for epoch in trial.replay:
            tune.report(epoch)
        return
    task, report_epochs = TASKS[tuning.task], bool(tuning.asha)
    params = Params.model_validate_json(json.dumps(trial.params))
    if report_epochs:  # ASHA counts reports: only those of whole epochs
        whole = params.storage.model_copy(update={"checkpoint_minutes": 0})
        params = params.model_copy(update={"storage": whole})
    job = task.trial(tuning.job, params)
    spec = RunSpec(
        stage=task.stage,
        name=trial.run_name,
        mlflow_run_id=trial.mlflow_run_id,
        scaling=params.scaling,
        storage=storage_path(params),
        data={task.dataset: job.dataset.place},
        local=tuning.local,
        trial=True,
        stop_after_s=trial.stop_after_s,
    )
    try:
        callbacks = [TuneReportCallback()] if report_epochs else []
        checkpoint = fit(task.loop, job, spec, callbacks)
    except PipelineError as error:
        tune.report({FAILED: str(error)})
        return
    except KeyboardInterrupt:
        tune.report({SPENT: True})
        return
    with checkpoint.as_directory() as folder:
        result = task.result(Path(folder))
    # ASHA compares a trial's last report too, so that has the same score as its last epoch's.
    last = {**result.history[-1], "epoch": len(result.history) - 1}
    tune.report({**last, RESULT: asdict(result)})


def run_trials(queue: Queue, tuning: Tuning) -> None:
    """Run all trials of `queue`."""
    scheduler: Any = FIFOScheduler()
    if tuning.asha:
        grace, factor, most = tuning.asha
        scheduler = ASHAScheduler(
            time_attr="training_iteration",
            metric=tuning.metric,
            mode="max",
            grace_period=grace,
            reduction_factor=factor,
            max_t=most - 1,  # the last rung: what reaches the last epoch is finished
            stop_last_trials=False,
        )
    tune.Tuner(
        tune.with_resources(
            tune.with_parameters(_trial, tuning=tuning),
            {"memory": 1},  # Tune rejects none at all; the Ray Train run's workers take the rest
        ),
        tune_config=tune.TuneConfig(
            search_alg=_Source(queue),
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=tuning.concurrent,
            trial_dirname_creator=lambda trial: trial.trial_id,
            reuse_actors=not tuning.asha,  # an actor whose trial was stopped still runs it
        ),
        run_config=tune.RunConfig(
            name=tuning.name,
            storage_path=tuning.storage,
            verbose=0,
            callbacks=[_Outcomes(queue)],
        ),
    ).fit()
