"""Load published and own checkpoints, strictly and without executing pickles.

Three steps, usable on their own: `read_state_dict` (file -> plain state dict),
`checkpoint_filter_fn` in swin.py (published layout -> ours) and `load_checkpoint` (all of it, into
a model).
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .swin import ELSASwin, checkpoint_filter_fn

__all__ = ["CheckpointError", "LoadReport", "load_checkpoint", "read_state_dict"]

WRAPPERS = ("module.", "_orig_mod.")
# What detectors and segmentors of mmdet and mmseg keep beside their backbone.
OTHER_PARTS = ("neck.", "rpn_head.", "roi_head.", "decode_head.", "auxiliary_head.")


class CheckpointError(ValueError):
    """The file cannot be read, or does not fit the model."""


@dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` did besides loading."""

    dropped: list[str] = field(default_factory=list)
    """Keys of the file that were left out, all of a known kind."""
    kept: list[str] = field(default_factory=list)
    """Keys of the model that keep their initial values."""


def read_state_dict(path: str | Path, *, use_ema: bool = True) -> dict[str, Tensor]:
    """State dict of a checkpoint file, freed of its container and of wrapper prefixes.

    Reads safetensors, and torch files of timm, mmcv and plain state dicts. Tensors and containers
    are all that is unpickled, with `argparse.Namespace` for the arguments in old timm files.

    Args:
        path: The file.
        use_ema: Prefer the averaged weights where the file holds both.

    Raises:
        CheckpointError: The file is truncated, holds other objects or no state dict.
    """
    path = Path(path)
    content: Any
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "WeightsUnpickler" in str(error):
            raise CheckpointError(
                f"{path} holds objects other than tensors and plain containers, "
                f"which are not executed: {error}"
            ) from error
        raise CheckpointError(f"{path} is truncated or not a checkpoint: {error}") from error
    except Exception as error:  # damaged files make the readers raise anything
        raise CheckpointError(f"{path} is truncated or not a checkpoint: {error}") from error

    names = ["state_dict", "model"]
    averaged = ["state_dict_ema", "model_ema"]
    for name in averaged + names if use_ema else names + averaged:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds no state dict")
    strangers = [str(k) for k, v in content.items() if not isinstance(v, Tensor)]
    if strangers:
        raise CheckpointError(f"{path} holds no state dict; not tensors: {_listed(strangers)}")
    return {_unwrap(name): value for name, value in content.items()}


