"""A Ray that can't be had is told in one message, and one that was had leaves nothing."""

import atexit
import os
import socket
import time
from typing import Any

import psutil
import pytest
import ray

from pipelines.errors import PipelineError
from pipelines.run.session import ray_session


def test_a_ray_that_does_not_start(monkeypatch: Any) -> None:
    def too_slow(**options: Any) -> None:
        raise Exception("The current node timed out during startup.")  # as Ray does

    monkeypatch.setattr(ray, "init", too_slow)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    message = r"a local Ray can't be started: .*timed out.*other programs"
    with pytest.raises(PipelineError, match=message), ray_session():
        pass


def test_a_cluster_that_is_gone(monkeypatch: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    message = rf"the cluster at RAY_ADDRESS={address} can't be used: .*Connection refused"
    with pytest.raises(PipelineError, match=message), ray_session():
        pass


@ray.remote(num_cpus=0)
class Stuck:
    """Ends for Ray, and stays as a process."""

    def pid(self) -> int:
        return os.getpid()

    def leave(self) -> None:
        atexit.register(time.sleep, 600)
        ray.actor.exit_actor()


def test_no_worker_outlives_a_local_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = dict(os.environ)
    try:
        with ray_session(trains=False):
            actor = Stuck.remote()
            process = psutil.Process(ray.get(actor.pid.remote()))
            with pytest.raises(ray.exceptions.RayActorError):
                ray.get(actor.leave.remote())
    finally:
        os.environ.clear()
        os.environ.update(before)
    _, alive = psutil.wait_procs([process], timeout=5)
    assert not alive
