"""The classifier that the parameters name, and the weights that it starts from."""

from collections.abc import Sequence
from pathlib import Path

import timm
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models._hub import save_config_for_hf
from torch import nn

import elsa
from pipelines.data.weights import read_description, weights_file
from pipelines.errors import PipelineError
from pipelines.params import Model, Pretrain


def build_model(model: Model, num_classes: int, drop_path_rate: float = 0.0) -> nn.Module:
    """The timm model that the `model` section names.

    Raises:
        PipelineError: an unknown name, or arguments that the model rejects.
    """
    arguments = {"num_classes": num_classes, **model.overrides()}
    try:
        try:
            return timm.create_model(model.name, drop_path_rate=drop_path_rate, **arguments)
        except TypeError as error:
            if drop_path_rate or "drop_path_rate" not in str(error):
                raise
            return timm.create_model(model.name, **arguments)  # of a kind without drop path
    except (RuntimeError, TypeError, ValueError) as error:
        raise PipelineError(f"model: {model.name} can't be built: {error}") from error


def load_weights(model: nn.Module, p: Pretrain) -> None:
    """Load `pretrain.weights`; a classifier of other classes is left out.

    Raises:
        PipelineError: the weights don't fit; names what differs.
    """
    assert p.weights
    file = weights_file(p.weights)
    try:
        state = elsa.read_state_dict(file)
        if any(isinstance(part, elsa.ELSASwin) for part in model.modules()):
            found = [state[key] for key in ("head.weight", "head.fc.weight") if key in state]
            keep = bool(found) and len(found[0]) == p.num_classes
            report = elsa.load_checkpoint(model, file, head="keep" if keep else "drop")
            other = [] if keep else report.kept
        else:
            own = model.state_dict()
            names = model.pretrained_cfg["classifier"]  # type: ignore[index, operator]
            heads = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
            other = [k for k in state if k.startswith(heads) and state[k].shape != own[k].shape]
            model.load_state_dict(state | {k: own[k] for k in other})
    except (elsa.CheckpointError, RuntimeError, KeyError) as error:
        raise PipelineError(f"pretrain.weights={p.weights}: {error}") from error
    if other and not p.epochs:
        raise PipelineError(
            f"pretrain.weights={p.weights} has no classifier of pretrain.num_classes="
            f"{p.num_classes}, so that pretrain.epochs=0 has nothing to evaluate; train 1 or more"
        )


def write_config(file: Path, model: nn.Module, p: Pretrain, classes: Sequence[str]) -> None:
    """Write the config from which `timm.create_model("local-dir:...")` rebuilds the model.

    Args:
        classes: names of its outputs; empty if they are not known.
    """
    size = {"input_size": (3, p.img_size, p.img_size), "crop_pct": p.crop_pct}
    data = {**size, "interpolation": p.interpolation, "crop_mode": p.crop_mode}
    names = {"label_names": list(classes)} if classes else {}
    normalised = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    save_config_for_hf(model, str(file), names, data_config=data | normalised)


def load_classifier(folder: Path) -> nn.Module:
    """The classifier of a weights folder that the stage `pretrain` wrote, in evaluation mode."""
    description = read_description(folder)
    state = load_file(str(folder / "model.safetensors"))
    classes = next(v.shape[0] for k, v in reversed(state.items()) if k.endswith("head.fc.weight"))
    model = build_model(Model.model_validate(description.model), classes)
    model.load_state_dict(state)
    return model.eval()
