"""The checkpoints of mmengine's loop as files. They are no input of a run: they have a format."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.errors import PipelineError

FORMAT = 2
STATE, BEGUN, HISTORY = "state.pt", "begun.json", "history.json"


@dataclass(frozen=True)
class Kept:
    """What a checkpoint holds."""

    state: dict[str, Any]
    """Of the training loop."""
    history: list[dict[str, float]]
    """A row of metrics per epoch that is over."""
    epoch: dict[str, Any]
    """Losses and seconds of an epoch that is not over."""
    row: dict[str, float]
    """Metrics of an epoch whose validation is not over."""


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write what the training loop resumes from."""
    torch.save({"format": FORMAT, **state}, folder / STATE)


def write_history(folder: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write the metrics of the epochs that are over."""
    (folder / HISTORY).write_text(json.dumps(history, indent=1))


def write_begun(
    folder: Path,
    history: Sequence[Mapping[str, float]],
    epoch: Mapping[str, Any],
    row: Mapping[str, float],
) -> None:
    """Write what is known of an epoch that is not over, or not validated."""
    write_history(folder, history)
    (folder / BEGUN).write_text(json.dumps({"epoch": epoch, "row": row}))


def read_checkpoint(folder: Path, device: torch.device) -> Kept:
    """What a checkpoint holds, with its tensors on `device`.

    Raises:
        PipelineError: another version of this code wrote it, in another format.
    """
    # Not mmengine's: its checkpoints are pickles that can run code.
    state = torch.load(folder / STATE, map_location=device, weights_only=True)
    if state.pop("format", 0) != FORMAT:
        raise PipelineError(
            "the checkpoint of this run has the format of another version of this code",
            "Resume the run with that version, or train anew with --force",
        )
    history = json.loads((folder / HISTORY).read_text())
    begun: dict[str, dict[str, Any]] = {"epoch": {}, "row": {}}
    if (folder / BEGUN).is_file():
        begun = json.loads((folder / BEGUN).read_text())
    return Kept(state, history, begun["epoch"], begun["row"])
