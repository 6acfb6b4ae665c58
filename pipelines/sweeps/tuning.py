"""Ray Tune: trials that are Ray Train runs, as many at once as the cluster has room for.

The driver asks a `Queue` for trials and tells it their results; the queue, not Tune, remembers
what was done. So an interrupted sweep is started again like a new one.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
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
from pipelines.run import fit as launch
from pipelines.tasks.subjects import Subject

RESULT, FAILED = "result", "failed"


@dataclass(frozen=True)
class Job:
    """One trial for Tune; JSON can hold it.

    Attributes:
        key: names it between queue and Tune.
        params: resolved parameters.
        replay: reports of its epochs if it ran before; then it is not run again.
    """

    key: str
    params: dict[str, Any]
    run_name: str
    mlflow_run_id: str
    replay: list[dict[str, float]] | None = None


class Queue(Protocol):
    """Where trials come from; every method is called in the driver."""

    def next(self) -> Job | None:
        """The next trial; None: there is no more."""

    def finished(self, key: str, result: Mapping[str, Any]) -> None:
        """A trial ended, with its `result.json`."""

    def stopped(self, key: str, epoch: int) -> None:
        """The scheduler stopped a trial after an epoch (counted from 0)."""

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
        elif RESULT in last:
            self.queue.finished(job["key"], last[RESULT])
        else:
            self.queue.stopped(job["key"], last["epoch"])

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        error = trial.get_error()
        self.queue.failed(json.loads(trial.config["job"])["key"], f"its driver died: {error}")


def _trial(
    config: dict[str, Any],
    subject: Subject,
    checked: dict[str, Any],
    report_epochs: bool,
) -> None:
    job = Job(**json.loads(config["job"]))
    if job.replay is not None:
        for epoch in job.replay:
            tune.report(epoch)
        return
    params = Params.model_validate_json(json.dumps(job.params))
    if report_epochs:  # ASHA counts reports: only those of whole epochs
        whole = params.storage.model_copy(update={"checkpoint_minutes": 0})
        params = params.model_copy(update={"storage": whole})
    try:
        checkpoint = launch.fit(
            subject.loop(),
            subject.config(params, checked),
            params,
            name=job.run_name,
            mlflow_run_id=job.mlflow_run_id,
            data={subject.dataset: checked["data"]["place"]},
            trial=True,
            callbacks=[TuneReportCallback()] if report_epochs else [],
        )
    except PipelineError as error:
        tune.report({FAILED: str(error)})
        return
    with checkpoint.as_directory() as folder:
        result = subject.result(Path(folder))
    # ASHA compares a trial's last report too, so that has the same score as its last epoch's.
    tune.report({**result["history"][-1], "epoch": len(result["history"]) - 1, RESULT: result})


def run_trials(
    queue: Queue,
    subject: Subject,
    checked: dict[str, Any],
    *,
    name: str,
    storage: str,
    concurrent: int,
    metric: str,
    asha: tuple[int, int, int] | None = None,
) -> None:
    """Run all trials of `queue`.

    Args:
        subject: what a trial trains.
        checked: what `subject.check` gave.
        name: of the folder in `storage` for Tune's own notes.
        concurrent: trials at the same time.
        metric: of an epoch; more is better.
        asha: grace epochs, reduction factor and most epochs of asynchronous successive halving.
    """
    scheduler: Any = FIFOScheduler()
    if asha:
        grace, factor, most = asha
        scheduler = ASHAScheduler(
            time_attr="training_iteration",
            metric=metric,
            mode="max",
            grace_period=grace,
            reduction_factor=factor,
            max_t=most - 1,  # the last rung: what reaches the last epoch is finished
            stop_last_trials=False,
        )
    tune.Tuner(
        tune.with_resources(
            tune.with_parameters(
                _trial, subject=subject, checked=checked, report_epochs=bool(asha)
            ),
            {"memory": 1},  # Tune refuses none at all; the Ray Train run's workers take the rest
        ),
        tune_config=tune.TuneConfig(
            search_alg=_Source(queue),
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=concurrent,
            trial_dirname_creator=lambda trial: trial.trial_id,
            reuse_actors=not asha,  # an actor whose trial was stopped still runs it
        ),
        run_config=tune.RunConfig(
            name=name, storage_path=storage, verbose=0, callbacks=[_Outcomes(queue)]
        ),
    ).fit()
