"""MLflow: the only module that imports it.

One experiment, a parent run per pipeline run (a parameter set, or a DVC experiment), a
child run per stage. The driver creates the run and passes its id; workers log by client.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

import mlflow
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient

from pipelines.errors import PipelineError
from pipelines.params import flatten
from pipelines.paths import ROOT, SHARED

EXPERIMENT = "elsa"
TrackingError = mlflow.exceptions.MlflowException


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or a sqlite store at the root of the repository."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{SHARED / 'mlflow.db'}"


class Tracker:
    """One MLflow run, by id. Each metric is kept once per step, also when steps run again."""

    def __init__(self, run_id: str, uri: str | None = None) -> None:
        self.run_id = run_id
        self.client = MlflowClient(uri or tracking_uri())
        self._steps: dict[str, set[int]] = {}

    def log_metrics(
        self, metrics: Mapping[str, float], step: int, time_ms: int | None = None
    ) -> None:
        """Log what is not there yet: a resumed run repeats the steps after its checkpoint."""
        now = time_ms or int(time.time() * 1000)
        for key in metrics.keys() - self._steps.keys():
            history = self.client.get_metric_history(self.run_id, key)
            self._steps[key] = {m.step for m in history}
        new = [key for key in metrics if step not in self._steps[key]]
        if new:
            logged = [Metric(key, float(metrics[key]), now, step) for key in new]
            self.client.log_batch(self.run_id, metrics=logged)
        for key in new:
            self._steps[key].add(step)

    def log_summary(self, metrics: Mapping[str, Any]) -> None:
        """Final numbers under `final/`, for the comparison table; a repeated call adds nothing."""
        self.log_metrics(
            {f"final/{k}": v for k, v in metrics.items() if isinstance(v, int | float)}, step=0
        )

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters, flattened to dotted names; those logged already are left alone."""
        have = self.client.get_run(self.run_id).data.params
        flat = [Param(k, str(v)[:6000]) for k, v in flatten(params).items() if k not in have]
        for start in range(0, len(flat), 100):  # the store's limit per call
            self.client.log_batch(self.run_id, params=flat[start : start + 100])

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        self.client.log_batch(self.run_id, tags=[RunTag(k, str(v)) for k, v in tags.items()])

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        self.client.log_artifact(self.run_id, str(path), folder)

    def log_dict(self, value: Mapping[str, Any], name: str) -> None:
        self.client.log_dict(self.run_id, dict(value), name)

    def log_dataset(self, name: str, digest: str, path: Path, context: str) -> None:
        """Record a data set as an input of the run."""
        dataset = Dataset(
            name=name, digest=digest[:36], source_type="local", source=f'{{"uri": "{path.name}"}}'
        )
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])]
        self.client.log_inputs(self.run_id, datasets=inputs)

    def log_model(self, name: str, folder: Path, params: Mapping[str, Any]) -> str:
        """Log a folder (weights as safetensors, its description) as a logged model; its id."""
        run = self.client.get_run(self.run_id)
        model = self.client.create_logged_model(
            experiment_id=run.info.experiment_id,
            name=name,
            source_run_id=self.run_id,
            params={k: str(v) for k, v in params.items()},
            model_type="safetensors",
        )
        self.client.log_model_artifacts(model.model_id, str(folder))
        self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=0)])
        return model.model_id

    def fail(self, error: BaseException) -> None:
        """End the run as one that `error` ended; says so if MLflow does not hear of it."""
        killed = isinstance(error, KeyboardInterrupt | SystemExit)
        try:
            self.set_tags({"error": traceback.format_exception_only(error)[-1][:500]})
            self.finish("KILLED" if killed else "FAILED")
        except TrackingError:
            print("MLflow does not answer: there this run still counts as running", file=sys.stderr)

    def finish(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED; `resume_run` opens it again."""
        self.client.set_terminated(self.run_id, status)


class Delivery:
    """Metrics on their way to a run, by a thread of their own: nobody waits for the server.

    While it does not answer they are kept and tried again, at longer and longer intervals.

    Args:
        tell: gets a line when the server stops and when it begins to answer.
    """

    LONGEST_WAIT = 30.0
    """Seconds between two tries."""

    def __init__(self, tracker: Tracker, tell: Callable[[str], None]) -> None:
        # Minutes of the client's own retries would hide how things are.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        self._tracker, self._tell = tracker, tell
        self._waiting: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._deliver, daemon=True)
        self._thread.start()

    def put(self, metrics: Mapping[str, float], step: int) -> None:
        self.put_all([{"metrics": dict(metrics), "step": step, "time_ms": time.time_ns() // 10**6}])

    def put_all(self, items: Sequence[Mapping[str, Any]]) -> None:
        """What `undelivered` gave, of this process or an earlier one."""
        with self._changed:
            self._waiting += [dict(item) for item in items]
            self._changed.notify()

    def undelivered(self) -> list[dict[str, Any]]:
        """What has not arrived yet, as JSON can hold it."""
        with self._changed:
            return list(self._waiting)

    def close(self, seconds: float) -> None:
        """Deliver the rest, if that takes no more than `seconds`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)

    def _deliver(self) -> None:
        wait = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                item = self._waiting[0]
            try:
                self._tracker.log_metrics(**item)
            except mlflow.exceptions.MlflowException as error:
                if not wait:
                    reason = without_password(error.message).splitlines()[0][:200]
                    self._tell(f"MLflow does not answer, its metrics are kept: {reason}")
                wait = min(2 * wait or 1.0, self.LONGEST_WAIT)
                with self._changed:
                    if self._closing:
                        return
                    self._changed.wait_for(lambda: self._closing, wait)
                continue
            if wait:
                self._tell("MLflow answers again")
                wait = 0.0
            with self._changed:
                self._waiting.pop(0)


