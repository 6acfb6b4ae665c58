"""Ray: a local instance or the cluster of `RAY_ADDRESS`, and the only `TorchTrainer` wiring."""

import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import ActorDiedError, ActorUnschedulableError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.errors import PipelineError
from pipelines.params import Params
from pipelines.paths import ROOT, SHARED
from pipelines.run import checkpoints as storage
from pipelines.run import preflight, tracking
from pipelines.run import reporter as reporting
from pipelines.run.display import showing, track
from pipelines.run.ray_internals import LoopbackTorchConfig

OUT_OF_MEMORY = (
    "a GPU's memory is too small: raise accumulate (smaller passes, the same batch), or turn on"
    " pretrain.grad_checkpointing, detect.with_cp or segment.with_cp"
)


@contextmanager
def ray_session(trials: bool = False) -> Iterator[None]:
    """Connect to `RAY_ADDRESS`, else start a Ray of our own that listens on loopback only.

    A Ray of our own leaves out what only takes time from training: on two cores each of its
    processes is felt.

    Args:
        trials: `fit` is to run trials of a sweep in it.

    Raises:
        PipelineError: too little memory for a local Ray, or no cluster at the address.
    """
    address = os.environ.get("RAY_ADDRESS")
    environment = {"PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true"}
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        common |= {"address": address}
    else:
        preflight.check_memory()
        environment |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        # Its process takes seconds of a small machine's start, and no cloud preempts this one.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # A worker's report waits for the controller's next look at it, every 2 s otherwise.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
        # The node's agent collects what the dashboard would show, every 5 s otherwise.
        os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")
        common |= {
            "address": "local",
            # Ray Train asks it whether the controller of a trial still lives.
            "include_dashboard": trials,
            "dashboard_host": "127.0.0.1",
            "object_store_memory": preflight.OBJECT_STORE,
            "_node_ip_address": "127.0.0.1",
        }
    try:
        ray.init(runtime_env={"env_vars": environment}, **common)
    except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
        where = f"the cluster at RAY_ADDRESS={address}" if address else "a local Ray"
        mend = (
            "Check that RAY_ADDRESS names a running cluster with this version of Ray, and that"
            " ~/.ray/auth_token is the cluster's"
            if address
            else "See /tmp/ray/session_latest/logs"
        )
        raise PipelineError(f"{where} can't be used: {error}. {mend}") from error
    try:
        if not address:
            node: Any = ray._private.worker._global_node
            node.kill_log_monitor()  # it would send the workers' output to a driver that wants none
        yield
    finally:
        ray.shutdown()


