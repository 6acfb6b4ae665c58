"""Weights that leave a stage, and their lineage.

A weights folder holds `model.safetensors` and `model.json`: what model it is, what it
scored, which run made it, and the same of the weights that it started from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, TypeAdapter

from pipelines.data.errors import brief
from pipelines.data.files import sha256_file, write_whole
from pipelines.errors import PipelineError
from pipelines.paths import ROOT

if TYPE_CHECKING:
    from torch import Tensor

TENSORS, DESCRIPTION = "model.safetensors", "model.json"
PRETRAINED = "weights/pretrain"
"""Where `pretrain` leaves its weights."""


@dataclass(frozen=True)
class WeightsDescription:
    """What `model.json` says."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    model: Mapping[str, Any]
    """What rebuilds the model, such as its timm name and arguments."""
    identity: str
    """Of the run that made the weights."""
    mlflow_run_id: str
    metrics: Mapping[str, float]
    """Scores, in percent."""
    upstream: WeightsDescription | None = None
    """Of the weights that the run started from."""
    sha256: str = ""
    """Of `model.safetensors`."""
    classes: Sequence[str] = ()
    """Names of what it tells apart, in the order of its outputs; empty if they are not known."""


_DESCRIPTION = TypeAdapter(WeightsDescription)


def weights_file(given: str, root: Path = ROOT) -> Path:
    """The file with weights: `given`, or `model.safetensors` in that folder; relative to `root`.

    Raises:
        PipelineError: there is none.
    """
    path = root / Path(given).expanduser()
    path = path / TENSORS if path.is_dir() else path
    if not path.is_file():
        raise PipelineError(
            f"weights {given}: there is no such file, nor a folder with {TENSORS}",
            "Give a checkpoint, or a folder such as weights/pretrain, made by `dvc repro` or"
            " `dvc pull`",
        )
    return path


def write_weights(
    folder: Path, state_dict: Mapping[str, Tensor], description: WeightsDescription
) -> WeightsDescription:
    """Write a weights folder; its description, with the `sha256` of what was written.

    The classes are in the header of the tensors' file too, where `elsa.mm` finds them.

    Args:
        state_dict: tensors by name; saved contiguous, on the CPU.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state_dict.items()}
    # One entry: several would be written in any order, and the same weights as other bytes.
    save_file(tensors, str(folder / TENSORS), {"classes": json.dumps(list(description.classes))})
    description = replace(description, sha256=sha256_file(folder / TENSORS))
    write_whole(folder / DESCRIPTION, json.dumps(asdict(description), indent=2) + "\n")
    return description


def read_description(folder: Path) -> WeightsDescription:
    """The description of a weights folder, after checking that the weights are those.

    Raises:
        PipelineError: missing, incomplete or changed weights.
    """
    path = folder / DESCRIPTION
    if not path.is_file() or not (folder / TENSORS).is_file():
        raise PipelineError(
            f"weights/{folder.name} has no {DESCRIPTION} and {TENSORS}",
            f"Run `dvc repro {folder.name}`, or `dvc pull` if a remote holds them",
        )
    try:
        description = _DESCRIPTION.validate_json(path.read_bytes())
    except ValueError as error:
        raise PipelineError(
            f"weights/{folder.name}/{DESCRIPTION} is no description of weights: {brief(error)}",
            f"Run `dvc checkout weights/{folder.name}`",
        ) from None
    if sha256_file(folder / TENSORS) != description.sha256:
        raise PipelineError(
            f"weights/{folder.name}/{TENSORS} is not what {DESCRIPTION} describes (another"
            " SHA-256): it was changed or cut short",
            f"Run `dvc checkout weights/{folder.name}`",
        )
    return description


def check_architecture(description: WeightsDescription, model: Mapping[str, Any]) -> None:
    """Reject weights of another architecture than `model`, the `model` section of the params.

    Raises:
        PipelineError: names what differs.
    """
    theirs = description.model
    differing = [
        f"{key}: weights {theirs.get(key)!r}, params {model.get(key)!r}"
        for key in sorted(set(model) | set(theirs))
        if theirs.get(key) != model.get(key)
    ]
    if differing:
        raise PipelineError(
            f"the pretrained weights are of another architecture ({'; '.join(differing)})",
            "Run `dvc repro pretrain` with these parameters first",
        )