def system_metrics(run_id: str, node: int) -> SystemMetricsMonitor:
    """A started monitor of this node's CPU, memory, disk, network and GPUs; call `finish()`."""
    mlflow.set_tracking_uri(tracking_uri())
    monitor = SystemMetricsMonitor(
        run_id,
        sampling_interval=2,
        samples_before_logging=1,
        node_id=f"node{node}",
        resume_logging=True,
    )
    monitor.start()
    return monitor


def start_run(
    name: str,
    pipeline: str,
    tags: Mapping[str, Any],
    run_id: str | None = None,
    parent: str | None = None,
) -> Tracker:
    """A run below run `parent`, or below its pipeline's; with `run_id` that run goes on.

    Without it, an unfinished run of the same `ray_run` tag goes on: one that was begun on a
    machine that is gone.

    Raises:
        PipelineError: the tracking server or store cannot be reached.
    """
    try:
        client = MlflowClient(tracking_uri())
        experiment_id = _experiment(client)
        run_id = run_id or _unfinished(client, experiment_id, tags.get("ray_run"))
        if run_id and _exists(client, run_id):
            client.update_run(run_id, status="RUNNING")
        else:
            parent = parent or _parent(client, experiment_id, pipeline)
            run = client.create_run(
                experiment_id,
                run_name=name,
                tags={
                    "mlflow.parentRunId": parent,
                    "mlflow.source.type": "JOB",
                    "pipeline": pipeline,
                },
            )
            run_id = run.info.run_id
    except mlflow.exceptions.MlflowException as error:
        raise PipelineError(
            f"MLflow at {without_password(tracking_uri())} does not answer:"
            f" {without_password(error.message)}."
            " Check MLFLOW_TRACKING_URI, or unset it to use the local store"
        ) from error
    tracker = Tracker(run_id)
    tracker.set_tags(tags)
    return tracker


def ping(uri: str) -> None:
    """Ask the server or store at `uri` once, without the client's minutes of retries.

    Raises:
        PipelineError: it can't be reached, or refuses these credentials.
    """
    limits = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    before = {name: os.environ.get(name) for name in limits}
    os.environ.update(limits)
    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except mlflow.exceptions.MlflowException as error:
        raise PipelineError(without_password(error.message).splitlines()[0]) from None
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def end_pipeline(pipeline: str, metrics: Mapping[str, float]) -> None:
    """Mark the pipeline's parent run as finished, with the metrics of its stages."""
    client = MlflowClient(tracking_uri())
    tracker = Tracker(_parent(client, _experiment(client), pipeline))
    tracker.log_summary(metrics)
    tracker.finish()


def metric_history(run_id: str) -> dict[str, list[tuple[int, float]]]:
    """All curves of a run: name to (step, value) in order, without system metrics."""
    client = MlflowClient(tracking_uri())
    names = [k for k in client.get_run(run_id).data.metrics if not k.startswith("system/")]
    return {
        name: sorted((m.step, m.value) for m in client.get_metric_history(run_id, name))
        for name in names
    }


@dataclass(frozen=True)
class RunRecord:
    """What MLflow holds of a run."""

    run_id: str
    name: str
    status: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]


def _record(run: Run) -> RunRecord:
    name, data = run.info.run_name or run.info.run_id, run.data
    return RunRecord(run.info.run_id, name, run.info.status, data.tags, data.params, data.metrics)


def read_run(run_id: str) -> RunRecord | None:
    """A run by id; None if the store has none."""
    client = MlflowClient(tracking_uri())
    return _record(client.get_run(run_id)) if _exists(client, run_id) else None


def find_sweep(name: str | None = None) -> RunRecord | None:
    """The last started sweep, of space `name` if that is given; None if there is none."""
    client = MlflowClient(tracking_uri())
    query = f"tags.stage = 'sweep' AND tags.space {f"= '{name}'" if name else "!= 'none'"}"
    order = ["attributes.start_time DESC"]
    found = client.search_runs([_experiment(client)], query, max_results=1, order_by=order)
    return _record(found[0]) if found else None


def sweep_trials(sweep_id: str) -> list[RunRecord]:
    """The runs that a sweep compares: its own, and those that it took over."""
    client = MlflowClient(tracking_uri())
    found, token = [], None
    while token is None or token:
        query = f"tags.sweeps LIKE '%{sweep_id}%'"
        page = client.search_runs([_experiment(client)], query, page_token=token)
        found += [_record(run) for run in page]
        token = page.token or ""
    return sorted(found, key=lambda run: run.tags.get("trial", ""))


