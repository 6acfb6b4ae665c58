"""A Ray of this driver's own, on loopback and in few processes, by Ray's private parts.

`tests/pipelines/run/test_local_ray.py` holds each of them: a new Ray shows there what it broke.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from itertools import chain
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants, services
from ray._private.node import Node

from pipelines.run import forked_worker, idle_agent

LOOPBACK = {"_node_ip_address": "127.0.0.1"}
"""Argument of `ray.init` that keeps a local Ray off the network."""
FORKED_WORKERS = {
    "_system_config": {
        # It would wait for as many as there are processors, which come when all is imported.
        "prestart_worker_first_driver": False,
        # The end of a process with such libraries keeps a processor busy for seconds, while
        # another may measure.
        "idle_worker_killing_time_threshold_ms": 24 * 3600 * 1000,
    }
}
"""Argument of `ray.init` for a Ray whose workers are forked."""


@contextmanager
def few_processes(dashboard: bool, forks: bool) -> Iterator[None]:
    """What `ray.init` starts within it has no autoscaler and log monitor, or no dashboard either.

    Without a dashboard the node has no agents: there is nothing that shows what they would collect,
    and no task may have a runtime environment, which one of them makes. Each of these processes
    takes up to a second of a processor, most before `ray.init` returns, which has no argument for
    it. Replaces `Node.start_monitor`, `start_log_monitor`, `start_api_server` and `start_raylet`,
    and the function of `ray._private.services` that tells what an agent is started with.

    Args:
        forks: its workers come from the fork server.
    """
    nothing: Any = lambda self, **arguments: None  # noqa: E731
    replaced: list[tuple[Any, str, Any]] = [
        (Node, "start_monitor", nothing),
        (Node, "start_log_monitor", nothing),
    ]
    if not dashboard:
        replaced.append((Node, "start_api_server", nothing))
        replaced.append((services, PYTHON_OF, _python_of))
    replaced.append((Node, "start_raylet", partialmethod(_start_raylet, dashboard, forks)))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


_RAYLET: Any = ray._raylet  # whose types are not told
PYTHON_OF = "_build_python_executable_command_memory_profileable"
_PYTHON_OF: Any = getattr(services, PYTHON_OF)
_START_RAYLET = Node.start_raylet
AGENTS = {
    ray_constants.PROCESS_TYPE_DASHBOARD_AGENT: (
        _RAYLET.METRICS_AGENT_PORT_NAME,
        _RAYLET.METRICS_EXPORT_PORT_NAME,
        _RAYLET.DASHBOARD_AGENT_LISTEN_PORT_NAME,
    ),
    ray_constants.PROCESS_TYPE_RUNTIME_ENV_AGENT: (_RAYLET.RUNTIME_ENV_AGENT_PORT_NAME,),
}
"""The agents of a node, and the files in which the raylet looks for their ports."""


def _python_of(component: str, session: str, *arguments: Any, **options: Any) -> list[str]:
    if component in AGENTS:
        return [sys.executable, "-S", idle_agent.__file__]
    command: list[str] = _PYTHON_OF(component, session, *arguments, **options)
    return command


def _start_raylet(node: Any, dashboard: bool, forks: bool, *args: Any, **options: Any) -> None:
    """Ray's, with `setup_worker_path` of `Node._ray_params`, by which it starts workers, changed.

    Without agents it is told of each that it serves nobody, as Ray tells of one that does not.
    """
    if forks:
        node._ray_params.setup_worker_path = forked_worker.__file__
    for name in () if dashboard else chain(*AGENTS.values()):
        _RAYLET.persist_port(node.get_session_dir_path(), node.node_id, name, -1)
    _START_RAYLET(node, *args, **options)


def spare_generator_of_ids() -> None:
    """Let classes of actors, which modules define when they are imported, take their ids from the
    system. Processes that are forked after Ray's own generator was used all make the same ids, of
    placement groups too. Replaces `ray.actor.ActorClassID`."""

    class Ids:
        @staticmethod
        def from_random() -> Any:
            return _RAYLET.ActorClassID(os.urandom(_RAYLET.ActorClassID.size()))

    actors: Any = importlib.import_module("ray.actor")
    actors.ActorClassID = Ids


def raylet_errors(lines: int = 20) -> str:
    """The last lines of this node's raylet.err, where Ray says why a process did not start; empty
    where this process did not start the node. Touches `ray._private.worker._global_node`."""
    node: Any = ray._private.worker._global_node
    if node is None:  # a trial's own process
        return ""
    log = Path(node.get_logs_dir_path()) / "raylet.err"
    found = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return "\n".join([f"{log}:", *found[-lines:]])
