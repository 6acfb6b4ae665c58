"""ELSA-Swin: Swin Transformer with ELSA in place of window attention (arXiv 2112.12786, section 4).

One file serves classification and dense prediction, in timm's manner. The stem, the patch
merging, the window attention, the MLP and the classifier are timm's own layers.

Shapes: B batch, H x W feature map, C channels. Feature maps are (B, H, W, C) inside the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    DropPath,
    Mlp,
    PatchEmbed,
    calculate_drop_path_rates,
    get_device_dtype,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from timm.models.swin_transformer import PatchMerging, WindowAttention
from torch import Tensor, nn

from .counterparts import COUNTERPARTS
from .layers import ELSA, ELSABlock, refuse_scripting

__all__ = ["ELSASwin", "WindowBlock", "checkpoint_filter_fn"]


@register_notrace_function
def with_a_patch(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """The images (B, C, H, W), if they are large enough. FX wraps names without underscore."""
    if x.shape[-2] < patch[0] or x.shape[-1] < patch[1]:
        raise ValueError(
            f"the image must hold at least one patch of {patch[0]} x {patch[1]} (patch_size), "
            f"got {x.shape[-2]} x {x.shape[-1]}"
        )
    return x


@register_notrace_module
class WindowBlock(nn.Module):
    """Swin's (shifted) window attention block for feature maps of any size.

    The map is padded to whole windows, then rolled. Unlike timm's block, padding, shift and mask
    follow the size met at run time: there is a shift only where the map exceeds the window.

    Shape: (B, H, W, dim) -> (B, H, W, dim).

    Args:
        dim: Channels.
        num_heads: Attention heads; divides `dim`.
        window_size: Side of the square window.
        shift: Shift the windows by half their size on maps larger than one window.
        mlp_ratio: Hidden width of the MLP over `dim`.
        qkv_bias: Bias of the query, key and value projection.
        attn_drop: Dropout on the attention.
        proj_drop: Dropout of the projections.
        drop_path: Stochastic depth rate.
        norm_layer: Normalisation over the last axis.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int = 7,
        shift: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: type[nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"num_heads must divide the channels: num_heads={num_heads}, dim={dim}"
            )
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
        self.window_size = window_size
        self.shift_size = window_size // 2 if shift else 0
        self.norm1 = norm_layer(dim)
        self.attn = WindowAttention(
            dim,
            num_heads,
            window_size=window_size,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
        )
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def _windows(self, x: Tensor) -> Tensor:
        """(B, H, W, C), whole windows -> (B * windows, window_size**2, C)."""
        size = self.window_size
        x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # (B, nH, w, nW, w, C)
        return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)

    def _mask(self, height: int, width: int, like: Tensor) -> Tensor:
        """Additive (windows, w*w, w*w) mask that parts what the roll brought together."""
        rows = torch.arange(height, device=like.device) >= height - self.shift_size
        cols = torch.arange(width, device=like.device) >= width - self.shift_size
        region = 2 * rows[:, None] + cols.long()  # (H, W); differs only inside edge windows
        region = self._windows(region[None, :, :, None]).squeeze(-1)
        apart = region[:, :, None] != region[:, None, :]
        return torch.zeros_like(apart, dtype=like.dtype).masked_fill(apart, -100.0)

    def _attend(self, x: Tensor) -> Tensor:
        size = self.window_size
        height, width = x.shape[1:3]
        pad_h, pad_w = -height % size, -width % size
        if pad_h or pad_w:
            x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
        full_h, full_w = height + pad_h, width + pad_w
        shift = self.shift_size if max(height, width) > size else 0
        mask = None
        if shift:
            x = x.roll((-shift, -shift), dims=(1, 2))
            mask = self._mask(full_h, full_w, x)
        x = self.attn(self._windows(x), mask=mask)
        x = x.unflatten(1, (size, size)).unflatten(0, (-1, full_h // size, full_w // size))
        x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, H, W, C)
        if shift:
            x = x.roll((shift, shift), dims=(1, 2))
        return x[:, :height, :width]

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        x = x + self.drop_path1(self._attend(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class ELSASwinStage(nn.Module):
    """Patch merging (except in the first stage), then the blocks.

    Shape: (B, H, W, in_dim) -> (B, ceil(H / 2), ceil(W / 2), dim); same H, W without merging.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing:
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class ELSASwin(nn.Module):
    """ELSA-Swin Transformer (arXiv 2112.12786, table 1); takes images of any size.

    Shape: (B, in_chans, H, W) -> (B, num_classes).

    Args:
        img_size: Nominal image size; kept as metadata, any size runs.
        patch_size: Patch of the stem.
        in_chans: Image channels.
        num_classes: Classes; 0 leaves out the classifier.
        global_pool: Pooling of the head, "" for none.
        embed_dim: Channels of stage 1, doubled by every further stage.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        operator: What the stages of `elsa_stages` use: "elsa", or what the paper compares it
            with: "window" (shifted window attention, as in Swin), "depthwise", "dynamic" or "local"
            (`elsa.counterparts`).
        elsa_stages: Which stages use `operator`; the others use (shifted) window attention.
        kernel_size: Neighbourhood of ELSA and its counterparts.
        group_width: ELSA's channels per group of the k x k convolution; "all" is one group.
        lam: Exponent of ELSA's multiplicative ghost head.
        gamma: Factor of ELSA's additive ghost head.
        window_size: Side of the attention window.
        mlp_ratio: Hidden width of the MLPs over their channels.
        qkv_bias: Bias of the query, key and value projections.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of the projections.
        attn_drop_rate: Dropout on the attention.
        drop_path_rate: Stochastic depth, rising linearly from 0 to this rate.
        norm_layer: Normalisation over the last axis.
        out_norm: Add one norm per stage for its feature map (`norm0`, `norm1`, ...), the layout
            of the published detection and segmentation backbones. With `features_only=True` they
            replace the final norm.
        init_std: Standard deviation of the linear layers at the start; None: 1 / sqrt(fan in),
            for the additive ghost head too, which otherwise has the paper's 0.02.
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        operator: str = "elsa",
        elsa_stages: Sequence[bool] = (True, True, True, False),
        kernel_size: int = 7,
        group_width: int | Literal["all"] = 8,
        lam: float = 0.0,
        gamma: float = 1.0,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        out_norm: bool = False,
        init_std: float | None = 0.02,
    ) -> None:
        super().__init__()
        for name, value in {"num_heads": num_heads, "elsa_stages": elsa_stages}.items():
            if len(value) != len(depths):
                raise ValueError(
                    f"{name} needs one entry per stage: depths={tuple(depths)}, "
                    f"{name}={tuple(value)}"
                )
        if operator not in ("elsa", "window", *COUNTERPARTS):
            raise ValueError(
                f"operator={operator!r} is unknown; choose elsa, window, {', '.join(COUNTERPARTS)}"
            )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.embed_dim = embed_dim
        self.num_features = embed_dim * 2 ** (len(depths) - 1)

        self.patch_embed = PatchEmbed(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            norm_layer=norm_layer,
            output_fmt="NHWC",
            strict_img_size=False,
            dynamic_img_pad=True,
        )
        common: dict[str, Any] = {
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "attn_drop": attn_drop_rate,
            "proj_drop": proj_drop_rate,
            "norm_layer": norm_layer,
        }
        local: dict[str, Any] = {"kernel_size": kernel_size}
        if operator == "elsa":
            local |= {"group_width": group_width, "lam": lam, "gamma": gamma}
        else:
            local["mixer"] = COUNTERPARTS.get(operator)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        self.feature_info = []
        for i in range(len(depths)):
            dim = embed_dim * 2**i
            blocks = [
                ELSABlock(dim, num_heads[i], drop_path=rate, **local, **common)
                if elsa_stages[i] and operator != "window"
                else WindowBlock(
                    dim,
                    num_heads[i],
                    window_size=window_size,
                    shift=j % 2 == 1,
                    drop_path=rate,
                    **common,
                )
                for j, rate in enumerate(rates[i])
            ]
            merge = PatchMerging(dim // 2, norm_layer=norm_layer) if i else nn.Identity()
            stages.append(ELSASwinStage(merge, blocks))
            self.feature_info.append(
                {"num_chs": dim, "reduction": patch_size * 2**i, "module": f"layers.{i}"}
            )
        self.layers = nn.Sequential(*stages)
        if out_norm:
            for i, info in enumerate(self.feature_info):
                self.add_module(f"norm{i}", norm_layer(info["num_chs"]))
        self.norm: nn.Module = norm_layer(self.num_features)
        self.head = ClassifierHead(
            self.num_features,
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            input_fmt=self.output_fmt,
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights(init_std)

    def init_weights(self, std: float | None = 0.02) -> None:
        """Linear layers truncated normal of `std` (None: 1 / sqrt(fan in)), biases zero.

        The additive ghost head is a depth-wise k x k kernel: its fan in is k * k.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=std or module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, ELSA):
                module.reset_ghost_head(0.02 if std else 1 / module.kernel_size)

    def no_weight_decay(self) -> set[str]:
        """Nothing: timm's optimisers leave out norms and biases themselves.

        As in the published runs the ghost head, a static depth-wise kernel, and the relative
        position tables are decayed; timm's Swin leaves its tables out.
        """
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort the parameters into stem and layers."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)"}
        return {
            "stem": r"^patch_embed",
            "blocks": [
                (r"^layers\.(\d+)\.downsample", (0,)),
                (r"^layers\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass."""
        for stage in self.layers:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes removes it."""
        self.num_classes = num_classes
        self.head.reset(
            num_classes,
            pool_type=global_pool,
            in_features=self.num_features,
            **get_device_dtype(self),
        )
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    def _stem(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, ceil(H / patch), ceil(W / patch), embed_dim)."""
        return self.patch_embed(with_a_patch(x, self.patch_embed.patch_size))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of chosen stages, with the final features unless `intermediates_only`.

        Args:
            x: Images (B, in_chans, H, W).
            indices: The stages; the last n for an int, all for None.
            norm: Apply the final norm to the last stage's map. With `out_norm` every map has its
                own norm, whatever is asked here.
            stop_early: Leave out the stages behind the last one wanted.
            output_fmt: "NCHW" or "NHWC" of the maps.
            intermediates_only: Return the list of maps alone.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.layers), indices)
        final = len(self.layers) - 1
        maps = []
        x = self._stem(x)
        for i, stage in enumerate(self.layers):
            if stop_early and i > last:
                break
            x = stage(x)
            if i in take:
                if hasattr(self, f"norm{i}"):
                    y = getattr(self, f"norm{i}")(x)
                else:
                    y = self.norm(x) if norm and i == final else x
                maps.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
        if intermediates_only:
            return maps
        return (self.norm(x) if not stop_early or last == final else x), maps

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the chosen stages' maps do not need; returns their indices."""
        take, last = feature_take_indices(len(self.layers), indices)
        cut = last < len(self.layers) - 1
        for i in range(len(self.layers)):
            if i not in take and hasattr(self, f"norm{i}"):
                delattr(self, f"norm{i}")
        self.layers = nn.Sequential(*list(self.layers)[: last + 1])
        if cut or prune_norm:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.feature_info[last]["num_chs"]
        if cut or prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, H / 32, W / 32, num_features) with patches of 4."""
        return self.norm(self.layers(self._stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, H, W, num_features) -> (B, num_classes), or the pooled features."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def __prepare_scriptable__(self) -> nn.Module:
        refuse_scripting(self)
        return self


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename and reorder a published state dict to this model's; ours passes through unchanged.

    The authors' model merges patches at the end of a stage, names the classifier `head`, and in
    stage 4 keeps the projection rows as v, q, k and the relative position table as (heads, n)
    indexed by key minus query.
    """
    published = any(
        re.match(r"layers\.0\.downsample\.|.*\.attn\.rb$|head\.(weight|bias)$", name)
        for name in state_dict
    )
    if not published:
        return dict(state_dict)
    windowed = {name.removesuffix("rb") for name in state_dict if name.endswith(".attn.rb")}
    out = {}
    for name, value in state_dict.items():
        if name.endswith((".relative_id", ".attn_mask")):
            continue
        name = re.sub(
            r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name
        )
        name = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)
        if name.endswith(".attn.rb"):
            name = name.removesuffix("rb") + "relative_position_bias_table"
            value = value.flip(-1).t().contiguous()
        elif name[: name.rfind(".attn.") + 6] in windowed:
            if ".pre_proj." in name:
                v, q, k = value.chunk(3)
                value = torch.cat((q, k, v))
            name = name.replace(".pre_proj.", ".qkv.").replace(".post_proj.", ".proj.")
        out[name] = value
    return out


