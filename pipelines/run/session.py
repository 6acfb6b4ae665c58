"""Ray as a stage uses it: a local instance, or the cluster of `RAY_ADDRESS`."""

import importlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.errors import PipelineError
from pipelines.params import Params
from pipelines.paths import SHARED
from pipelines.run import environment, fork_server, local_ray, preflight
from pipelines.run.display import track
from pipelines.run.forked_worker import ADDRESS
from pipelines.run.scratch import remove_abandoned
from pipelines.run.tracking_uri import modules_of_store, tracking_uri


@dataclass(frozen=True)
class Session:
    """A connected Ray."""

    local: bool
    """It is this driver's own, listens on loopback only, and ends with the driver."""


@contextmanager
def ray_session(
    trains: bool = True,
    trials: bool = False,
    check: "Future[Any] | None" = None,
    preload: Sequence[str] = (),
) -> Iterator[Session]:
    """Connect to `RAY_ADDRESS`, else start a Ray of our own that listens on loopback only.

    A Ray of our own leaves out what only takes time from training: on two cores each of its
    processes is felt.

    Args:
        trains: `fit` is to run in it.
        trials: `fit` is to run trials of a sweep in it.
        check: runs in another thread, and may import what the driver needs, too.
        preload: modules that the workers of a Ray of our own have imported when they start. They
            are of the fork server that runs already, if one does.

    Raises:
        PipelineError: too little memory for a local Ray, one that does not start, or no cluster at
            the address.
    """
    address = os.environ.get("RAY_ADDRESS")
    forks = bool(preload) and not address
    arguments = _to_cluster(address) if address else _to_own(trials, forks)
    importing = threading.Thread(target=_import_for_driver, args=(trains, check), daemon=True)
    with ExitStack() as stack:
        try:
            if forks and ADDRESS not in os.environ:
                stack.enter_context(fork_server.forking(preload, trains))
            importing.start()
            if address:
                _reach(address)
            with nullcontext() if address else local_ray.few_processes(trials, forks):
                ray.init(**arguments, log_to_driver=False, logging_level=logging.ERROR)
            if forks:
                _ask_for_worker()
        except Exception as error:  # Ray has no class for processes that are too slow to start
            ray.shutdown()
            raise _unusable(address, error) from error
        try:
            importing.join()
            yield Session(local=not address)
        finally:
            workers = _workers()
            ray.shutdown()
            _end(workers | _workers())
            remove_abandoned()


def _to_cluster(address: str) -> dict[str, Any]:
    """Arguments of `ray.init`."""
    return {"address": address, "runtime_env": {"env_vars": environment.OF_ALL}}


def _to_own(trials: bool, forks: bool) -> dict[str, Any]:
    """Arguments of `ray.init`, and the environment."""
    preflight.check_memory()
    environment.set_local()
    return {
        "address": "local",
        # Ray Train asks it whether the controller of a trial still lives.
        "include_dashboard": trials,
        "dashboard_host": "127.0.0.1",
        "object_store_memory": preflight.OBJECT_STORE,
        **local_ray.LOOPBACK,
        **(local_ray.FORKED_WORKERS if forks else {}),
    }


def _ask_for_worker() -> None:
    """Have the fork server make one, for which it imports Ray, while the driver still imports."""

    @ray.remote(num_cpus=0)
    def first_worker() -> None:
        pass

    first_worker.remote()


def _reach(address: str) -> None:
    """Knock at a cluster's address: Ray would try for a minute, where nobody is.

    Raises:
        OSError: nobody answers.
    """
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        with socket.create_connection((host, int(port)), timeout=10):
            pass


def _workers() -> set[psutil.Process]:
    """The processes of this driver's own Ray that run Python code of its tasks and actors, or that
    were forked to do so and are not known to Ray yet. Of a cluster, none."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            command = process.cmdline()
            forked = fork_server.__name__ in command and process.ppid() != os.getpid()
            if forked or "".join(command[:1]).startswith("ray::"):
                found.add(process)
    return found


def _end(workers: set[psutil.Process]) -> None:
    """Kill those that outlive Ray: one whose end meets a lock of Ray's own that nobody opens, or
    that begins when Ray ends. They would stay with all of their memory."""
    _, alive = psutil.wait_procs(workers, timeout=2)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=2)


def _import_for_driver(trains: bool, check: "Future[Any] | None") -> None:
    """Import what the driver needs next and takes seconds, beside the start of Ray's processes.

    After the check, as two threads that import may each get the half of what the other has begun.
    """
    if check and check.exception():  # which it waits for
        return
    fit = ["torch", "pipelines.run.fit"] if trains else []
    for module in (*fit, *modules_of_store()):
        importlib.import_module(module)


def _unusable(address: str | None, error: Exception) -> PipelineError:
    if not address:
        fix = (
            "Start it again where other programs have kept the processors or the memory busy; else"
            " see /tmp/ray/session_latest/logs"
        )
        return PipelineError(f"a local Ray can't be started: {error}", fix)
    return PipelineError(
        f"the cluster at RAY_ADDRESS={address} can't be used: {error}",
        "Check that RAY_ADDRESS names a running cluster with this version of Ray, and that"
        " ~/.ray/auth_token is the cluster's",
    )


def at_once(stage: str, params: Params, data: Mapping[str, str]) -> int:
    """How many runs like this the cluster has room for; at least 1.

    Raises:
        PipelineError: a node lacks something, or there is no room for one.
    """
    scaling = params.scaling
    needs = preflight.Needs(storage_path(params), tracking_uri(), data, scaling.use_gpu)
    preflight.require(stage, scaling, needs)
    places = (preflight.places_on(node["Resources"], scaling) for node in preflight.alive_nodes())
    return sum(places) // scaling.num_workers


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Schedules a task on the driver's node, whose files it reads or writes."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def each(
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    unit: str,
    done: Callable[[Any], None],
) -> None:
    """Call `function` with each tuple of arguments, spread over the nodes, with progress.

    `done` gets each result here as it comes. The first error ends it.
    """
    task = ray.remote(function).options(scheduling_strategy="SPREAD")
    name = os.environ.get("DVC_STAGE") or function.__module__.rsplit(".", 1)[-1]
    track([task.remote(*one) for one in arguments], name, unit, done)


def storage_path(params: Params) -> str:
    """`storage.path`, absolute if it is a folder."""
    path = params.storage.path
    return path if "://" in path else str((SHARED / path).resolve())
