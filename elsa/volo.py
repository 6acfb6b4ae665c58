"""ELSA-VOLO: VOLO with ELSA as the attention of its outlookers (arXiv 2112.12786, section 4.1).

Everything else is timm's VOLO, so its arguments and methods apply. The paper reports these
models and nobody has released weights of them: nothing here loads or reproduces a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.volo import VOLO, Outlooker
from torch import nn

from .layers import ELSA, refuse_scripting

__all__ = ["ELSAVOLO"]


class ELSAVOLO(VOLO):
    """VOLO whose outlookers attend with ELSA, both ghost heads on.

    Shape: (B, in_chans, H, W) -> (B, num_classes); H and W as `img_size`, a multiple of 16.

    Args:
        layers: Blocks per stage; outlookers in the stages that `outlook_attention` names.
        embed_dims: Channels per stage.
        num_heads: Heads per stage.
        kernel_size: ELSA's neighbourhood.
        group_width: ELSA's channels per group of the k x k convolution; "all" is one group.
        lam: Exponent of ELSA's multiplicative ghost head.
        gamma: Factor of ELSA's additive ghost head.
        **kwargs: Further arguments of timm's VOLO.
    """

    def __init__(
        self,
        layers: Sequence[int],
        embed_dims: Sequence[int],
        num_heads: Sequence[int],
        *,
        kernel_size: int = 5,
        group_width: int | Literal["all"] = 8,
        lam: float = 1.0,
        gamma: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            list(layers), embed_dims=list(embed_dims), num_heads=list(num_heads), **kwargs
        )
        for block in self.modules():
            if isinstance(block, Outlooker):
                old: Any = block.attn
                new = ELSA(
                    old.proj.out_features,
                    old.num_heads,
                    kernel_size=kernel_size,
                    group_width=group_width,
                    lam=lam,
                    gamma=gamma,
                    qkv_bias=kwargs.get("qkv_bias", False),
                    attn_drop=kwargs.get("attn_drop_rate", 0.0),
                )
                self._init_weights(new.post_proj)
                block.add_module("attn", new)

    def __prepare_scriptable__(self) -> nn.Module:
        refuse_scripting(self)
        return self


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": 0.96,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.conv.0",
        "classifier": ("head", "aux_head"),
        "paper_name": "ELSA: Enhanced Local Self-Attention for Vision Transformer",
        "paper_ids": "arXiv:2112.12786",
    } | kwargs


default_cfgs = generate_default_cfgs(
    {f"elsa_volo_d{size}.untrained": _cfg() for size in range(1, 6)}
)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict) -> Any:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        ELSAVOLO,
        variant,
        pretrained,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **(defaults | kwargs),
    )


@register_model
def elsa_volo_d1(pretrained: bool = False, **kwargs) -> ELSAVOLO:
    """ELSA-VOLO-D1; 27M parameters in the paper."""
    defaults = {
        "layers": (4, 4, 8, 2),
        "embed_dims": (192, 384, 384, 384),
        "num_heads": (6, 12, 12, 12),
    }
    return _create("elsa_volo_d1", pretrained, defaults, kwargs)


@register_model
def elsa_volo_d2(pretrained: bool = False, **kwargs) -> ELSAVOLO:
    """ELSA-VOLO-D2."""
    defaults = {
        "layers": (6, 4, 10, 4),
        "embed_dims": (256, 512, 512, 512),
        "num_heads": (8, 16, 16, 16),
    }
    return _create("elsa_volo_d2", pretrained, defaults, kwargs)


@register_model
def elsa_volo_d3(pretrained: bool = False, **kwargs) -> ELSAVOLO:
    """ELSA-VOLO-D3."""
    defaults = {
        "layers": (8, 8, 16, 4),
        "embed_dims": (256, 512, 512, 512),
        "num_heads": (8, 16, 16, 16),
    }
    return _create("elsa_volo_d3", pretrained, defaults, kwargs)


@register_model
def elsa_volo_d4(pretrained: bool = False, **kwargs) -> ELSAVOLO:
    """ELSA-VOLO-D4."""
    defaults = {
        "layers": (8, 8, 16, 4),
        "embed_dims": (384, 768, 768, 768),
        "num_heads": (12, 16, 16, 16),
    }
    return _create("elsa_volo_d4", pretrained, defaults, kwargs)


@register_model
def elsa_volo_d5(pretrained: bool = False, **kwargs) -> ELSAVOLO:
    """ELSA-VOLO-D5; wider MLPs and stem, as timm's."""
    defaults = {
        "layers": (12, 12, 20, 4),
        "embed_dims": (384, 768, 768, 768),
        "num_heads": (12, 16, 16, 16),
        "mlp_ratio": 4,
        "stem_hidden_dim": 128,
    }
    return _create("elsa_volo_d5", pretrained, defaults, kwargs)
