"""`na2d_av` and `na2d_qk`: neighbourhood attention in the argument layout of NATTEN up to 0.19.

NATTEN 0.20 dropped these two halves of its operator (https://github.com/SHI-Labs/NATTEN), on which
models with their own weights between them depend. Written from the definition (arXiv 2204.07143;
dilation: 2209.15001). Shape legend: B batch, G heads, (H, W) image, D channels of a head, k window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops import library
from ops.functional import autocast_together, check_window, elsa_attention
from ops.reference import windows


def na2d_av(attn: Tensor, value: Tensor, kernel_size: int, dilation: int = 1) -> Tensor:
    """Sum each pixel's window of `value` with the weights `attn`.

    Args:
        attn: (B, G, H, W, k*k), the window row-major.
        value: (B, G, H, W, D), dtype and device of `attn`.
        kernel_size: odd k; k * dilation at most H and W.
        dilation: at least 1.

    Returns:
        (B, G, H, W, D), dtype of `value`. Differentiable once (the reference backend: any number
        of times).

    Raises:
        ValueError: shapes, devices or integers that do not fit.
        TypeError: dtypes that do not fit.
    """
    _check_layout("value", value, "attn", attn, (kernel_size**2,))
    heads, depth = value.shape[1], value.shape[4]
    out = elsa_attention(
        _planes(value),
        attn.permute(0, 1, 4, 2, 3),
        kernel_size=kernel_size,
        dilation=dilation,
        border="shift",
    )
    return out.unflatten(1, (heads, depth)).permute(0, 1, 3, 4, 2)


def na2d_qk(query: Tensor, key: Tensor, kernel_size: int, dilation: int = 1) -> Tensor:
    """The products of each pixel's `query` with the keys of its window, not scaled.

    Args:
        query: (B, G, H, W, D).
        key: (B, G, H, W, D), dtype and device of `query`.
        kernel_size: odd k; k * dilation at most H and W.
        dilation: at least 1.

    Returns:
        (B, G, H, W, k*k), the window row-major, dtype of `query`. Differentiable as `na2d_av`.

    Raises:
        ValueError, TypeError: as `na2d_av`.
    """
    query, key = autocast_together(query, key)
    _check_layout("key", key, "query", query, key.shape[4:])
    check_window(kernel_size, dilation, 1, "shift", key.shape[2], key.shape[3])
    if query.dtype != key.dtype or not query.is_floating_point():
        raise TypeError(
            f"query and key must share a floating dtype, got {query.dtype} and {key.dtype}"
        )
    if query.device != key.device:
        raise ValueError(
            f"query and key must be on one device, got {query.device} and {key.device}"
        )
    heads = query.shape[1]
    if library.use_compiled(query.device.type, library.state.backend):
        attn = _Products.apply(_planes(query), _planes(key), heads, kernel_size, dilation)
    else:
        attn = _products_reference(query, key, kernel_size, dilation)
    return attn.permute(0, 1, 3, 4, 2)


def _check_layout(
    name: str, values: Tensor, other_name: str, other: Tensor, last: tuple[int, ...]
) -> None:
    if values.dim() != 5:
        raise ValueError(
            f"{name} must be (B, heads, H, W, channels), got shape {tuple(values.shape)}"
        )
    expected = (*values.shape[:4], *last)
    if other.shape != expected:
        raise ValueError(
            f"{other_name} must be {tuple(expected)} for {name} {tuple(values.shape)}, "
            f"got {tuple(other.shape)}"
        )


def _planes(t: Tensor) -> Tensor:
    """(B, G, H, W, D) as (B, G * D, H, W)."""
    return t.permute(0, 1, 4, 2, 3).flatten(1, 2)


def _products_reference(query: Tensor, key: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """(B, G, k*k, H, W)."""
    dtype = torch.float32 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype
    queries, keys = _planes(query).to(dtype), _planes(key).to(dtype)
    size = key.shape[2], key.shape[3]
    products = [
        (queries * window).unflatten(1, key.shape[1:2] + key.shape[4:]).sum(2)
        for window in windows(keys, size, kernel_size, dilation, 1, "shift")
    ]
    return torch.stack(products, 2).to(query.dtype)


class _Products(torch.autograd.Function):
    """(B, G * D, H, W) query and key to (B, G, k*k, H, W).

    The products are what `elsa_attention` has as the gradient of its weights, with the query in the
    place of the result's gradient, so its three sums serve here in other roles.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, heads: int, kernel_size: int, dilation: int
    ) -> Tensor:
        ctx.save_for_backward(query, key)
        ctx.window = kernel_size, dilation, 1, "shift"
        size = (query.shape[0], heads, kernel_size**2, *query.shape[2:])
        # Not read: the op checks its shape.
        weights = query.new_empty(()).expand(size)
        mask = [False, True, False, False]
        return torch.ops.elsa.elsa_attention_backward(
            query, key, weights, None, None, *ctx.window, mask
        )[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key = ctx.saved_tensors
        (grad,) = grads
        grad_query = grad_key = None
        if ctx.needs_input_grad[0]:
            grad_query = torch.ops.elsa.elsa_attention(key, grad, None, None, *ctx.window)
        if ctx.needs_input_grad[1]:
            mask = [True, False, False, False]
            grad_key = torch.ops.elsa.elsa_attention_backward(
                query, key, grad, None, None, *ctx.window, mask
            )[0]
        return grad_query, grad_key, None, None, None
