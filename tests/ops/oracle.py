"""A float64 oracle by index arithmetic, sharing nothing with ops/reference.py."""

from __future__ import annotations

import torch
from torch import Tensor


def window_positions(
    outputs: int, length: int, k: int, dilation: int, stride: int, border: str
) -> Tensor:
    """(k, outputs): the rows (or columns) of each output's window, some outside with "zeros".

    With "shift": of all k pixels that lie `dilation` apart, in step with the pixel and inside the
    image, those whose middle is nearest to it.
    """
    positions = []
    for centre in range(0, outputs * stride, stride):
        window = [centre + (i - k // 2) * dilation for i in range(k)]
        if border == "shift":
            line = range(centre % dilation, length, dilation)
            runs = [list(line[i : i + k]) for i in range(len(line) - k + 1)]
            window = min(runs, key=lambda run: abs(run[k // 2] - centre))
        positions.append(window)
    return torch.tensor(positions, dtype=torch.int64).reshape(outputs, k).T


def oracle(
    v: Tensor,
    h_attn: Tensor,
    mul: Tensor | None,
    add: Tensor | None,
    k: int,
    dilation: int,
    stride: int,
    border: str = "zeros",
) -> Tensor:
    """Gathers every window value by its index; differentiable, for small inputs only."""
    _, channels, height, width = v.shape
    heads = h_attn.shape[1]
    out_h, out_w = height // stride, width // stride
    head = torch.arange(channels) // (channels // heads)
    rows = window_positions(out_h, height, k, dilation, stride, border)
    cols = window_positions(out_w, width, k, dilation, stride, border)
    inside = (
        ((rows >= 0) & (rows < height))[:, None, :, None]
        & ((cols >= 0) & (cols < width))[None, :, None, :]
    ).reshape(k * k, out_h, out_w)
    window = v[
        :,
        :,
        rows.clamp(0, max(height - 1, 0))[:, None, :, None],
        cols.clamp(0, max(width - 1, 0))[None, :, None, :],
    ].reshape(v.shape[0], channels, k * k, out_h, out_w)
    weight = h_attn[:, head]
    if mul is not None:
        weight = weight * mul.reshape(1, channels, k * k, 1, 1)
    if add is not None:
        weight = weight + add.reshape(1, channels, k * k, 1, 1)
    return (weight * window * inside).sum(2)


def oracle_loops(
    v: Tensor,
    h_attn: Tensor,
    mul: Tensor,
    add: Tensor,
    k: int,
    dilation: int,
    stride: int,
    border: str = "zeros",
) -> Tensor:
    """The definition, one scalar at a time; checks `oracle` itself."""
    batch, channels, height, width = v.shape
    per_head = channels // h_attn.shape[1]
    out = torch.zeros(batch, channels, height // stride, width // stride, dtype=v.dtype)
    all_rows = window_positions(out.shape[2], height, k, dilation, stride, border).tolist()
    all_cols = window_positions(out.shape[3], width, k, dilation, stride, border).tolist()
    for b, c, y, x in torch.cartesian_prod(*(torch.arange(n) for n in out.shape)).tolist():
        for ky in range(k):
            for kx in range(k):
                yy, xx = all_rows[ky][y], all_cols[kx][x]
                if 0 <= yy < height and 0 <= xx < width:
                    h = h_attn[b, c // per_head, ky * k + kx, y, x]
                    out[b, c, y, x] += (h * mul[c, ky, kx] + add[c, ky, kx]) * v[b, c, yy, xx]
    return out


def make_inputs(
    b: int,
    c: int,
    g: int,
    h: int,
    w: int,
    k: int,
    stride: int = 1,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Tensor]:
    """v, soft-maxed h_attn, ghost_mul, ghost_add of one dtype."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    values = (
        draw(b, c, h, w),
        draw(b, g, k * k, h // stride, w // stride).softmax(2),
        draw(c, k, k),
        draw(c, k, k),
    )
    return [t.to(dtype) for t in values]