def worker_environment() -> dict[str, str]:
    """What makes glibc keep a step's memory for the next; the user's own `GLIBC_TUNABLES` win.

    It gives large tensors back when they are freed, the sooner in threads like that of a worker:
    each step pays for all of its pages anew, a sixth of its time on a CPU.
    """
    name, version = platform.libc_ver()
    # Before 2.35 it refuses so large a threshold, and stops adapting its own.
    if name != "glibc" or tuple(map(int, version.split("."))) < (2, 35):
        return {}
    settings = {"mmap_threshold": 2**30, "trim_threshold": 2**32, "arena_max": 1, "hugetlb": 1}
    wish = ":".join(f"glibc.malloc.{name}={value}" for name, value in settings.items())
    return {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", wish)}


def at_once(stage: str, params: Params, data: Mapping[str, str]) -> int:
    """How many runs like this the cluster has room for; at least 1.

    Raises:
        PipelineError: a node lacks something, or there is no room for one.
    """
    _require(stage, params, data)
    places = (
        preflight.places_on(node["Resources"], params.scaling) for node in preflight.alive_nodes()
    )
    return sum(places) // params.scaling.num_workers


def _require(stage: str, params: Params, data: Mapping[str, str]) -> None:
    use_gpu = params.scaling.use_gpu
    needs = preflight.Needs(storage_path(params), tracking.tracking_uri(), data, use_gpu)
    preflight.require(stage, params.scaling, needs)


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


def fit(
    train_loop: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    params: Params,
    *,
    name: str,
    mlflow_run_id: str,
    data: Mapping[str, str],
    stops: bool = False,
    elastic: bool = False,
    trial: bool = False,
    callbacks: Sequence[Any] = (),
) -> "ray.train.Checkpoint":
    """Run `train_loop` on the workers as Ray Train run `name`; the last checkpoint.

    A run of that name that did not finish goes on from its last checkpoint. The loop gets
    `config` with the key `reporting`, for `RayReporter`. A trial of a sweep shows no progress of
    its own.

    Args:
        data: the data set by name, and the folder or URL that every worker reads it from.
        stops: the loop writes a checkpoint and ends where `reporter.stopping()`; then the first
            Ctrl-C or SIGTERM asks it to. Else, and with the second, the run ends at once.
        elastic: the loop runs on any number of workers from `scaling.min_workers` on, where that
            is set.

    Raises:
        PipelineError: a node lacks something, or training failed for good.
    """
    scaling, workers = params.scaling, params.scaling.num_workers
    least = (elastic and scaling.min_workers) or workers
    if not trial:  # a sweep looks once, for all its trials
        fewest = scaling.model_copy(update={"num_workers": least})
        _require(name.split("-")[0], params.model_copy(update={"scaling": fewest}), data)
    run = f"{storage_path(params)}/{name}"
    with showing(name.rsplit("-", 1)[0], quiet=trial) as shown:
        storage.mend(run, lambda line: shown.line.remote(line))
        told = reporting.Reporting(mlflow_run_id, tracking.tracking_uri(), shown, run)
        trainer = (_Trainer if trial or not _is_local() else _LocalTrainer)(
            _on_worker(train_loop),
            train_loop_config=config | {"reporting": told},
            scaling_config=ScalingConfig(
                num_workers=workers if least == workers else (least, workers),  # type: ignore[arg-type]
                use_gpu=scaling.use_gpu,
                resources_per_worker=preflight.bundle(scaling),
            ),
            run_config=RunConfig(
                name=name,
                storage_path=storage_path(params),
                failure_config=FailureConfig(max_failures=scaling.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                callbacks=[reporting.Failures(shown), *callbacks],  # type: ignore[list-item]
                worker_runtime_env={"env_vars": worker_environment()},  # type: ignore[call-arg]
            ),
            torch_config=(LoopbackTorchConfig if _is_local() else TorchConfig)(
                backend="nccl" if scaling.use_gpu else "gloo"
            ),
        )
        try:
            with _signals(shown if stops else None):
                trainer.fit()
        except (ActorDiedError, ActorUnschedulableError) as error:
            raise PipelineError(
                f"Ray could not keep the controller of {name} running; start the stage again, it"
                f" goes on from its last checkpoint. {error}\n{_raylet_errors()}"
            ) from error
        except ray.train.TrainingFailedError as error:
            message = ray.get(shown.failure.remote()) or f"training failed: {_cause(error)}"
            raise PipelineError(message) from error
        if message := ray.get(shown.failure.remote()):
            raise PipelineError(message)
        if ray.get(shown.stopping.remote()):
            raise KeyboardInterrupt
    checkpoint = storage.newest_complete(run)
    if checkpoint is None:
        raise PipelineError(f"run {name} ended without a checkpoint in storage.path")
    with checkpoint.as_directory() as folder:
        tracker = tracking.Tracker(mlflow_run_id)
        for item in reporting.read_undelivered(Path(folder)):
            tracker.log_metrics(**item)
    return checkpoint


def _is_local() -> bool:
    """Ray's address is set in the processes of a local Ray too: its interface tells."""
    return os.environ.get("GLOO_SOCKET_IFNAME") == "lo" or not os.environ.get("RAY_ADDRESS")


class _Trainer(TorchTrainer):
    """Ray's, without what no run of ours needs.

    The driver's signals stay ours: Ray would end an interrupted driver with code 0, which DVC
    takes for success. Our data don't come from Ray Data, whose manager is a process per run.
    """

    unneeded: tuple[type, ...] = (DatasetsCallback,)

    def _register_sigint_handler(self, controller: Any) -> None:
        pass

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        return [one for one in callbacks if not isinstance(one, self.unneeded)]


class _LocalTrainer(_Trainer):
    """For a Ray that ends with this driver: nobody else waits for a dead controller's resources."""

    unneeded = (DatasetsCallback, PlacementGroupCleanerCallback)


@contextmanager
def _signals(display: Any) -> Iterator[None]:
    """Within it SIGINT and SIGTERM end the run; with a display, the first only asks it to stop."""
    asked = False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        if display is None or asked:
            raise KeyboardInterrupt
        asked = True
        display.stop.remote()
        display.line.remote("stopping after a checkpoint; Ctrl-C again stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def forget(checkpoint: "ray.train.Checkpoint") -> None:
    """Delete the storage of the run that made `checkpoint`, of which nothing more is needed."""
    run, _, _ = checkpoint.path.rpartition("/")
    assert checkpoint.filesystem is not None
    checkpoint.filesystem.delete_dir(run)


def last_checkpoint(name: str, params: Params) -> "ray.train.Checkpoint | None":
    """The newest whole checkpoint of Ray Train run `name`; None if the storage has none."""
    return storage.newest_complete(f"{storage_path(params)}/{name}")


def _raylet_errors() -> str:
    """The last lines of this node's raylet.err, where Ray says why a process did not start."""
    node: Any = ray._private.worker._global_node
    if node is None:  # a trial's own process
        return ""
    log = Path(node.get_logs_dir_path()) / "raylet.err"
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return "\n".join([f"{log}:", *lines[-20:]])


def _on_worker(train_loop: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def run(config: dict[str, Any]) -> None:
        import torch

        display = config["reporting"].display
        if ray.get(display.failure.remote()):
            return  # Ray tries a failed worker again; this failure would only be repeated
        # Denormal numbers, of which training makes many, cost a third of the speed of a CPU.
        torch.set_flush_denormal(True)
        try:
            train_loop(config)
        except torch.OutOfMemoryError as error:
            ray.get(display.fail.remote(f"{OUT_OF_MEMORY} ({str(error).splitlines()[0]})"))
            raise
        except PipelineError as error:
            ray.get(display.fail.remote(str(error)))
            raise

    return run


def _cause(error: "ray.train.TrainingFailedError") -> str:
    """The workers' own errors, which Ray wraps."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        return "; ".join(f"worker {rank}: {failure}" for rank, failure in failures.items())
    return str(error)
