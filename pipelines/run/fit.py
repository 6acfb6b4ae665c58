"""One Ray Train run: the only place that makes a `TorchTrainer`."""

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.exceptions import ActorDiedError, ActorUnschedulableError
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig

from pipelines.errors import PipelineError
from pipelines.params import Scaling
from pipelines.run import checkpoints, preflight, reporter, tracking
from pipelines.run.display import showing
from pipelines.run.environment import worker_environment
from pipelines.run.local_ray import raylet_errors
from pipelines.run.ray_internals import (
    LocalTrainer,
    LoopbackTorchConfig,
    ResumingTorchConfig,
    Trainer,
)
from pipelines.run.scratch import scratch_folder
from pipelines.run.trace import mark
from pipelines.run.tracking_uri import tracking_uri
from pipelines.train.reporter import Reporter

if TYPE_CHECKING:
    import torch

Loop = Callable[[Any, "torch.device", Reporter], None]
"""What a worker runs: the job, its device, and who hears of progress."""
OUT_OF_MEMORY = (
    "a GPU's memory is too small: raise shares (smaller passes, the same batch), or turn on"
    " pretrain.grad_checkpointing, detect.with_cp or segment.with_cp"
)


@dataclass(frozen=True)
class RunSpec:
    """A Ray Train run: its name, and where and how it runs."""

    stage: str
    """Shown beside its progress."""
    name: str
    """Of the run in the storage. A run of this name that did not finish resumes."""
    mlflow_run_id: str
    scaling: Scaling
    storage: str
    """An absolute folder, or a URL."""
    data: Mapping[str, str]
    """The data set by name, and the folder or URL that every worker reads it from."""
    local: bool
    """The connected Ray is this driver's own."""
    stops: bool = False
    """The loop writes a checkpoint and ends where `reporter.stopping()`; then the first Ctrl-C or
    SIGTERM asks it to. Else, and with the second, the run ends at once."""
    elastic: bool = False
    """The loop runs on any number of workers from `scaling.min_workers` on, where that is set."""
    keep_checkpoints: int = 2
    """The last so many; 0: all."""
    trial: bool = False
    """A trial of a sweep: it shows no progress of its own."""
    stop_after_s: float = math.inf
    """Then it is asked to stop as by a Ctrl-C: its budget is spent."""

    @property
    def path(self) -> str:
        """Folder or URL of the run."""
        return f"{self.storage}/{self.name}"

    @property
    def fewest_workers(self) -> int:
        """With fewer it waits."""
        return (self.elastic and self.scaling.min_workers) or self.scaling.num_workers


def fit(
    loop: Loop, job: Any, spec: RunSpec, callbacks: Sequence[Any] = ()
) -> "ray.train.Checkpoint":
    """Run `loop(job, device, reporter)` on all workers; the last checkpoint.

    A run of the name that did not finish resumes from its last checkpoint.

    Args:
        job: sent to the workers.
        callbacks: of Ray Train; those of a trial that Tune may stop early.

    Raises:
        PipelineError: a node lacks something, or training failed for good.
        KeyboardInterrupt: it was asked to stop, and did after a checkpoint.
    """
    if not spec.trial:  # a sweep looks once, for all its trials
        fewest = spec.scaling.model_copy(update={"num_workers": spec.fewest_workers})
        needs = preflight.Needs(spec.storage, tracking_uri(), spec.data, spec.scaling.use_gpu)
        preflight.require(spec.stage, fewest, needs)
    mark("nodes checked")
    with showing(spec.stage, quiet=spec.trial) as shown:
        checkpoints.repair(spec.path, lambda line: shown.line.remote(line))
        try:
            with _signals(shown if spec.stops else None), _timer(shown, spec.stop_after_s):
                moving = True
                while moving:
                    _trainer(loop, job, spec, shown, callbacks).fit()
                    moving = ray.get(shown.moved.remote())
        except (ActorDiedError, ActorUnschedulableError) as error:
            raise PipelineError(
                f"Ray could not keep the controller of {spec.name} running: {error}"
                f"\n{raylet_errors()}",
                "Start the stage again: it resumes from its last checkpoint",
            ) from error
        except ray.train.TrainingFailedError as error:
            if message := ray.get(shown.failure.remote()):
                raise PipelineError(message) from error
            raise _failed(error) from error
        mark("workers ended")
        if message := ray.get(shown.failure.remote()):
            raise PipelineError(message)
        if ray.get(shown.stopping.remote()):
            raise KeyboardInterrupt
    checkpoint = checkpoints.newest_complete(spec.path)
    if checkpoint is None:
        raise PipelineError(f"run {spec.name} ended without a checkpoint in storage.path")
    with checkpoint.as_directory() as folder:
        tracker = tracking.Tracker(spec.mlflow_run_id)
        for item in reporter.read_undelivered(Path(folder)):
            tracker.log_metrics(**item)
    return checkpoint


