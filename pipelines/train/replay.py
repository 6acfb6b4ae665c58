"""Train again what lies between two checkpoints of a run, to see that it gives the second one."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipelines.train.checkpoint import STATE
from pipelines.train.reporter import LocalReporter

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.train.job import Job

HISTORY, BEGUN = "history.json", "begun.json"
CHAIN = "chain.json"
"""In a checkpoint: `state_digest` after each epoch of the run so far."""


class ReachedError(Exception):
    """The replay has come to the epoch that it was for."""


def finished_epochs(checkpoint: Path) -> int | None:
    """Epochs that are over in a checkpoint of any of the loops; None within one."""
    if (checkpoint / HISTORY).is_file():  # of detection and segmentation
        begun = (checkpoint / BEGUN).is_file()
        return None if begun else len(json.loads((checkpoint / HISTORY).read_text()))
    state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    return None if state["begun"] else int(state["epoch"]) + 1


def state_digest(checkpoint: Path) -> str:
    """SHA-256 of what training resumes from, down to the last bit; not of metrics and times."""
    state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    state.pop("history", None)
    return _digest(state)


def read_chain(checkpoint: Path) -> list[str]:
    """The digests of the epochs that are over; empty before the first one is."""
    file = checkpoint / CHAIN
    return json.loads(file.read_text()) if file.is_file() else []


def chain_digest(chain: list[str]) -> str:
    """SHA-256 of a whole chain."""
    return hashlib.sha256(json.dumps(chain).encode()).hexdigest()


def add_to_chain(checkpoint: Path, before: list[str]) -> list[str]:
    """Write the chain into a new checkpoint, longer by its own digest if an epoch is over.

    Args:
        before: the chain of the checkpoint before it.
    """
    epochs = finished_epochs(checkpoint) or 0
    chain = [*before, state_digest(checkpoint)] if epochs > len(before) else before
    (checkpoint / CHAIN).write_text(json.dumps(chain, indent=1))
    return chain


def tensors_digest(file: Path) -> str:
    """SHA-256 of the tensors of a safetensors file, however it is written."""
    return _digest(load_file(str(file)))


def _digest(value: Any) -> str:
    found = hashlib.sha256()
    for part in _parts(value):
        found.update(part)
    return found.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        value = value.contiguous()
        yield f"{value.dtype} {tuple(value.shape)} ".encode()
        yield value.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            yield repr(key).encode()
            yield from _parts(value[key])
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)} ".encode()
        for item in value:
            yield from _parts(item)
    else:
        yield repr(value).encode()


class Replay(LocalReporter):
    """Starts a loop from a given checkpoint, and ends it after so many epochs of the whole run."""

    def __init__(self, start: Path | None, epochs: int, scratch: Path) -> None:
        super().__init__(scratch, quiet=True)
        self.start, self.epochs = start, epochs
        self.found: dict[int, str] = {}

    @contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        yield self.start

    def keep(self, folder: Path | None) -> None:
        pass  # within an epoch: nothing to compare with

    def save(self, metrics: Mapping[str, float], epoch: int, folder: Path | None) -> None:
        assert folder
        self.found[epoch + 1] = state_digest(folder)
        if epoch + 1 == self.epochs:
            raise ReachedError


def replay(
    loop: "Callable[[Job, torch.device, Any], None]",
    job: "Job",
    device: torch.device,
    start: Path | None,
    epochs: int,
) -> dict[int, str]:
    """`state_digest` after each epoch that a loop trains, by how many of the whole run are over.

    Args:
        start: the checkpoint to start from; None begins the run.
        epochs: of the whole run, after which it ends.
    """
    with tempfile.TemporaryDirectory() as scratch:
        reporter = Replay(start, epochs, Path(scratch) / "checkpoint")
        with suppress(ReachedError):
            loop(job, device, reporter)
    return reporter.found
