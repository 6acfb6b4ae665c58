"""The classifier's checkpoints as files. What they hold is no input of a run: it has a number."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from pipelines.errors import PipelineError

FORMAT = 2
STATE, BEST, RESULT, PREDICTIONS = (
    "state.pt",
    "best.safetensors",
    "result.json",
    "predictions.npz",
)
MODEL_CONFIG = "config.json"
"""Of timm, beside the weights of a finished run."""


def write_checkpoint(
    folder: Path,
    state: Mapping[str, Any],
    best: Mapping[str, torch.Tensor] | None,
    result: Mapping[str, Any] | None,
) -> None:
    """Write the files of a checkpoint.

    Args:
        state: what training resumes from, of types that `torch.load(weights_only=True)` reads.
        best: weights of the best epoch so far.
        result: of a finished run: its metrics, `history` and `predictions` (arrays by name).
    """
    if best is not None:
        save_file(dict(best), str(folder / BEST))
    torch.save({"format": FORMAT, **state}, folder / STATE)
    if result:
        np.savez(folder / PREDICTIONS, **result["predictions"])
        kept = {key: value for key, value in result.items() if key != "predictions"}
        (folder / RESULT).write_text(json.dumps(kept, indent=2))


def read_checkpoint(
    folder: Path, device: torch.device
) -> tuple[dict[str, Any], dict[str, torch.Tensor] | None]:
    """State and best weights of a checkpoint.

    Raises:
        PipelineError: another version of this code wrote it, in another format.
    """
    state = torch.load(folder / STATE, map_location=device, weights_only=True)
    if state.pop("format", 0) != FORMAT:
        raise PipelineError(
            "the checkpoint of this run has the format of another version of this code",
            "Resume the run with that version, or train anew with --force",
        )
    best = load_file(str(folder / BEST)) if (folder / BEST).is_file() else None
    return state, best
