"""How every training loop reports: metrics to MLflow, progress to the driver, checkpoints to Ray.

Imports stay light: Ray Train's controller loads this module too.
"""

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
import ray.train
from ray.train import CheckpointUploadMode, UserCallback

from pipelines.errors import PipelineError
from pipelines.run import checkpoints as storage

UNDELIVERED = "undelivered_metrics.json"


class Reporter(Protocol):
    """What a training loop needs from whoever started it. All ranks call every method."""

    rank: int
    world_size: int

    def checkpoint(self) -> AbstractContextManager[Path | None]:
        """The folder of the last checkpoint, to resume from; None at a fresh start."""

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Work done so far of the whole stage, such as images of all workers."""

    def metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics within an epoch, by step."""

    def stopping(self) -> bool:
        """Whether the run is to end after its next checkpoint. Rank 0 knows, the others don't."""

    def keep(self, folder: Path | None) -> None:
        """A checkpoint without metrics, such as within an epoch; `folder` as in `save`."""

    def save(self, metrics: Mapping[str, float], epoch: int, folder: Path | None) -> None:
        """Metrics of a finished epoch (counted from 0) and, on rank 0, the checkpoint's folder.

        The folder is the reporter's from then on: it is moved away, and uploaded while training
        goes on. Where the storage can't be written, the run ends; the checkpoints before it are
        whole.
        """


@dataclass(frozen=True)
class Reporting:
    """What a Ray worker needs to report; made by the driver, sent to the workers."""

    mlflow_run_id: str
    mlflow_uri: str
    display: Any
    """Handle of the `Display` actor."""
    storage: str
    """Folder or URL of the Ray Train run."""


class RayReporter:
    """Reports from inside a Ray Train worker."""

    def __init__(self, reporting: Reporting) -> None:
        from pipelines.run import tracking

        context = self._context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self._display, self._storage = reporting.display, reporting.storage
        self._stopping = self._display.stopping.remote()
        self._shown = 0.0
        self._uploaded = threading.Event()
        self._uploaded.set()
        self._delivery = None
        self._monitor = None
        os.environ["MLFLOW_TRACKING_URI"] = reporting.mlflow_uri
        if self.rank == 0:
            tracker = tracking.Tracker(reporting.mlflow_run_id, reporting.mlflow_uri)
            self._delivery = tracking.Delivery(tracker, self.tell)
        if context.get_local_rank() == 0:
            self._monitor = tracking.system_metrics(
                reporting.mlflow_run_id, context.get_node_rank()
            )

    @contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        # Not Ray's own choice: that may be a part of one.
        found = storage.newest_complete(self._storage, self.tell)
        if found is None:
            yield None
            return
        with found.as_directory() as folder:
            if self._delivery:
                self._delivery.put_all(read_undelivered(Path(folder)))
            yield Path(folder)

    def tell(self, line: str) -> None:
        """Show a line to the user; rank 0's alone."""
        if self.rank == 0:
            self._display.line.remote(line)

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        now = time.monotonic()
        if self.rank == 0 and (now - self._shown > 1 or done >= total):
            self._shown = now
            self._display.update.remote(done, total, unit, note)

    def metrics(self, metrics: Mapping[str, float], step: int) -> None:
        if self._delivery:
            self._delivery.put(metrics, step)

    def save(self, metrics: Mapping[str, float], epoch: int, folder: Path | None) -> None:
        # Before the checkpoint: an epoch that is in it is never missing from the curves. What
        # MLflow does not have yet goes into the checkpoint, for whoever goes on from it.
        self.metrics(metrics, epoch)
        self.tell(f"epoch {epoch + 1}: {_readable(metrics)}")
        self._report({**metrics, "epoch": epoch}, folder)

    def keep(self, folder: Path | None) -> None:
        self._report({}, folder)

    def stopping(self) -> bool:
        if self.rank or not ray.wait([self._stopping], timeout=0)[0]:
            return False
        stopping = ray.get(self._stopping)
        self._stopping = self._display.stopping.remote()
        return stopping

    def _report(self, metrics: Mapping[str, float], folder: Path | None) -> None:
        checkpoint = None
        if folder:
            if self._delivery and (waiting := self._delivery.undelivered()):
                (folder / UNDELIVERED).write_text(json.dumps(waiting))
            moved = Path(tempfile.mkdtemp(prefix="checkpoint-"))
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
        folder = Path(checkpoint.path)
        try:
            storage.seal(folder)
            return self._context.get_storage().persist_current_checkpoint(checkpoint, name)
        except OSError as error:
            message = (
                f"a checkpoint can't be written to storage.path: {error}."
                " Mend it and start the stage again: it goes on from the checkpoint before"
            )
            ray.get(self._display.fail.remote(message))
            raise PipelineError(message) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self._uploaded.set()

    def close(self) -> None:
        """Wait for the last checkpoint, stop the system monitor, and give the last metrics a
        moment to arrive."""
        self._uploaded.wait()
        if self._monitor:
            self._monitor.finish()
        if self._delivery:
            self._delivery.close(seconds=10)


class LocalReporter:
    """Reports without Ray and MLflow: lines on stdout, the last checkpoint in a folder."""

    rank, world_size = 0, 1

    def __init__(self, folder: Path, quiet: bool = False) -> None:
        self.folder, self.quiet = folder, quiet

    @contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        yield self.folder if self.folder.exists() else None

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        pass

    def metrics(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def stopping(self) -> bool:
        return False

    def save(self, metrics: Mapping[str, float], epoch: int, folder: Path | None) -> None:
        if not self.quiet:
            print(f"epoch {epoch + 1}: {_readable(metrics)}", flush=True)
        self.keep(folder)

    def keep(self, folder: Path | None) -> None:
        if folder:
            aside = Path(tempfile.mkdtemp(dir=self.folder.parent))
            shutil.copytree(folder, aside, dirs_exist_ok=True)
            old = self.folder.with_name(self.folder.name + ".old")
            if self.folder.exists():
                self.folder.replace(old)
            aside.replace(self.folder)
            shutil.rmtree(old, ignore_errors=True)

    def close(self) -> None:
        pass


def read_undelivered(folder: Path) -> list[dict[str, Any]]:
    """Metrics in a checkpoint that MLflow had not got when it was written."""
    file = folder / UNDELIVERED
    return json.loads(file.read_text()) if file.is_file() else []


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
            if "DataLoader worker" in cause:
                cause += "; if memory was short, lower data_workers or prefetch_factor"
            self.display.line.remote(f"worker {rank} failed: {cause}")
        self.display.line.remote(
            "going on from the last checkpoint as soon as there are resources for the workers"
        )


def _readable(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
