"""A Ray of this driver's own, on loopback and in few processes, by Ray's private parts.

`tests/pipelines/run/test_local_ray.py` holds each of them: a new Ray shows there what it broke.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import utils
from ray._private.node import Node

from pipelines.run import forked_worker

ENVIRONMENT = {
    # Its process takes seconds of a small machine's start, and no cloud preempts this one.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # A worker's report waits for the controller's next look at it, every 2 s otherwise.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # The node's agent collects what the dashboard would show, every 5 s otherwise.
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    # The controller waits for Ray within a coroutine, of which Ray warns; Ray Train sets it, too.
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
}
"""Variables, without a promise of Ray, that a Ray of this driver's own reads."""
LOOPBACK = {"_node_ip_address": "127.0.0.1"}
"""Argument of `ray.init` that keeps a local Ray off the network."""
NO_PRESTART = {"_system_config": {"prestart_worker_first_driver": False}}
"""Argument of `ray.init` that does not have it wait for as many workers as there are processors:
the fork server makes one sooner than it has imported all."""


def prepare_environment() -> None:
    """Set `ENVIRONMENT`, where the user has not."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def few_processes(dashboard: bool, forks: bool) -> Iterator[None]:
    """What `ray.init` starts within it has no autoscaler and log monitor, or no dashboard either.

    Without one the node's agent has only what Ray itself asks it for. Each of them takes a second
    or more of a small machine, most before `ray.init` returns, which has no argument for it.
    Replaces `Node.start_monitor`, `start_log_monitor` and `start_api_server`, and
    `utils.get_dashboard_dependency_error`, by which Ray knows an installation without a dashboard.

    Args:
        forks: its workers come from the fork server. Replaces `Node.start_raylet`, to change the
            `setup_worker_path` of `Node._ray_params`, by which Ray starts workers.
    """
    nothing: Any = lambda self, **arguments: None  # noqa: E731
    missing: Any = lambda: ImportError("a local Ray has no dashboard")  # noqa: E731
    replaced: list[tuple[Any, str, Any]] = [
        (Node, "start_monitor", nothing),
        (Node, "start_log_monitor", nothing),
    ]
    if not dashboard:
        replaced.append((Node, "start_api_server", nothing))
        replaced.append((utils, "get_dashboard_dependency_error", missing))
    if forks:
        replaced.append((Node, "start_raylet", _start_raylet))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


_START_RAYLET = Node.start_raylet


def _start_raylet(node: Any, *args: Any, **kwargs: Any) -> None:
    node._ray_params.setup_worker_path = forked_worker.__file__
    _START_RAYLET(node, *args, **kwargs)


def raylet_errors(lines: int = 20) -> str:
    """The last lines of this node's raylet.err, where Ray says why a process did not start; empty
    where this process did not start the node. Touches `ray._private.worker._global_node`."""
    node: Any = ray._private.worker._global_node
    if node is None:  # a trial's own process
        return ""
    log = Path(node.get_logs_dir_path()) / "raylet.err"
    found = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return "\n".join([f"{log}:", *found[-lines:]])
