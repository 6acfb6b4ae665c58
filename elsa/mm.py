"""timm models as backbones of mmdet and mmseg: thin wrappers, no second implementation."""

import colorsys
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import CheckpointLoader, load_from_local
from safetensors import safe_open
from torch import Tensor, nn

import elsa

ARCHITECTURES = {
    "micro": "elsa_swin_micro",
    "tiny": "elsa_swin_tiny",
    "small": "elsa_swin_small",
    "base": "elsa_swin_base",
}


def load_checkpoint_file(filename: str, map_location: Any = None) -> dict[str, Any]:
    """What mm's tools load from a path: safetensors too, with the classes in its header.

    Args:
        filename: safetensors by its ending, else what mmengine loads.
        map_location: of other files. Safetensors are loaded to the CPU.

    Returns:
        `state_dict`, and `meta` with mm's `dataset_meta` where the classes are known.

    Raises:
        FileNotFoundError: there is no such file.
        elsa.CheckpointError: no safetensors. It is never unpickled instead.
    """
    if not str(filename).endswith(".safetensors"):
        return load_from_local(filename, map_location)
    path = Path(filename).expanduser()
    checkpoint: dict[str, Any] = {"state_dict": elsa.read_state_dict(path), "meta": {}}
    with safe_open(path, "pt") as file:
        header = (file.metadata() or {}).get("classes", "[]")
    try:
        classes = list(map(str, json.loads(header)))
    except (ValueError, TypeError):
        raise elsa.CheckpointError(f"{path}: its header has no list of classes") from None
    if classes:
        meta = {"classes": tuple(classes), "palette": palette(len(classes))}
        checkpoint["meta"]["dataset_meta"] = meta
    return checkpoint


CheckpointLoader.register_scheme("", load_checkpoint_file, force=True)


def palette(count: int) -> list[tuple[int, int, int]]:
    """Colours (R, G, B, 0 to 255) of classes, in order; neighbours differ in hue."""
    colors = (colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.75, 0.9) for i in range(count))
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in colors]


