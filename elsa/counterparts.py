"""What the paper compares ELSA with, as drop-ins for `ELSA` in the same block (section 3).

All aggregate `v` over a k x k neighbourhood between the same two projections; they differ in
where the weights of the neighbours come from.

Shapes: B batch, H x W feature map, C channels (dim), G heads, k kernel size.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor, nn

from ops import elsa_attention, window_softmax

__all__ = ["COUNTERPARTS", "DepthwiseConv", "DynamicFilter", "FilterNorm", "LocalAttention"]


class _Counterpart(nn.Module):
    """Checks, projections and dropout that the counterparts share.

    Shape: (B, H, W, dim) -> (B, H, W, dim), channels last.

    Args:
        dim: Channels.
        num_heads: Heads G, which share their weights over `dim / G` channels.
        kernel_size: Odd size k of the neighbourhood.
        qkv_bias: Bias of the projection in front.
        attn_drop: Dropout on the weights of the neighbours, where they depend on the image.
        proj_drop: Dropout after the projection behind.
    """

    projected = 1
    """Width of the projection in front, in multiples of `dim`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kernel_size: int = 7,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"num_heads must divide the channels: num_heads={num_heads}, dim={dim}"
            )
        self.dim, self.num_heads, self.kernel_size = dim, num_heads, kernel_size
        self.pre_proj = nn.Conv2d(dim, self.projected * dim, 1, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.post_proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def aggregate(self, x: Tensor) -> Tensor:
        """Projected (B, projected * dim, H, W) -> (B, dim, H, W)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, dim)."""
        out = self.aggregate(self.pre_proj(x.permute(0, 3, 1, 2)))
        return self.proj_drop(self.post_proj(out.permute(0, 2, 3, 1)))


class DepthwiseConv(_Counterpart):
    """Static weights, one k x k kernel per channel: depth-wise convolution."""

    def __init__(self, dim: int, num_heads: int, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        k = self.kernel_size
        self.conv = nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim)

    def aggregate(self, x: Tensor) -> Tensor:
        return self.conv(x)


class FilterNorm(nn.Module):
    """Each filter with a learnt mean and deviation in place of its own (arXiv 2104.14107, 3.3).

    Shape: (B, filters, k*k, ...) -> the same.

    Args:
        filters: How many, each with a mean and a deviation of its own.
        std: Initial deviation; the initial mean is zero.
    """

    def __init__(self, filters: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((filters,), std))
        self.bias = nn.Parameter(torch.zeros(filters))

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.dtype == torch.float64 else x.float()
        std, mean = torch.std_mean(x, dim=2, keepdim=True)
        shape = (1, -1, *(1 for _ in range(x.dim() - 2)))
        normed = (x - mean) / (std + 1e-10)
        return normed * self.weight.view(shape) + self.bias.view(shape)


@register_notrace_module
class DynamicFilter(_Counterpart):
    """The decoupled dynamic filter (DDF, arXiv 2104.14107): a spatial filter that a 1x1 convolution
    makes from the pixel in the middle, times a channel filter that two linear layers make from the
    image's mean, each normalised; no softmax.

    A head has a spatial filter of its own; with `num_heads=1` it is DDF's single one. Both
    deviations begin as k ** -0.5, so that their product has that of a depth-wise kernel, 1 / k.
    """

    squeeze = 5
    """The hidden layer of the channel filter has `dim / squeeze` channels (the paper's 0.2)."""

    def __init__(self, dim: int, num_heads: int, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        area, std = self.kernel_size**2, self.kernel_size**-0.5
        hidden = max(dim // self.squeeze, 1)
        self.attn = nn.Conv2d(dim, num_heads * area, 1)
        self.attn_norm = FilterNorm(num_heads, std)
        self.channel = nn.Sequential(
            nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim * area)
        )
        self.channel_norm = FilterNorm(dim, std)

    def aggregate(self, x: Tensor) -> Tensor:
        k, area = self.kernel_size, self.kernel_size**2
        spatial = self.attn_norm(self.attn(x).unflatten(1, (self.num_heads, area)))
        channel = self.channel(x.mean((2, 3))).unflatten(1, (self.dim, area))
        channel = self.channel_norm(channel).to(spatial.dtype)
        # The operator's static heads are one for all images: here an image is a group of channels.
        out = elsa_attention(
            x.flatten(0, 1).unsqueeze(0),
            self.attn_drop(spatial).flatten(0, 1).unsqueeze(0).to(x.dtype),
            channel.reshape(-1, k, k),
            kernel_size=k,
        )
        return out.view_as(x)


@register_notrace_module
class LocalAttention(_Counterpart):
    """Softmax over products of the query with each neighbour's key, and a relative position bias.

    Neighbours outside the image have no weight. Keys are unfolded: k * k times their memory.
    """

    projected = 3

    def __init__(self, dim: int, num_heads: int, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.scale = (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(
            torch.empty(num_heads, self.kernel_size**2)
        )
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def aggregate(self, x: Tensor) -> Tensor:
        heads, area, pad = self.num_heads, self.kernel_size**2, self.kernel_size // 2
        height, width = x.shape[-2:]
        q, k, v = x.chunk(3, dim=1)
        near = nn.functional.unfold(k, self.kernel_size, padding=pad)
        near = near.unflatten(1, (heads, -1, area)).unflatten(-1, (height, width))
        q = (q * self.scale).unflatten(1, (heads, -1))  # (B, G, C / G, H, W)
        weights = torch.einsum("bgdhw,bgdkhw->bgkhw", q, near)
        bias = self.relative_position_bias_table.to(weights.dtype)
        weights = weights + bias[:, :, None, None]
        inside = nn.functional.unfold(
            x.new_ones(1, 1, height, width), self.kernel_size, padding=pad
        )
        outside = inside.view(area, height, width) == 0
        weights = window_softmax(weights.masked_fill(outside, float("-inf")))
        return elsa_attention(v, self.attn_drop(weights), kernel_size=self.kernel_size)


COUNTERPARTS: dict[str, type[_Counterpart]] = {
    "depthwise": DepthwiseConv,
    "dynamic": DynamicFilter,
    "local": LocalAttention,
}
"""By the names that `operator` of `ELSASwin` takes."""
