"""Runs: one that a stage writes to, its parent, and what the store holds of others."""

import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from mlflow.tracking.context.registry import resolve_tags

from pipelines.data.weights import read_description
from pipelines.errors import PipelineError
from pipelines.params import flatten
from pipelines.paths import ROOT
from pipelines.run.tracking.store import (
    TrackingError,
    experiment_of,
    run_exists,
)
from pipelines.run.tracking_uri import tracking_uri, without_password


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

    def log_dataset(self, name: str, digest: str, place: str, context: str) -> None:
        """Record a data set, by its folder or URL, as an input of the run."""
        place = without_password(place)
        kind = place.partition("://")[0] if "://" in place else "local"
        source = json.dumps({"uri": place})
        dataset = Dataset(name=name, digest=digest[:36], source_type=kind, source=source)
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])]
        self.client.log_inputs(self.run_id, datasets=inputs)

    def log_model(self, name: str, folder: Path, params: Mapping[str, Any]) -> str:
        """Log a weights folder as a model that `mlflow.pyfunc` loads and MLflow serves; its id.

        It carries the scores of the folder's description, which MLflow's page of models compares.
        """
        from pipelines.run.tracking.models import write_model  # it imports torch's timm

        run = self.client.get_run(self.run_id)
        model = self.client.create_logged_model(
            run.info.experiment_id,
            name=name,
            source_run_id=self.run_id,
            params={k: str(v) for k, v in params.items() if v is not None},
            model_type="pyfunc",
        )
        with tempfile.TemporaryDirectory() as scratch:
            staged = Path(scratch) / "model"
            write_model(staged, folder, {"run_id": self.run_id, "model_id": model.model_id})
            self.client.log_model_artifacts(model.model_id, str(staged))
        self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=0)])
        now, scores = int(time.time() * 1000), read_description(folder).metrics
        logged = [
            Metric(f"final/{key}", float(value), now, 0, model_id=model.model_id)
            for key, value in scores.items()
        ]
        self.client.log_batch(self.run_id, metrics=logged)
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
        """End the run as FINISHED, FAILED or KILLED; `start_run` opens it again.

        Its pipeline's parent run ends with it: it runs while one of its stages does.
        """
        self.client.set_terminated(self.run_id, status)
        parent = self.client.get_run(self.run_id).data.tags.get("mlflow.parentRunId")
        if parent and self.client.get_run(parent).data.tags.get("stage") == "pipeline":
            self.client.set_terminated(parent, status)


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
    """A run below run `parent`, or below its pipeline's; with `run_id` that run resumes.

    Without it, an unfinished run of the same `ray_run` tag resumes: one that was begun on a
    machine that is gone.

    Raises:
        PipelineError: the tracking server or store cannot be reached.
    """
    try:
        client = MlflowClient(tracking_uri())
        experiment_id = experiment_of(client)
        run_id = run_id or _unfinished(client, experiment_id, tags.get("ray_run"))
        if run_id and run_exists(client, run_id):
            client.update_run(run_id, status="RUNNING")
        else:
            parent = parent or _parent(client, experiment_id, pipeline)
            run = client.create_run(
                experiment_id,
                run_name=name,
                tags={**_context(), "mlflow.parentRunId": parent, "pipeline": pipeline},
            )
            run_id = run.info.run_id
    except mlflow.exceptions.MlflowException as error:
        raise PipelineError(
            f"MLflow at {without_password(tracking_uri())} does not answer:"
            f" {without_password(error.message)}",
            "Check MLFLOW_TRACKING_URI, or unset it to use the local store",
        ) from error
    tracker = Tracker(run_id)
    tracker.set_tags(tags)
    return tracker


def end_pipeline(pipeline: str, metrics: Mapping[str, float]) -> None:
    """Mark the pipeline's parent run as finished, with the metrics of its stages."""
    client = MlflowClient(tracking_uri())
    tracker = Tracker(_parent(client, experiment_of(client), pipeline))
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


def record_of(run: Run) -> RunRecord:
    """What MLflow holds of a run."""
    name, data = run.info.run_name or run.info.run_id, run.data
    return RunRecord(run.info.run_id, name, run.info.status, data.tags, data.params, data.metrics)


def read_run(run_id: str) -> RunRecord | None:
    """A run by id; None if the store has none."""
    client = MlflowClient(tracking_uri())
    return record_of(client.get_run(run_id)) if run_exists(client, run_id) else None


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


def _context() -> dict[str, str]:
    """User and program, as MLflow's own context tells them."""
    return {**resolve_tags(), "mlflow.source.type": "JOB"}


def _parent(client: MlflowClient, experiment_id: str, pipeline: str) -> str:
    query = f"tags.pipeline = '{pipeline}' AND tags.stage = 'pipeline'"
    found = client.search_runs([experiment_id], query, max_results=1)
    if found:
        client.update_run(found[0].info.run_id, status="RUNNING")
        return str(found[0].info.run_id)
    tags = {**_context(), "pipeline": pipeline, "stage": "pipeline", **git_tags()}
    return str(client.create_run(experiment_id, run_name=pipeline, tags=tags).info.run_id)


def _unfinished(client: MlflowClient, experiment_id: str, ray_run: str | None) -> str | None:
    if not ray_run:
        return None
    query = f"tags.ray_run = '{ray_run}' AND attributes.status != 'FINISHED'"
    found = client.search_runs([experiment_id], query, max_results=1)
    return found[0].info.run_id if found else None
