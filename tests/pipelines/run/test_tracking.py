"""Metrics while the tracking server is away: kept, delivered, each once. With a real server."""

import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
from click.testing import CliRunner

from pipelines import cli
from pipelines.errors import PipelineError
from pipelines.run import tracking


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Starts an MLflow server on loopback, always the same one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # seven more processes
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.db'}", "--workers", "1"),
        *("--artifacts-destination", str(tmp_path / "artifacts")),
    ]

    @contextmanager
    def run():
        with (tmp_path / "server.log").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(lambda: answers(f"{uri}/health"), 120)
            yield
        finally:
            process.terminate()
            process.wait(30)

    return run


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except OSError:
        return False


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_metrics_outlive_an_outage_of_the_server(server, monkeypatch) -> None:
    monkeypatch.setattr(tracking.Delivery, "LONGEST_WAIT", 1.0)
    said: list[str] = []
    with server():
        run_id = tracking.start_run("pretrain", "test", {"ray_run": "pretrain-1"}).run_id
        delivery = tracking.Delivery(tracking.Tracker(run_id), said.append)
        delivery.put({"loss": 3.0}, 0)
        wait_for(lambda: not delivery.undelivered())
    for step in (1, 2):
        delivery.put({"loss": 3.0 - step}, step)
    wait_for(lambda: said)
    assert "does not answer, its metrics are kept" in said[0]
    kept = delivery.undelivered()
    assert [item["step"] for item in kept] == [1, 2]
    delivery.close(seconds=5)

    # The process ends; the next one finds what was kept in the checkpoint, and does a step again.
    with server():
        tracker = tracking.Tracker(run_id)
        again = tracking.Delivery(tracker, said.append)
        again.put_all(kept)
        again.put({"loss": 1.0}, 2)
        again.put({"loss": 0.5}, 3)
        wait_for(lambda: not again.undelivered())
        again.close(seconds=5)
        history = tracker.client.get_metric_history(run_id, "loss")
        assert [(m.step, m.value) for m in history] == [(0, 3.0), (1, 2.0), (2, 1.0), (3, 0.5)]
        assert history[1].timestamp == kept[0]["time_ms"]

        # On another machine, which knows of no run: the unfinished one goes on, a finished not.
        taken_over = tracking.start_run("pretrain", "test", {"ray_run": "pretrain-1"})
        assert taken_over.run_id == run_id
        taken_over.finish()
        assert tracking.start_run("pretrain", "test", {"ray_run": "pretrain-1"}).run_id != run_id


@pytest.mark.parametrize("status", ["FINISHED", "FAILED"])
def test_the_pipelines_run_runs_while_one_of_its_stages_does(tmp_path, monkeypatch, status) -> None:
    """Also of a stage that runs alone, such as a sweep after the report; a sweep's trial ends
    neither."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    sweep = tracking.start_run("sweep", "demo", {"stage": "sweep"})
    parent = sweep.client.get_run(sweep.run_id).data.tags["mlflow.parentRunId"]

    def state(run_id: str) -> str:
        return sweep.client.get_run(run_id).info.status

    tracking.start_run("trial", "demo", {}, parent=sweep.run_id).finish()
    assert [state(sweep.run_id), state(parent)] == ["RUNNING", "RUNNING"]
    sweep.finish(status)
    assert [state(sweep.run_id), state(parent)] == [status, status]
    tracking.start_run("pretrain", "demo", {})
    assert state(parent) == "RUNNING"


def test_a_store_of_another_mlflow_is_told_with_how_to_upgrade_it(tmp_path, monkeypatch) -> None:
    store, old = tmp_path / "mlflow.db", tmp_path / "old.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    run_id = tracking.start_run("pretrain", "test", {}).run_id
    shutil.copy(store, old)  # at an address that this process has not opened
    with sqlite3.connect(old) as database:
        database.execute("UPDATE alembic_version SET version_num = '1bd49d398cd23'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{old}")
    with pytest.raises(PipelineError, match="mlflow db upgrade"):
        tracking.start_run("pretrain", "test", {})
    done = CliRunner().invoke(cli.main, ["compare", run_id])
    assert done.exit_code == 1
    assert "error: compare: " in done.output
    assert "mlflow db upgrade" in done.output
