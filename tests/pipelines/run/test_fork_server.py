"""Forked workers of a local Ray: what they have, and what stays when something is killed."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from pipelines.paths import ROOT
from pipelines.run.forked_worker import ADDRESS
from pipelines.run.session import ray_session

MODULE = "pipelines.train.schedule"
"""Nothing that Ray imports by itself."""


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@ray.remote(num_cpus=0)
class Worker:
    def look(self) -> tuple[int, int, bool, str]:
        """Its process and group, whether it has the module, and a variable."""
        return os.getpid(), os.getpgid(0), MODULE in sys.modules, os.environ["OF_THE_DRIVER"]


def fork_server() -> psutil.Process:
    (found,) = (
        child
        for child in psutil.Process().children()
        if "pipelines.run.fork_server" in child.cmdline()
    )
    return found


def test_a_worker_has_the_imports_and_the_drivers_environment() -> None:
    os.environ["OF_THE_DRIVER"] = "here"
    with ray_session(trains=False, preload=[MODULE, "no.such.module"]):
        server, folder = fork_server(), Path(os.environ[ADDRESS]).parent
        with socket.socket(socket.AF_UNIX) as one_that_is_killed:
            one_that_is_killed.connect(os.environ[ADDRESS])
        assert folder.stat().st_mode & 0o777 == 0o700, "whoever connects runs code"
        process, group, loaded, variable = ray.get(Worker.remote().look.remote())
        assert psutil.Process(process).parent() == server
        assert group == process, "Ray kills the group of a worker that has ended"
        assert (loaded, variable) == (True, "here")
    assert not server.is_running()
    assert not psutil.pid_exists(process)
    assert not folder.exists()
    assert ADDRESS not in os.environ


def test_without_the_fork_server_a_worker_starts_by_itself() -> None:
    os.environ["OF_THE_DRIVER"] = "here"
    with ray_session(trains=False, preload=[MODULE]):
        first = Worker.remote()
        before = ray.get(first.look.remote())
        server = fork_server()
        server.kill()
        server.wait()
        assert ray.get(first.look.remote()) == before, "it died with the fork server"
        others = [Worker.remote() for _ in range(2)]  # one may be of a process that waited
        found = [ray.get(other.look.remote())[2:] for other in others]
        assert (False, "here") in found


def test_a_worker_with_a_runtime_environment_gets_it() -> None:
    """From Ray, where that is more than values, or a setting that the fork server read already."""
    os.environ["OF_THE_DRIVER"] = "here"
    # Only a Ray for trials has the agent that makes such environments.
    with ray_session(trains=False, trials=True, preload=[MODULE]):
        for variables, expected, forked in (
            ({"OF_THE_DRIVER": "other"}, "other", True),
            ({"OF_THE_DRIVER": "${HOME}/x"}, os.path.expandvars("${HOME}/x"), False),
            ({"RAY_task_retry_delay_ms": "7"}, "here", False),
        ):
            worker = Worker.options(runtime_env={"env_vars": variables}).remote()
            _, _, loaded, variable = ray.get(worker.look.remote())
            assert (loaded, variable) == (forked, expected)


@ray.remote(num_cpus=0)
def busy() -> int:
    time.sleep(2)
    return os.getpid()


def test_idle_workers_are_kept() -> None:
    """The end of one keeps a processor busy, while another may measure."""
    with ray_session(trains=False, preload=[MODULE]):
        processes = set(ray.get([busy.remote() for _ in range(6)]))
        assert len(processes) > len(os.sched_getaffinity(0)), "Ray keeps as many in any case"
        time.sleep(5)
        assert all(map(psutil.pid_exists, processes))


def test_the_fork_server_ends_with_a_killed_driver() -> None:
    code = (
        "import os, time\n"
        "from pipelines.run.fork_server import forking\n"
        f"with forking(['{MODULE}'], trains=False):\n"
        f"    print(os.environ['{ADDRESS}'], flush=True)\n"
        "    time.sleep(600)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout
        folder = Path(driver.stdout.readline()).parent
        (server,) = psutil.Process(driver.pid).children()
        driver.kill()
    psutil.wait_procs([server], timeout=30)
    assert not server.is_running()
    assert not folder.exists()
