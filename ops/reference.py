"""The operator in plain PyTorch: the oracle of the compiled kernels and the fallback without them.

Shape legend: B batch, C channels, G heads, k kernel size, (H, W) size of `v`, (Ho, Wo) size of
the output, `Ho = H // stride`, `Wo = W // stride`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def elsa_attention_reference(
    v: Tensor,
    h_attn: Tensor,
    ghost_mul: Tensor | None = None,
    ghost_add: Tensor | None = None,
    *,
    kernel_size: int,
    dilation: int = 1,
    stride: int = 1,
    border: str = "zeros",
) -> Tensor:
    """`ops.elsa_attention` by views of `v`, one per window position; same arguments, unchecked.

    Works on every device, under autograd (any order), `torch.compile` and `torch.func`.
    Halves are computed in float32 and rounded once. No `unfold`: with the border "zeros" and
    without `ghost_mul` autograd keeps views only; else one tensor of the size of `v` per position.
    """
    batch, channels, height, width = v.shape
    heads = h_attn.shape[1]
    out_h, out_w = height // stride, width // stride
    k, pad = kernel_size, dilation * (kernel_size // 2)

    acc_dtype = torch.float32 if v.dtype in (torch.float16, torch.bfloat16) else v.dtype
    values, attn = v.to(acc_dtype), h_attn.to(acc_dtype)
    mul = None if ghost_mul is None else ghost_mul.to(acc_dtype)
    add = None if ghost_add is None else ghost_add.to(acc_dtype)

    out = values.new_zeros((batch, heads, channels // heads, out_h, out_w))
    for i, window in enumerate(windows(values, (out_h, out_w), k, dilation, stride, border)):
        # (B, G, C/G, Ho, Wo), so that a head's attention broadcasts over its channels.
        window = window.unflatten(1, (heads, channels // heads))
        weight = attn[:, :, i].unsqueeze(2)
        if mul is not None:
            weight = weight * mul[:, i // k, i % k].reshape(heads, channels // heads, 1, 1)
        if add is not None and border == "shift":
            weight = weight + add[:, i // k, i % k].reshape(heads, channels // heads, 1, 1)
        out = out + weight * window
    out = out.flatten(1, 2)

    if add is not None and border == "zeros" and out_h > 0 and out_w > 0:
        # The static part is a depthwise convolution; it yields ceil(H / stride) rows.
        static = F.conv2d(values, add.unsqueeze(1), None, stride, pad, dilation, groups=channels)
        out = out + static[:, :, :out_h, :out_w]
    return out.to(v.dtype)


def windows(
    values: Tensor, size: tuple[int, int], k: int, dilation: int, stride: int, border: str
) -> Iterator[Tensor]:
    """The k*k values below each output pixel, row-major: each (B, C, Ho, Wo)."""
    if border == "shift":
        top = _shifted_starts(size[0], values.shape[2], k, dilation, stride, values.device)
        left = _shifted_starts(size[1], values.shape[3], k, dilation, stride, values.device)
        for i in range(k * k):
            rows, cols = top + i // k * dilation, left + i % k * dilation
            yield values.index_select(2, rows).index_select(3, cols)
        return
    pad = dilation * (k // 2)
    padded = F.pad(values, (pad, pad, pad, pad))
    for i in range(k * k):
        top_row, first_col = (i // k) * dilation, (i % k) * dilation
        row_slice = slice(top_row, top_row + size[0] * stride, stride)
        col_slice = slice(first_col, first_col + size[1] * stride, stride)
        yield padded[..., row_slice, col_slice]


def _shifted_starts(
    outputs: int, length: int, k: int, dilation: int, stride: int, device: torch.device
) -> Tensor:
    """The first row (or column) of each output's window, which lies inside `length` as a whole."""
    centres = torch.arange(outputs, device=device) * stride
    remainder = centres % dilation
    last = (length - 1 - remainder) // dilation - (k - 1)
    place = torch.minimum(centres // dilation - k // 2, last).clamp(min=0)
    return remainder + place * dilation