def _cfg(**kwargs) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "paper_name": "ELSA: Enhanced Local Self-Attention for Vision Transformer",
        "paper_ids": "arXiv:2112.12786",
    } | kwargs


default_cfgs = generate_default_cfgs(
    {
        "elsa_swin_micro.untrained": _cfg(
            num_classes=10, input_size=(3, 56, 56), pool_size=(2, 2), crop_pct=1.0
        ),
        "elsa_swin_tiny.untrained": _cfg(),
        "elsa_swin_small.untrained": _cfg(),
        "elsa_swin_base.untrained": _cfg(),
    }
)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict) -> Any:
    depths = kwargs.get("depths", defaults["depths"])
    out_indices = kwargs.pop("out_indices", tuple(range(len(depths))))
    return build_model_with_cfg(
        ELSASwin,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **(defaults | kwargs),
    )


@register_model
def elsa_swin_micro(pretrained: bool = False, **kwargs) -> ELSASwin:
    """ELSA-Swin of 1.5 million parameters for small images on a CPU; not in the paper."""
    defaults = {
        "embed_dim": 32,
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 4, 8),
        "kernel_size": 5,
        "group_width": 8,
        "window_size": 4,
        # At these widths Swin's 0.02 starves the residual branches: 12% top-1 after 4 epochs of
        # the demo, against 54% after 3.
        "init_std": None,
    }
    return _create("elsa_swin_micro", pretrained, defaults, kwargs)


