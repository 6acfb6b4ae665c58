"""How a training loop reports, whoever started it."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol


class Reporter(Protocol):
    """What a training loop needs from whoever started it. All ranks call every method."""

    rank: int
    world_size: int
    scratch: Path
    """A folder on this machine for what is not to outlive the run."""

    def checkpoint(self) -> AbstractContextManager[Path | None]:
        """The folder of the last checkpoint, to resume from; None at a fresh start."""

    def tell(self, line: str) -> None:
        """A line for the user; rank 0's alone is shown."""

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
        continues. Where the storage can't be written, the run ends; the checkpoints before it are
        whole.
        """


class LocalReporter:
    """Reports without Ray and MLflow: lines on stdout, the last checkpoint in a folder."""

    rank, world_size = 0, 1

    def __init__(self, folder: Path, quiet: bool = False) -> None:
        self.folder, self.quiet = folder, quiet
        self.scratch = folder.parent

    @contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        yield self.folder if self.folder.exists() else None

    def tell(self, line: str) -> None:
        if not self.quiet:
            print(line, flush=True)

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        pass

    def metrics(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def stopping(self) -> bool:
        return False

    def save(self, metrics: Mapping[str, float], epoch: int, folder: Path | None) -> None:
        if not self.quiet:
            print(f"epoch {epoch + 1}: {readable(metrics)}", flush=True)
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


def readable(metrics: Mapping[str, float]) -> str:
    """Metrics in one line."""
    return "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