class _FeatureBackbone(BaseModule):
    """What both backbones share: freezing, activation checkpoints, and loading weights."""

    model: Any
    """timm's feature wrapper; `self.core` is the timm model inside."""

    def __init__(
        self,
        name: str,
        *,
        out_indices: Sequence[int],
        frozen_stages: int,
        with_cp: bool,
        init_cfg: Mapping[str, Any] | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(init_cfg=dict(init_cfg) if init_cfg else None)
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.model = timm.create_model(
            name, features_only=True, out_indices=self.out_indices, feature_cls="getter", **kwargs
        )
        stages = len(self.model.feature_info.info)
        if not -1 <= frozen_stages <= stages:
            raise ValueError(f"frozen_stages must be in -1..{stages}, got {frozen_stages}")
        if with_cp:
            self.core.set_grad_checkpointing(True)

    @property
    def core(self) -> Any:
        """The timm model inside the feature wrapper."""
        return self.model.model

    @property
    def out_channels(self) -> list[int]:
        """Channels of each output."""
        return self.model.feature_info.channels()

    @property
    def out_strides(self) -> list[int]:
        """Image pixels per pixel of each output."""
        return self.model.feature_info.reduction()

    def init_weights(self) -> None:
        """Load the weights that `init_cfg` names; without it timm's own initialisation stays."""
        if self.init_cfg is None:
            return
        kind = self.init_cfg.get("type")
        if kind != "Pretrained":
            raise ValueError(f"init_cfg must be of type 'Pretrained' or None, got {kind!r}")
        self.load(Path(self.init_cfg["checkpoint"]))

    def load(self, path: Path) -> None:
        """Load a file into the timm model, strictly but for the classifier's part."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "_FeatureBackbone":
        super().train(mode)
        self._freeze()  # a frozen stage stays in evaluation mode: no dropped paths, fixed norms
        return self

    def _freeze(self) -> None:
        for module in self._frozen():
            module.eval()
            for parameter in module.parameters():
                parameter.requires_grad = False

    def _frozen(self) -> Iterator[nn.Module]:
        """The stem (from 0 on) and the first `frozen_stages` stages, with their output norms."""
        if self.frozen_stages < 0:
            return
        names = [info["module"] for info in self.model.feature_info.info]
        kept = set(names[self.frozen_stages :])
        yield from _before(self.core, kept)
        for stage in self.out_indices:
            if stage < self.frozen_stages:
                yield self._out_norm(stage)

    def _out_norm(self, stage: int) -> nn.Module:
        raise NotImplementedError


def _before(module: nn.Module, stop: set[str], prefix: str = "") -> Iterator[nn.Module]:
    """Submodules in the order of registration, until one of the names in `stop`."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if path in stop:
            return
        if any(other.startswith(path + ".") for other in stop):
            yield from _before(child, stop, path + ".")
            return
        yield child


@MODELS.register_module()
class ELSASwin(_FeatureBackbone):
    """ELSA-Swin with one norm per output, for any input size.

    Args:
        arch: "micro", "tiny", "small" or "base", the name of a timm model of `elsa`, or a dict
            with the `name` and arguments of the model that differ from its own.
        out_indices: stages to return, from 0.
        frozen_stages: -1 trains all; 0 freezes the patch embedding, n also the first n stages.
        with_cp: recompute the blocks' activations in the backward pass to save memory.
        drop_path_rate: stochastic depth.
        init_cfg: `dict(type="Pretrained", checkpoint=path)` with any file that
            `elsa.load_checkpoint` reads.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "tiny",
        *,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        drop_path_rate: float = 0.1,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        kwargs = {"name": arch} if isinstance(arch, str) else dict(arch)
        name = kwargs.pop("name", "tiny")
        name = ARCHITECTURES.get(name, name)
        if not name.startswith("elsa_swin_"):
            raise ValueError(
                f"arch must be one of {', '.join(ARCHITECTURES)} or a model elsa_swin_*, got"
                f" {name!r}; TimmBackbone takes any timm model"
            )
        super().__init__(
            name,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            init_cfg=init_cfg,
            drop_path_rate=drop_path_rate,
            out_norm=True,
            **kwargs,
        )
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> one (B, C_i, H / s_i, W / s_i) per output."""
        return tuple(self.model(x))

    def load(self, path: Path) -> None:
        elsa.load_checkpoint(self.model, path)

    def _out_norm(self, stage: int) -> nn.Module:
        return getattr(self.core, f"norm{stage}")


@MODELS.register_module()
class TimmBackbone(_FeatureBackbone):
    """Any timm model that has `forward_intermediates`, with a LayerNorm per output.

    Args:
        model_name: name of the timm model.
        out_indices, frozen_stages, with_cp, drop_path_rate, init_cfg: as in `ELSASwin`; the
            file holds a state dict of the timm model (safetensors or torch).
        **kwargs: arguments of the model. For timm's Swin those for images of any size are set,
            with shifted windows in the last stage too, whose map is one window at 224 px only.
    """

    def __init__(
        self,
        model_name: str,
        *,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        drop_path_rate: float = 0.1,
        init_cfg: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if model_name.startswith("swin_"):
            kwargs = {"strict_img_size": False, "always_partition": True} | kwargs
        super().__init__(
            model_name,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            init_cfg=init_cfg,
            drop_path_rate=drop_path_rate,
            **kwargs,
        )
        self.norms = nn.ModuleList([nn.LayerNorm(channels) for channels in self.out_channels])
        self.patch = getattr(getattr(self.core, "patch_embed", None), "patch_size", (1, 1))
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> one (B, C_i, H / s_i, W / s_i) per output; padded to whole patches."""
        x = F.pad(x, (0, -x.shape[-1] % self.patch[1], 0, -x.shape[-2] % self.patch[0]))
        return tuple(
            norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
            for norm, y in zip(self.norms, self.model(x), strict=True)
        )

    def load(self, path: Path) -> None:
        weights = elsa.read_state_dict(path)
        target = self.core.state_dict()
        cut = [n for n, child in self.core.named_children() if not list(child.parameters())]
        problems = [
            f"{name}: {tuple(value.shape)} in the file, {tuple(target[name].shape)} in the model"
            for name, value in weights.items()
            if name in target and value.shape != target[name].shape
        ]
        problems += [f"{name}: not in the file" for name in target if name not in weights]
        known = tuple(f"{name}." for name in [*cut, "head", "fc", "classifier", "norm"])
        problems += [
            f"{name}: not in the model"
            for name in weights
            if name not in target and not name.startswith(known)
        ]
        if problems:
            raise elsa.CheckpointError(
                f"{path} does not fit {type(self.core).__name__}:\n  " + "\n  ".join(problems[:20])
            )
        self.core.load_state_dict({k: v for k, v in weights.items() if k in target})

    def _out_norm(self, stage: int) -> nn.Module:
        return self.norms[self.out_indices.index(stage)]
