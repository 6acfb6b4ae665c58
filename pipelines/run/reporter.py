"""The reporter of a Ray Train worker: to MLflow, to the driver, and to Ray's storage.

Imports stay light: Ray Train's controller loads this module too.
"""

import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import CheckpointUploadMode, UserCallback

from pipelines.errors import PipelineError
from pipelines.run import checkpoints
from pipelines.run.ray_internals import drained_nodes, persist_checkpoint
from pipelines.run.trace import mark
from pipelines.run.watchdog import Watchdog
from pipelines.train.reporter import readable

UNDELIVERED = "undelivered_metrics.json"


@dataclass(frozen=True)
class Reporting:
    """What a Ray worker needs to report; made by the driver, sent to the workers."""

    mlflow_run_id: str
    mlflow_uri: str
    display: Any
    """Handle of the `Display` actor."""
    storage: str
    """Folder or URL of the Ray Train run."""
    hang_s: float
    """`scaling.hang_s`."""


class RayReporter:
    """Reports from inside a Ray Train worker."""

    def __init__(self, reporting: Reporting, scratch: Path) -> None:
        self.scratch = scratch
        context = self._context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self._display, self._storage = reporting.display, reporting.storage
        self._stopping = self._display.stopping.remote()
        self._watchdog = Watchdog(self.rank, reporting.hang_s, self._tell_at_once)
        self._shown = 0.0
        self._chain: list[str] = []
        self._uploaded = threading.Event()
        self._uploaded.set()
        self._delivery = None
        self._monitor = None
        os.environ["MLFLOW_TRACKING_URI"] = reporting.mlflow_uri
        # MLflow takes a second or more to import, and most workers don't log.
        if self.rank == 0:
            from pipelines.run import tracking

            tracker = tracking.Tracker(reporting.mlflow_run_id, reporting.mlflow_uri)
            self._delivery = tracking.Delivery(tracker, self.tell)
        if context.get_local_rank() == 0:
            from pipelines.run import tracking

            self._monitor = tracking.system_metrics(
                reporting.mlflow_run_id, context.get_node_rank()
            )

    @contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        # Not Ray's own choice: that may be a part of one.
        found = checkpoints.newest_complete(self._storage, self.tell)
        if found is None:
            yield None
            return
        with found.as_directory() as folder:
            if self._delivery:
                from pipelines.train.replay import read_chain

                self._delivery.put_all(read_undelivered(Path(folder)))
                self._chain = read_chain(Path(folder))
            yield Path(folder)

    def _tell_at_once(self, line: str) -> None:
        ray.wait([self._display.line.remote(line)], timeout=10)

    def tell(self, line: str) -> None:
        """Show a line to the user; rank 0's alone."""
        self._watchdog.alive()
        if self.rank == 0:
            self._display.line.remote(line)

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        self._watchdog.alive(f"{done} of {total} {unit}")
        now = time.monotonic()
        if self.rank == 0 and (now - self._shown > 1 or done >= total):
            if not self._shown:
                mark("first step")
            self._shown = now
            self._display.update.remote(done, total, unit, note)

    def metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._watchdog.alive()
        if self._delivery:
            self._delivery.put(metrics, step)

    def save(self, metrics: Mapping[str, float], epoch: int, folder: Path | None) -> None:
        # Before the checkpoint: an epoch that is in it is never missing from the curves. What
        # MLflow does not have yet goes into the checkpoint, for whoever resumes from it.
        self.metrics(metrics, epoch)
        self.tell(f"epoch {epoch + 1}: {readable(metrics)}")
        self._report({**metrics, "epoch": epoch}, folder)

    def keep(self, folder: Path | None) -> None:
        self._report({}, folder)

    def stopping(self) -> bool:
        self._watchdog.alive()
        if self.rank:
            return False
        if nodes := drained_nodes():
            ray.get(self._display.move.remote(nodes))
            return True
        if not ray.wait([self._stopping], timeout=0)[0]:
            return False
        stopping = bool(ray.get(self._stopping))
        self._stopping = self._display.stopping.remote()
        return stopping

    def _report(self, metrics: Mapping[str, float], folder: Path | None) -> None:
        checkpoint = None
        if folder:
            if self._delivery and (waiting := self._delivery.undelivered()):
                (folder / UNDELIVERED).write_text(json.dumps(waiting))
            moved = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=self.scratch))
            for file in folder.iterdir():
                shutil.move(file, moved)
            checkpoint = ray.train.Checkpoint.from_directory(str(moved))
            self._uploaded.wait()  # the one before: they must not pile up
            self._uploaded.clear()
        try:
            ray.train.report(
                dict(metrics),
                checkpoint=checkpoint,
                checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
                checkpoint_upload_fn=self._upload,
            )
        except BaseException:
            self._uploaded.set()  # nothing to wait for
            raise

    def _upload(self, checkpoint: "ray.train.Checkpoint", name: str) -> "ray.train.Checkpoint":
        from pipelines.train.checkpoint import STATE
        from pipelines.train.replay import add_to_chain

        folder = Path(checkpoint.path)
        try:
            if (folder / STATE).is_file():  # not of predictions
                self._chain = add_to_chain(folder, self._chain)
            checkpoints.seal(folder)
            return persist_checkpoint(self._context, checkpoint, name)
        except OSError as error:
            failure = PipelineError(
                f"a checkpoint can't be written to storage.path: {error}",
                "Make it writable and start the stage again: it resumes from the checkpoint before",
            )
            ray.get(self._display.fail.remote(str(failure)))
            raise failure from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self._uploaded.set()

    def close(self) -> None:
        """Wait for the last checkpoint, stop the system monitor, and give the last metrics a
        moment to arrive."""
        self._watchdog.close()
        self._uploaded.wait()
        if self._monitor:
            self._monitor.finish()
        if self._delivery:
            self._delivery.close(seconds=10)


def read_undelivered(folder: Path) -> list[dict[str, Any]]:
    """Metrics in a checkpoint that MLflow had not got when it was written."""
    file = folder / UNDELIVERED
    return json.loads(file.read_text()) if file.is_file() else []


MORE_MEMORY = (
    "If memory was short, end other programs, or lower loader.data_workers, loader.prefetch_factor"
    " or scaling.num_workers"
)


def memory_shortage(error: Exception) -> str:
    """The line that tells of a process that Ray, or else the system, has killed where memory was
    short; empty if there is none."""
    for line in str(error).splitlines():
        if "running low on memory" in line or "DataLoader worker (pid" in line:
            return re.sub(r"\(IP: ([^,]*), ID: [^)]*\)", r"\1", line)[:200].rstrip(".")
    return ""


class Failures(UserCallback):
    """Tells of each failure of workers: Ray then waits for resources without a word.

    Runs in Ray Train's controller.
    """

    def __init__(self, display: Any) -> None:
        self.display = display

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        if ray.get(self.display.failure.remote()):
            return  # told as the run's end
        for rank, error in sorted(worker_exceptions.items()):
            cause = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
            if line := memory_shortage(error):
                cause = f"{line}. {MORE_MEMORY}"
            self.display.line.remote(f"worker {rank} failed: {cause}")
        self.display.line.remote(
            "training resumes from the last checkpoint as soon as there is room for the workers"
        )
