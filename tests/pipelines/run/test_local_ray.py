"""What a local Ray takes from Ray without its promise: a new Ray that breaks it fails here."""

import inspect
import os
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
from ray._private.node import Node

from pipelines.run import environment, idle_agent, local_ray
from pipelines.run.session import ray_session


def test_environment_variables_that_we_set_are_read_by_ray() -> None:
    from ray.dashboard.modules.reporter import reporter_consts
    from ray.train.v2._internal import constants

    known = {value for value in vars(constants).values() if isinstance(value, str)}
    known |= set(vars(reporter_consts))
    text = inspect.getsource(reporter_consts) + inspect.getsource(constants)
    settings = Path(ray._raylet.__file__).read_bytes()  # each is a variable RAY_<name>
    for name in environment.OF_LOCAL:
        is_setting = name.removeprefix("RAY_").encode() in settings
        assert name in known or name in text or is_setting, f"Ray does not read {name} any more"


def test_init_takes_our_arguments() -> None:
    source = inspect.getsource(ray.init)
    for name in local_ray.LOOPBACK | local_ray.FORKED_WORKERS:
        assert name in source, f"ray.init does not take {name} any more"
    settings = Path(ray._raylet.__file__).read_bytes()
    for name in local_ray.FORKED_WORKERS["_system_config"]:
        assert name.encode() in settings, f"Ray has no setting {name} any more"


def test_a_local_ray_is_few_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before, methods = dict(os.environ), dict(vars(Node))
    of_other_tests = set(psutil.Process().children(recursive=True))  # such as multiprocessing's
    try:
        with ray_session(trains=False):
            commands = []
            processes = set(psutil.Process().children(recursive=True)) - of_other_tests
            for process in processes:
                with suppress(psutil.Error):  # it has ended meanwhile
                    commands.append(" ".join(process.cmdline()))
            assert local_ray.raylet_errors().split(":")[0].endswith("raylet.err")
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert dict(vars(Node)) == methods
    told = "\n".join(commands)
    assert "gcs_server" in told
    assert "raylet" in told
    for name in ("monitor.py", "log_monitor.py", "dashboard.py"):
        assert f"/{name}" not in told
    agents = [one for one in commands if one.startswith(sys.executable)]
    assert len(agents) == 2
    assert all(idle_agent.__file__ in agent for agent in agents)
    assert psutil.wait_procs(processes, timeout=10)[1] == []