def _trainer(loop: Loop, job: Any, spec: RunSpec, shown: Any, callbacks: Sequence[Any]) -> Trainer:
    scaling, workers, least = spec.scaling, spec.scaling.num_workers, spec.fewest_workers
    uri = tracking_uri()
    told = reporter.Reporting(spec.mlflow_run_id, uri, shown, spec.path, scaling.hang_s)
    # A trial that is stopped early ends with its process, which a controller in it holds up.
    make = LocalTrainer if spec.local and not callbacks else Trainer
    return make(
        _on_worker(loop, workers if spec.elastic else 0),
        train_loop_config={"job": job, "reporting": told},
        scaling_config=ScalingConfig(
            num_workers=workers if least == workers else (least, workers),  # type: ignore[arg-type]
            use_gpu=scaling.use_gpu,
            resources_per_worker=preflight.bundle(scaling),
        ),
        run_config=RunConfig(
            name=spec.name,
            storage_path=spec.storage,
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=spec.keep_checkpoints or None),
            # `shown` tells what a user needs; Ray's own files have the rest.
            logging_config=LoggingConfig(log_level="CRITICAL"),
            callbacks=[reporter.Failures(shown), *callbacks],  # type: ignore[list-item]
            # A local Ray's processes have it from the driver.
            worker_runtime_env=None if spec.local else {"env_vars": worker_environment()},  # type: ignore[call-arg]
        ),
        torch_config=(LoopbackTorchConfig if spec.local else ResumingTorchConfig)(
            backend="nccl" if scaling.use_gpu else "gloo"
        ),
    )


def _on_worker(loop: Loop, planned: int) -> Callable[[dict[str, Any]], None]:
    """What Ray calls on each worker; `planned` workers are wanted where fewer may run, else 0."""

    def run(config: dict[str, Any]) -> None:
        mark("worker reached")
        import torch
        from ray.train.torch import get_device

        display = config["reporting"].display
        if ray.get(display.failure.remote()):
            return  # Ray tries a failed worker again; this failure would only be repeated
        if threads := os.environ.get("OMP_NUM_THREADS"):  # which Ray sets after a fork
            torch.set_num_threads(int(threads))
        # Denormal numbers, of which training makes many, cost a third of the speed of a CPU.
        torch.set_flush_denormal(True)
        with scratch_folder() as scratch:
            told = reporter.RayReporter(config["reporting"], scratch)
            if told.world_size < planned:
                told.tell(
                    f"training on {told.world_size} of scaling.num_workers={planned} workers; with"
                    " more as soon as there are nodes for them"
                )
            mark("reporter made")
            try:
                loop(config["job"], get_device(), told)
            except torch.OutOfMemoryError as error:
                ray.get(display.fail.remote(f"{OUT_OF_MEMORY} ({str(error).splitlines()[0]})"))
                raise
            except PipelineError as error:
                ray.get(display.fail.remote(str(error)))
                raise
            finally:
                told.close()
                mark("loop ended")

    return run


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


@contextmanager
def _timer(display: Any, seconds: float) -> Iterator[None]:
    """Within it the run is asked to stop after so many seconds."""

    def stop() -> None:
        display.stop.remote()
        display.line.remote("its budget is spent: stopping after a checkpoint")

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    if seconds < math.inf:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def last_checkpoint(name: str, storage: str) -> "ray.train.Checkpoint | None":
    """The newest whole checkpoint of Ray Train run `name`; None if the storage has none."""
    return checkpoints.newest_complete(f"{storage}/{name}")


def _failed(error: "ray.train.TrainingFailedError") -> PipelineError:
    """The workers' own errors, which Ray wraps."""
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", None) or {}
    for one in (error, *failures.values()):
        if line := reporter.memory_shortage(one):
            return PipelineError(f"training failed: {line}", reporter.MORE_MEMORY)
    causes = [f"worker {rank}: {failure}" for rank, failure in failures.items()]
    return PipelineError(f"training failed: {'; '.join(causes) or error}")
