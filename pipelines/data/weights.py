"""Weights that leave a stage, and their lineage.

A weights folder holds `model.safetensors` and `model.json`: what model it is, what it
scored, which run made it, and the same of the weights that it started from.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.errors import PipelineError


def write_weights(
    folder: Path,
    state_dict: Mapping[str, Any],
    *,
    model: Mapping[str, Any],
    identity: str,
    mlflow_run_id: str,
    metrics: Mapping[str, Any],
    upstream: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a weights folder; its description.

    Args:
        state_dict: tensors by name; saved contiguous, on the CPU.
        model: what rebuilds the model, such as its timm name and arguments.
        upstream: the description of the weights that this one started from.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state_dict.items()}
    save_file(tensors, str(folder / "model.safetensors"))
    description = {
        "model": dict(model),
        "sha256": _sha256(folder / "model.safetensors"),
        "identity": identity,
        "mlflow_run_id": mlflow_run_id,
        "metrics": dict(metrics),
        "upstream": dict(upstream) if upstream else None,
    }
    (folder / "model.json").write_text(json.dumps(description, indent=2) + "\n")
    return description


def read_description(folder: Path) -> dict[str, Any]:
    """The description of a weights folder, after checking that the weights are those.

    Raises:
        PipelineError: missing, incomplete or changed weights.
    """
    path = folder / "model.json"
    if not path.is_file() or not (folder / "model.safetensors").is_file():
        raise PipelineError(
            f"weights/{folder.name} has no model.json and model.safetensors:"
            f" run `dvc repro {folder.name}`, or `dvc pull` if a remote holds them"
        )
    description = json.loads(path.read_text())
    if _sha256(folder / "model.safetensors") != description["sha256"]:
        raise PipelineError(
            f"weights/{folder.name}/model.safetensors is not what model.json describes (another"
            f" SHA-256): it was changed or cut short. Run `dvc checkout weights/{folder.name}`"
        )
    return description


def check_architecture(description: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Refuse weights of another architecture than `model`, the `model` section of the params.

    Raises:
        PipelineError: names what differs.
    """
    theirs = description["model"]
    differing = [
        f"{key}: weights {theirs.get(key)!r}, params {model.get(key)!r}"
        for key in sorted(set(model) | set(theirs))
        if theirs.get(key) != model.get(key)
    ]
    if differing:
        raise PipelineError(
            f"the pretrained weights are of another architecture ({'; '.join(differing)}):"
            " run `dvc repro pretrain` with these parameters first"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_model(folder: Path) -> Any:
    """The classifier of a weights folder that `pretrain` wrote, in evaluation mode."""
    from safetensors.torch import load_file

    from pipelines.params import Model
    from pipelines.train.models import build_model

    description = read_description(folder)
    state = load_file(str(folder / "model.safetensors"))
    classes = next(v.shape[0] for k, v in reversed(state.items()) if k.endswith("head.fc.weight"))
    model = build_model(Model.model_validate(description["model"]), classes)
    model.load_state_dict(state)
    return model.eval()
