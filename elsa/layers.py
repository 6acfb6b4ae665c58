"""ELSA attention and its transformer block (Zhou et al., arXiv 2112.12786, sections 3.2 to 3.4).

Shapes, here and in the comments below:
    B batch, H x W feature map, C channels (dim), G heads, k kernel size, Q query/key channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from ops import elsa_attention, window_softmax

__all__ = ["ELSA", "ELSABlock", "refuse_scripting"]


def refuse_scripting(module: nn.Module) -> None:
    """Raise the one clear error for `torch.jit.script`, which cannot compile the operator."""
    raise NotImplementedError(
        f"{type(module).__name__} does not support torch.jit.script; "
        "use torch.compile or torch.export instead"
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@register_notrace_module  # as one node of an FX graph: sizes are looked at when it runs
class ELSA(nn.Module):
    """Enhanced local self-attention: Hadamard attention with a ghost head.

    A local attention map is computed by convolutions from the Hadamard product of queries and
    keys; the static ghost head multiplies it (`lam`) and adds to it (`gamma`) channel by channel,
    and the result gathers the values over a k x k neighbourhood (arXiv 2112.12786, section 3).

    Shape: (B, H, W, dim) -> (B, H // stride, W // stride, dim), channels last.

    The defaults are those of ELSA-Swin's blocks. The authors' class differs in three: its
    `qk_scale=None` stands for `(dim_v / num_heads) ** -0.5`, its `lam` is 1, and in their VOLO
    `kernel_size` is 5 and `qkv_bias` False. Pass those for a layer like theirs.

    Args:
        dim: Input and output channels.
        num_heads: Heads G of the Hadamard attention; divides `dim_v`.
        dim_qk: Query/key channels. Default `dim // 3 * 2`, raised to a multiple of `group_width`.
        dim_v: Value channels. Default `dim`.
        kernel_size: Odd size k of the neighbourhood.
        stride: Output stride.
        dilation: Spacing of the neighbours.
        qkv_bias: Bias in `pre_proj`.
        qk_scale: Factor on the Hadamard product; ELSA-Swin has 1.
        group_width: Channels per group of the k x k convolution on the product; "all" is one group.
        groups: Groups of the 1x1 convolution that makes the attention map.
        lam: Exponent of the multiplicative ghost head, a whole number >= 0; 0 leaves it out.
        gamma: Factor of the additive ghost head; 0 leaves it out.
        attn_drop: Dropout on the attention map.
        proj_drop: Dropout after `post_proj`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        dim_qk: int | None = None,
        dim_v: int | None = None,
        kernel_size: int = 7,
        stride: int = 1,
        dilation: int = 1,
        qkv_bias: bool = True,
        qk_scale: float = 1.0,
        group_width: int | Literal["all"] = 8,
        groups: int = 1,
        lam: float = 0.0,
        gamma: float = 1.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if group_width == "all":
            group_width = dim_qk = dim // 3 * 2 if dim_qk is None else dim_qk
        positive = {"dim": dim, "num_heads": num_heads, "stride": stride, "dilation": dilation}
        for name, value in {**positive, "group_width": group_width, "groups": groups}.items():
            _require(value >= 1, f"{name} must be at least 1, got {value}")
        dim_v = dim if dim_v is None else dim_v
        if dim_qk is None:
            dim_qk = -(-(dim // 3 * 2) // group_width) * group_width
        num_weights = kernel_size**2 * num_heads
        _require(
            kernel_size >= 1 and kernel_size % 2 == 1,
            f"kernel_size must be odd, got {kernel_size}",
        )
        _require(
            dim_v % num_heads == 0,
            f"num_heads must divide the value channels: num_heads={num_heads}, dim_v={dim_v}",
        )
        _require(
            dim_qk >= 1 and dim_qk % group_width == 0,
            f"group_width must divide dim_qk: group_width={group_width}, dim_qk={dim_qk}",
        )
        _require(
            dim_qk % groups == 0 and num_weights % groups == 0,
            "groups must divide dim_qk and kernel_size**2 * num_heads: "
            f"groups={groups}, dim_qk={dim_qk}, kernel_size**2 * num_heads={num_weights}",
        )
        # ghost_mul takes negative values, and those have no real fractional power.
        _require(
            lam >= 0 and float(lam).is_integer(),
            f"lam must be a whole number >= 0, because ghost_mul can be negative, got {lam}",
        )

        self.dim, self.dim_qk, self.dim_v = dim, dim_qk, dim_v
        self.num_heads = num_heads
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.scale = qk_scale
        self.lam, self.gamma = lam, gamma

        self.pre_proj = nn.Conv2d(dim, 2 * dim_qk + dim_v, 1, bias=qkv_bias)
        self.attn = nn.Sequential(
            nn.Conv2d(
                dim_qk,
                dim_qk,
                kernel_size,
                padding=dilation * (kernel_size // 2),
                dilation=dilation,
                groups=dim_qk // group_width,
            ),
            nn.GELU(),
            nn.Conv2d(dim_qk, num_weights, 1, groups=groups),
        )
        self.attn_drop = nn.Dropout(attn_drop)
        ghosts = (lam != 0) + (gamma != 0)
        self.ghost_head: nn.Parameter | None
        if ghosts:
            # One slice per ghost head in use, the multiplicative one first.
            heads = (1,) if ghosts == 1 else (2, 1)
            shape = (*heads, dim_v, kernel_size, kernel_size)
            self.ghost_head = nn.Parameter(torch.empty(shape))
        else:
            self.register_parameter("ghost_head", None)
        self.post_proj = nn.Linear(dim_v, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_ghost_head()

    def reset_ghost_head(self, add_std: float = 0.02) -> None:
        """Initialise `ghost_head`: mul normal(0, 1), add truncated normal of `add_std`."""
        if self.ghost_head is None:
            return
        # (n, C, k, k), n = 1 or 2 heads
        heads = self.ghost_head.data.view(-1, *self.ghost_head.shape[-3:])
        if self.lam != 0:
            nn.init.normal_(heads[0])
        if self.gamma != 0:
            trunc_normal_(heads[-1], std=add_std)

    def ghosts(self) -> tuple[Tensor | None, Tensor | None]:
        """`ghost_mul ** lam` and `ghost_add * gamma`, each (C, k, k), or None where left out."""
        if self.ghost_head is None:
            return None, None
        heads = self.ghost_head.view(-1, *self.ghost_head.shape[-3:])
        mul = add = None
        if self.lam != 0:
            mul = heads[0] if self.lam == 1 else heads[0] ** int(self.lam)
        if self.gamma != 0:
            add = heads[-1] if self.gamma == 1 else heads[-1] * self.gamma
        return mul, add

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H // stride, W // stride, dim)."""
        # The permuted view is channels_last memory, so the 1x1 convolutions need no copy.
        qkv = self.pre_proj(x.permute(0, 3, 1, 2))  # (B, 2Q + C, H, W)
        q, k, v = qkv.split((self.dim_qk, self.dim_qk, self.dim_v), dim=1)
        product = q * k
        if self.scale != 1:
            product = product * self.scale
        if self.stride > 1:
            product = F.avg_pool2d(product, self.stride)
        h_attn = self.attn(product)  # (B, G*k*k, H, W), heads outermost
        h_attn = h_attn.unflatten(1, (self.num_heads, self.kernel_size**2))
        h_attn = self.attn_drop(window_softmax(h_attn))
        ghost_mul, ghost_add = self.ghosts()
        out = elsa_attention(
            v,
            h_attn,
            ghost_mul,
            ghost_add,
            kernel_size=self.kernel_size,
            dilation=self.dilation,
            stride=self.stride,
        )
        return self.proj_drop(self.post_proj(out.permute(0, 2, 3, 1)))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"dilation={self.dilation}, lam={self.lam}, gamma={self.gamma}"
        )

    def __prepare_scriptable__(self) -> nn.Module:
        refuse_scripting(self)
        return self


class ELSABlock(nn.Module):
    """Pre-norm transformer block around `ELSA` (arXiv 2112.12786, figure 3).

    Shape: (B, H, W, dim) -> (B, H, W, dim).

    Args:
        dim: Channels.
        num_heads: Heads of the Hadamard attention.
        mlp_ratio: Hidden width of the MLP over `dim`.
        proj_drop: Dropout of the projections.
        drop_path: Stochastic depth rate.
        act_layer: Activation of the MLP.
        norm_layer: Normalisation over the last axis.
        mixer: What mixes neighbours: `ELSA`, or one of `COUNTERPARTS` to compare it with.
        **elsa: Further arguments of `mixer`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        mixer: Callable[..., nn.Module] = ELSA,
        **elsa,
    ) -> None:
        super().__init__()
        if elsa.get("stride", 1) != 1:
            raise ValueError(f"stride must be 1 in a residual block, got {elsa['stride']}")
        self.norm1 = norm_layer(dim)
        self.attn = mixer(dim, num_heads, proj_drop=proj_drop, **elsa)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))
