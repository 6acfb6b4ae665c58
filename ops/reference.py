"""The operator in plain PyTorch: the oracle of the compiled kernels and the fallback without them.

Shape legend: B batch, C channels, G heads, k kernel size, (H, W) size of `v`, (Ho, Wo) size of
the output, `Ho = H // stride`, `Wo = W // stride`.
"""

from __future__ import annotations

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
) -> Tensor:
    """`ops.elsa_attention` by shifted views of the padded `v`; same arguments, not checked here.

    Works on every device, under autograd (any order), `torch.compile` and `torch.func`.
    Halves are computed in float32 and rounded once. No `unfold`: without `ghost_mul` autograd
    keeps views only; with it, one product of the size of `v` per window position.
    """
    batch, channels, height, width = v.shape
    heads = h_attn.shape[1]
    out_h, out_w = height // stride, width // stride
    k, pad = kernel_size, dilation * (kernel_size // 2)

    acc_dtype = torch.float32 if v.dtype in (torch.float16, torch.bfloat16) else v.dtype
    values, attn = v.to(acc_dtype), h_attn.to(acc_dtype)
    mul = None if ghost_mul is None else ghost_mul.to(acc_dtype)
    add = None if ghost_add is None else ghost_add.to(acc_dtype)

    # (B, G, C/G, H + 2 pad, W + 2 pad), so that a head's attention broadcasts over its channels.
    grouped = F.pad(values, (pad, pad, pad, pad)).unflatten(1, (heads, channels // heads))
    out = values.new_zeros((batch, heads, channels // heads, out_h, out_w))
    for i in range(k * k):
        top, left = (i // k) * dilation, (i % k) * dilation
        rows = slice(top, top + out_h * stride, stride)
        cols = slice(left, left + out_w * stride, stride)
        window = grouped[..., rows, cols]
        if mul is not None:
            window = window * mul[:, i // k, i % k].reshape(heads, channels // heads, 1, 1)
        out = out + attn[:, :, i].unsqueeze(2) * window
    out = out.flatten(1, 2)

    if add is not None and out_h > 0 and out_w > 0:
        # The static part is a depthwise convolution; it yields ceil(H / stride) rows.
        static = F.conv2d(values, add.unsqueeze(1), None, stride, pad, dilation, groups=channels)
        out = out + static[:, :, :out_h, :out_w]
    return out.to(v.dtype)