@register_model
def elsa_swin_tiny(pretrained: bool = False, **kwargs) -> ELSASwin:
    """ELSA-Swin-T: 29,140,978 parameters, 82.7 top-1 in the paper."""
    defaults = {
        "embed_dim": 96,
        "depths": (2, 2, 6, 2),
        "num_heads": (3, 6, 12, 24),
        "group_width": 4,
    }
    return _create("elsa_swin_tiny", pretrained, defaults, kwargs)


@register_model
def elsa_swin_small(pretrained: bool = False, **kwargs) -> ELSASwin:
    """ELSA-Swin-S: 52,874,626 parameters, 83.5 top-1 in the paper."""
    defaults = {
        "embed_dim": 96,
        "depths": (2, 2, 18, 2),
        "num_heads": (3, 6, 12, 24),
        "group_width": 8,
    }
    return _create("elsa_swin_small", pretrained, defaults, kwargs)


@register_model
def elsa_swin_base(pretrained: bool = False, **kwargs) -> ELSASwin:
    """ELSA-Swin-B: 92,682,464 parameters, 84.0 top-1 in the paper."""
    defaults = {
        "embed_dim": 128,
        "depths": (2, 2, 18, 2),
        "num_heads": (4, 8, 16, 32),
        "group_width": 8,
    }
    return _create("elsa_swin_base", pretrained, defaults, kwargs)