def load_checkpoint(
    model: nn.Module, path: str | Path, *, head: str = "keep", use_ema: bool = True
) -> LoadReport:
    """Load a published or an own checkpoint into an ELSA-Swin or a model around one, strictly.

    Every tensor of the file must be loaded or be of a kind known to be dropped, and every tensor
    of the model must be found; otherwise one error names all that does not fit, and the model is
    left as it was. Known to be dropped are: the authors' index and mask buffers, what surrounds
    the backbone of a detector or segmentor unless the model has it too, and what the model has no
    module for because it was pruned (classifier, final norm, norms of outputs not taken, stages
    behind the last output).

    Args:
        model: An `ELSASwin`, the wrapper that `timm.create_model(..., features_only=True)` makes
            of one, or a detector or segmentor of mmdet or mmseg whose `backbone` holds one.
        path: A published file (classification, detection, segmentation), a timm or pipeline
            training checkpoint, or safetensors. A detector or segmentor needs the file of a whole
            one; its `backbone` alone takes any.
        head: "keep" loads the classifier, "drop" leaves the model's own in place, for fine-tuning
            on other classes. Models without a classifier need neither.
        use_ema: Prefer the averaged weights where the file holds both.

    Returns:
        The keys left out of the file, and the model's keys that keep their initial values.

    Raises:
        CheckpointError: The file cannot be read or does not fit.
    """
    if head not in ("keep", "drop"):
        raise ValueError(f"head must be 'keep' or 'drop', got {head!r}")
    prefix, core = _find_core(model)
    around = {n: v for n, v in model.state_dict().items() if not n.startswith(prefix)}
    if around and not prefix.startswith("backbone."):
        raise TypeError(f"the ELSASwin in {type(model)} is {prefix[:-1]}, not in its backbone")

    state_dict = read_state_dict(path, use_ema=use_ema)
    report = LoadReport()
    others = {}
    if around or any(name.startswith("backbone.") for name in state_dict):
        others = {n: v for n, v in state_dict.items() if not n.startswith("backbone.")}
        state_dict = {
            name.removeprefix("backbone."): value
            for name, value in state_dict.items()
            if name not in others
        }
    if not around:
        report.dropped.extend(name for name in others if name.startswith(OTHER_PARTS))
        others = {n: v for n, v in others.items() if not n.startswith(OTHER_PARTS)}
    # Files of the feature wrapper and of thin wrappers around it.
    while state_dict and all(name.startswith("model.") for name in state_dict):
        state_dict = {name.removeprefix("model."): v for name, v in state_dict.items()}
    shown = "backbone." if around else ""
    weights = {
        shown + name: value for name, value in checkpoint_filter_fn(state_dict, core).items()
    }
    report.dropped.extend(
        shown + name for name in state_dict if name.endswith((".relative_id", ".attn_mask"))
    )

    # Names as in a plain ELSASwin or as in a detector around one, whatever wraps it here.
    target = {shown + name: value for name, value in core.state_dict().items()} | around
    droppable = tuple(shown + name for name in _droppable(core, head))
    problems, accepted = [], {}
    for name, value in (weights | others).items():
        if name.startswith(droppable):
            report.dropped.append(name)
        elif name not in target:
            problems.append(f"unknown key {name} {tuple(value.shape)}")
        elif value.shape != target[name].shape:
            problems.append(
                f"{name} is {tuple(value.shape)} in the file, "
                f"{tuple(target[name].shape)} in the model"
            )
        else:
            accepted[name] = value
    from_classifier = not around and not any(_is_out_norm(name) for name in weights)
    for name in target.keys() - accepted.keys():
        if name.startswith(droppable) or (from_classifier and _is_out_norm(name)):
            report.kept.append(name)
        elif name.endswith(".num_batches_tracked"):
            report.kept.append(name)  # batch norm works without it, and old files lack it
        elif name not in weights and name not in others:
            problems.append(f"missing key {name} {tuple(target[name].shape)}")
    if problems:
        hint = ""
        if any("head.fc." in p for p in problems):
            hint = '\nTo leave the classifier as it is, pass head="drop".'
        if around and not state_dict:
            hint = "\nFor the weights of a classifier or a backbone alone, pass model.backbone."
        raise CheckpointError(
            f"{path} does not fit {type(model if around else core).__name__} ({len(problems)} of"
            f" {len(weights | others)} keys):\n  " + "\n  ".join(sorted(problems)) + hint
        )
    model.load_state_dict(
        {
            name if name in around else prefix + name.removeprefix(shown): value
            for name, value in accepted.items()
        },
        strict=False,
    )
    report.kept.sort()
    return report


def _find_core(model: nn.Module) -> tuple[str, ELSASwin]:
    """The ELSA-Swin in a model, and the prefix of its keys in the model's state dict."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, ELSASwin)]
    if len(found) != 1:
        raise TypeError(
            "model must be an ELSASwin, its feature wrapper, or a detector or segmentor with one"
            f" as backbone; got {type(model)} with {len(found)}"
        )
    name, core = found[0]
    return (f"{name}." if name else ""), core


def _droppable(model: ELSASwin, head: str) -> tuple[str, ...]:
    """Prefixes of what may be left out: the classifier on demand, and what the model lacks."""
    prefixes = []
    if head == "drop" or isinstance(model.head.fc, nn.Identity):
        prefixes.append("head.fc.")
    if isinstance(model.norm, nn.Identity):
        prefixes.append("norm.")
    for i in range(len(model.feature_info)):
        if i >= len(model.layers):
            prefixes.append(f"layers.{i}.")
        if not hasattr(model, f"norm{i}"):
            prefixes.append(f"norm{i}.")
    return tuple(prefixes)


def _is_out_norm(name: str) -> bool:
    return name.startswith("norm") and name[4:5].isdigit()


def _unwrap(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _listed(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" * (len(names) > limit))
