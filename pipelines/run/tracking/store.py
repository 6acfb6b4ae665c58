"""The MLflow store: where it is, whether it answers, and the experiment in it."""

import os
from pathlib import Path

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

import mlflow
from mlflow.tracking import MlflowClient

from pipelines.errors import PipelineError
from pipelines.paths import SHARED
from pipelines.run.tracking_uri import tracking_uri, without_password

EXPERIMENT = "elsa"
"""Where MLFLOW_EXPERIMENT_NAME names no other."""
TrackingError = mlflow.exceptions.MlflowException


def ping(uri: str) -> None:
    """Ask the server or store at `uri` once, without the client's minutes of retries.

    Raises:
        PipelineError: it can't be reached, or rejects these credentials.
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


def experiment_of(client: MlflowClient) -> str:
    """Id of the experiment, which is made if it is not there."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    found = client.get_experiment_by_name(name)
    if found:
        return found.experiment_id
    # A sqlite store would put artifacts below the current folder, wherever that is.
    local = tracking_uri().startswith("sqlite:")
    location = (SHARED / "mlartifacts").as_uri() if local else None
    return client.create_experiment(name, artifact_location=location)


def download_model(uri: str) -> Path:
    """The files of a logged or registered model (`models:/...`) in a folder of this machine.

    Raises:
        PipelineError: the store has no such model, or does not answer.
    """
    mlflow.set_tracking_uri(tracking_uri())
    try:
        return Path(mlflow.artifacts.download_artifacts(uri))
    except mlflow.exceptions.MlflowException as error:
        raise PipelineError(
            f"{uri}: {without_password(error.message)}",
            "`make ui` lists the registered models under Models",
        ) from None


def run_exists(client: MlflowClient, run_id: str) -> bool:
    """Whether the store has the run."""
    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except mlflow.exceptions.MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False  # the store was deleted or is another one: a new run takes over
        raise
