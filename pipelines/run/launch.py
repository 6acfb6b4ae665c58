"""Ray: a local instance or the cluster of `RAY_ADDRESS`, and the only `TorchTrainer` wiring."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.train
from ray.exceptions import ActorDiedError, ActorUnschedulableError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.errors import PipelineError
from pipelines.params import ROOT, Params
from pipelines.run import reporting, tracking

OBJECT_STORE = 512 * 2**20
NEEDED_MEMORY = 2 * 2**30
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108


@contextmanager
def ray_session() -> Iterator[None]:
    """Connect to `RAY_ADDRESS`, else start a Ray of our own that listens on loopback only.

    Raises:
        PipelineError: too little memory for a local Ray, or no cluster at the address.
    """
    address = os.environ.get("RAY_ADDRESS")
    environment = {"PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true"}
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address:
        common |= {"address": address}
    else:
        _check_memory()
        environment["GLOO_SOCKET_IFNAME"] = "lo"
        # Its process takes seconds of a small machine's start, and no cloud preempts this one.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        common |= {
            "address": "local",
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "object_store_memory": OBJECT_STORE,
            "_node_ip_address": "127.0.0.1",
        }
    try:
        ray.init(runtime_env={"env_vars": environment}, **common)
    except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
        where = f"the cluster at RAY_ADDRESS={address}" if address else "a local Ray"
        raise PipelineError(f"{where} can't be used: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_memory() -> None:
    free = psutil.virtual_memory().available
    if free < NEEDED_MEMORY:
        raise PipelineError(
            f"not enough memory: {free / 2**30:.1f} GiB free, a local Ray and its workers need"
            f" {NEEDED_MEMORY / 2**30:.0f} GiB. End other programs, or set RAY_ADDRESS to a cluster"
        )
    shared = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    if shared < OBJECT_STORE:
        raise PipelineError(
            f"not enough shared memory for Ray's object store: {shared / 2**20:.0f} MiB free in"
            f" /dev/shm, {OBJECT_STORE / 2**20:.0f} MiB needed. Free some (`ls -la /dev/shm`), or"
            " give a container more (`docker run --shm-size=2g`)"
        )


def _needed(params: Params) -> dict[str, int]:
    scaling = params.scaling
    need = {"CPU": scaling.num_workers * scaling.cpus_per_worker}
    return need | ({"GPU": scaling.num_workers} if scaling.use_gpu else {})


def at_once(params: Params) -> int:
    """How many runs like this the cluster has room for; at least 1.

    Raises:
        PipelineError: there is none for one.
    """
    _check_resources(params)
    have = ray.cluster_resources()
    return int(min(have[kind] // n for kind, n in _needed(params).items()))


def _check_resources(params: Params) -> None:
    """An infeasible request would wait forever."""
    have, scaling, need = ray.cluster_resources(), params.scaling, _needed(params)
    short = [
        f"{n} {kind} needed, {have.get(kind, 0):g} there"
        for kind, n in need.items()
        if have.get(kind, 0) < n
    ]
    if short:
        raise PipelineError(
            f"Ray has too few resources for scaling.num_workers={scaling.num_workers}"
            f" (cpus_per_worker={scaling.cpus_per_worker}, use_gpu={scaling.use_gpu}):"
            f" {'; '.join(short)}. Lower scaling.* or use a larger cluster"
        )


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
    reporting.track([task.remote(*one) for one in arguments], name, unit, done)


def storage_path(params: Params) -> str:
    """`storage.path`, absolute if it is a folder."""
    path = params.storage.path
    return path if "://" in path else str((ROOT / path).resolve())


def fit(
    train_loop: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    params: Params,
    *,
    name: str,
    mlflow_run_id: str,
    trial: bool = False,
    callbacks: Sequence[Any] = (),
) -> "ray.train.Checkpoint":
    """Run `train_loop` on the workers as Ray Train run `name`; the last checkpoint.

    A run of that name that did not finish goes on from its last checkpoint. The loop gets
    `config` with the key `reporting`, for `RayReporter`. A trial of a sweep shows no progress of
    its own.

    Raises:
        PipelineError: too few resources, or training failed for good.
    """
    _check_resources(params)
    scaling = params.scaling
    with nullcontext() if trial else reporting.display(name.rsplit("-", 1)[0]) as shown:
        trainer = TorchTrainer(
            _on_worker(train_loop),
            train_loop_config=config
            | {"reporting": reporting.Reporting(mlflow_run_id, tracking.tracking_uri(), shown)},
            scaling_config=ScalingConfig(
                num_workers=scaling.num_workers,
                use_gpu=scaling.use_gpu,
                resources_per_worker={"CPU": scaling.cpus_per_worker}
                | ({"GPU": 1} if scaling.use_gpu else {}),
            ),
            run_config=RunConfig(
                name=name,
                storage_path=storage_path(params),
                failure_config=FailureConfig(max_failures=scaling.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                callbacks=list(callbacks),
            ),
            torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        )
        try:
            result = trainer.fit()
        except SystemExit as stop:
            # Ray Train ends an interrupted driver with code 0, which DVC takes for success.
            raise KeyboardInterrupt from stop
        except (ActorDiedError, ActorUnschedulableError) as error:
            raise PipelineError(
                f"Ray could not keep the controller of {name} running; start the stage again, it"
                f" goes on from its last checkpoint. {error}\n{_raylet_errors()}"
            ) from error
        except ray.train.TrainingFailedError as error:
            raise PipelineError(f"training failed: {_cause(error)}") from error
    if result.checkpoint is None:
        raise PipelineError(f"run {name} ended without a checkpoint; see storage/{name}")
    return result.checkpoint


def last_checkpoint(name: str, params: Params) -> "ray.train.Checkpoint | None":
    """The last checkpoint of Ray Train run `name`; None if the storage has none."""
    try:
        return ray.train.Result.from_path(f"{storage_path(params)}/{name}").checkpoint
    except RuntimeError:
        return None


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

        # Denormal numbers, mostly in Adam's second moments, cost a third of the speed of a CPU.
        torch.set_flush_denormal(True)
        train_loop(config)

    return run


def _cause(error: "ray.train.TrainingFailedError") -> str:
    """The workers' own errors, which Ray wraps."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        return "; ".join(f"worker {rank}: {failure}" for rank, failure in failures.items())
    return str(error)