def comparison_path(sweep_id: str, metric: str) -> str:
    """Address of charts of a sweep's trials, below that of MLflow's user interface.

    They show the mean of `final/<metric>` of each point, the same by the number of parameters, and
    the loss by step. The view is kept where the interface keeps one that a user shares: in a tag of
    the experiment.
    """
    client = MlflowClient(tracking_uri())
    experiment, score = _experiment(client), f"final/{metric}"
    chart = {"runsCountToCompare": 100, "metricSectionId": "sweep", "isGenerated": False}
    by_parameters = {"xaxis": "final/parameters", "yaxis": score}
    axes = {axis: {"type": "METRIC", "key": key} for axis, key in by_parameters.items()}
    view = {
        "searchFilter": f"tags.sweeps LIKE '%{sweep_id}%'",
        "orderByKey": f"metrics.`{score}`",
        "groupBy": {
            "aggregateFunction": "average",
            "groupByKeys": [{"mode": "tag", "groupByData": "label"}],
        },
        "runsHiddenMode": "SHOW_ALL",
        "runListHidden": True,
        "isAccordionReordered": True,  # else our section comes last
        "compareRunSections": [{"uuid": "sweep", "name": "sweep", "display": True}],
        "compareRunCharts": [
            {"uuid": "score", "type": "BAR", "metricKey": score, **chart},
            {"uuid": "parameters", "type": "SCATTER", **axes, **chart},
            *(
                {
                    "uuid": key,
                    "type": "LINE",
                    "metricKey": key,
                    "selectedMetricKeys": [key],
                    **chart,
                }
                for key in ("step/loss", "train/loss")  # of the loops for timm and mmengine
            ),
        ],
    }
    key = f"sweep-{sweep_id[:8]}"
    client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{key}", json.dumps(view))
    return f"/#/experiments/{experiment}/runs?viewStateShareKey={key}&compareRunsMode=CHART"


def register(
    name: str, alias: str, tracker: Tracker, folder: Path, card: str, tags: Mapping[str, Any]
) -> str:
    """Register a weights folder as a version of model `name` with an alias; the version.

    A version with the same `sha256` tag gets the alias instead of a second one.
    """
    client = tracker.client
    with suppress(mlflow.exceptions.MlflowException):  # it is there already
        client.create_registered_model(name)
    versions = client.search_model_versions(f"name = '{name}'")
    same = [v for v in versions if v.tags.get("sha256") == tags["sha256"]]
    if same:
        version = same[0].version
    else:
        model_id = tracker.log_model(name, folder, {})
        version = client.create_model_version(
            name,
            source=f"models:/{model_id}",
            run_id=tracker.run_id,
            tags={k: str(v) for k, v in tags.items()},
            description=card,
            model_id=model_id,
        ).version
    client.set_registered_model_alias(name, alias, version)
    return str(version)


def git_tags() -> dict[str, str]:
    """Commit and dirtiness of the working tree; empty outside a git repository."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with suppress(subprocess.CalledProcessError, FileNotFoundError):
        # What the stages themselves write is no change of code, parameters or data.
        changed = git(
            "status", "--porcelain", "--untracked-files=no", ".", ":!metrics", ":!dvc.lock"
        )
        return {
            "mlflow.source.git.commit": git("rev-parse", "HEAD"),
            "git_dirty": str(bool(changed)).lower(),
        }
    return {}


def _experiment(client: MlflowClient) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found:
        return found.experiment_id
    # A sqlite store would put artifacts below the current folder, wherever that is.
    local = tracking_uri().startswith("sqlite:")
    location = (SHARED / "mlartifacts").as_uri() if local else None
    return client.create_experiment(EXPERIMENT, artifact_location=location)


def _parent(client: MlflowClient, experiment_id: str, pipeline: str) -> str:
    query = f"tags.pipeline = '{pipeline}' AND tags.stage = 'pipeline'"
    found = client.search_runs([experiment_id], query, max_results=1)
    if found:
        client.update_run(found[0].info.run_id, status="RUNNING")
        return found[0].info.run_id
    tags = {"pipeline": pipeline, "stage": "pipeline", **git_tags()}
    return client.create_run(experiment_id, run_name=pipeline, tags=tags).info.run_id


def _unfinished(client: MlflowClient, experiment_id: str, ray_run: str | None) -> str | None:
    if not ray_run:
        return None
    query = f"tags.ray_run = '{ray_run}' AND attributes.status != 'FINISHED'"
    found = client.search_runs([experiment_id], query, max_results=1)
    return found[0].info.run_id if found else None


def _exists(client: MlflowClient, run_id: str) -> bool:
    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except mlflow.exceptions.MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False  # the store was deleted or is another one: a new run takes over
        raise


def without_password(text: str) -> str:
    """A tracking URI, or a message that has one in it, without user and password."""
    return re.sub(r"(?<=://)[^/@\s]*@", "...@", text)
