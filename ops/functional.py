"""`elsa_attention`: input checks and dispatch.

Shape legend: B batch, C channels, G heads, k kernel size, (H, W) size of `v`, (Ho, Wo) size of
the output, `Ho = H // stride`, `Wo = W // stride`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops import library
from ops.reference import elsa_attention_reference

BORDERS = ("zeros", "shift")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def elsa_attention(
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
    """Aggregate `v` over a k x k window with dynamic weights and a static ghost head.

        out[b, c, y, x] = sum_i (h_attn[b, head(c), i, y, x] * ghost_mul[c, i] + ghost_add[c, i])
                          * v[b, c, y * stride + dy(i), x * stride + dx(i)]

    `dy, dx` run row-major over the centred k x k window times `dilation`; `v` is zero outside
    the image. With the border "shift" the window of a pixel at the border is moved inside the image
    by steps of `dilation`, as in neighbourhood attention (arXiv 2204.07143, 2209.15001): every
    window then has k*k pixels, and `i` counts them from its own corner.

    Args:
        v: (B, C, H, W), float32, bfloat16, float16 or float64.
        h_attn: (B, G, k*k, H // stride, W // stride), dtype and device of `v`; G divides C. The
            size is that of an average pooling by `stride`, which drops the rest.
        ghost_mul: (C, k, k) or None (ones); dtype of `v`, or float32 beside halves.
        ghost_add: (C, k, k) or None (zeros); likewise.
        kernel_size: odd k.
        dilation, stride: at least 1.
        border: "zeros" or "shift"; the latter needs H and W of at least k * dilation.

    Returns:
        (B, C, H // stride, W // stride), dtype of `v`. Halves accumulate in float32. Contiguous; on
        a GPU channels_last where the channels of `v` lie side by side.

    Under autocast `v` and `h_attn` are cast to its dtype together, the ghosts stay as they are.
    Differentiable once in all four tensors (the reference backend: any number of times).

    Raises:
        ValueError: shapes, devices or integers that do not fit, with the shapes in the message.
        TypeError: dtypes that do not fit.
        StaleLibraryError: the library found was built for something else.
    """
    v, h_attn = autocast_together(v, h_attn)
    _check(v, h_attn, ghost_mul, ghost_add, kernel_size, dilation, stride, border)
    if library.use_compiled(v.device.type, library.state.backend):
        return torch.ops.elsa.elsa_attention(
            v, h_attn, ghost_mul, ghost_add, kernel_size, dilation, stride, border
        )
    return elsa_attention_reference(
        v,
        h_attn,
        ghost_mul,
        ghost_add,
        kernel_size=kernel_size,
        dilation=dilation,
        stride=stride,
        border=border,
    )


def autocast_together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast the tensors in its dtype, as those of one product; float64 stays as it is."""
    device_type = tensors[0].device.type
    # Meta tensors have no autocast, and asking for it raises.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    if tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) for t in tensors)


def check_window(
    kernel_size: int, dilation: int, stride: int, border: str, height: int, width: int
) -> None:
    """Raise ValueError unless the window is one that an image of this size can have."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    if dilation < 1 or stride < 1:
        raise ValueError(
            f"dilation and stride must be at least 1, got dilation={dilation}, stride={stride}"
        )
    if border not in BORDERS:
        raise ValueError(f"border must be one of {BORDERS}, got {border!r}")
    if border == "shift" and min(height, width) < kernel_size * dilation:
        raise ValueError(
            f"a shifted window of kernel_size {kernel_size} and dilation {dilation} needs an image "
            f"of at least {kernel_size * dilation} pixels a side, got {height} x {width}"
        )


def _check(
    v: Tensor,
    h_attn: Tensor,
    ghost_mul: Tensor | None,
    ghost_add: Tensor | None,
    kernel_size: int,
    dilation: int,
    stride: int,
    border: str,
) -> None:
    if v.dim() != 4:
        raise ValueError(f"v must be (B, C, H, W), got shape {tuple(v.shape)}")
    if h_attn.dim() != 5:
        raise ValueError(
            f"h_attn must be (B, G, k*k, H // stride, W // stride), got shape {tuple(h_attn.shape)}"
        )
    batch, channels, height, width = v.shape
    check_window(kernel_size, dilation, stride, border, height, width)
    heads = h_attn.shape[1]
    if heads < 1 or channels % heads != 0:
        raise ValueError(
            f"the heads of h_attn must divide the channels of v, got v {tuple(v.shape)} and "
            f"h_attn {tuple(h_attn.shape)}"
        )
    expected = (batch, heads, kernel_size * kernel_size, height // stride, width // stride)
    if h_attn.shape != expected:
        raise ValueError(
            f"h_attn must be (B, G, k*k, H // stride, W // stride) = {tuple(expected)} for "
            f"v {tuple(v.shape)}, kernel_size {kernel_size}, stride {stride}; "
            f"got {tuple(h_attn.shape)}"
        )
    if v.dtype not in DTYPES:
        raise TypeError(f"v must be float32, bfloat16, float16 or float64, got {v.dtype}")
    if h_attn.dtype != v.dtype:
        raise TypeError(
            f"v and h_attn must share a dtype, got v {v.dtype} and h_attn {h_attn.dtype}"
        )
    if h_attn.device != v.device:
        raise ValueError(
            f"v and h_attn must be on one device, got v {v.device} and h_attn {h_attn.device}"
        )
    for name, ghost in (("ghost_mul", ghost_mul), ("ghost_add", ghost_add)):
        if ghost is None:
            continue
        if ghost.shape != (channels, kernel_size, kernel_size):
            raise ValueError(
                f"{name} must be (C, k, k) = {(channels, kernel_size, kernel_size)} for "
                f"v {tuple(v.shape)}, got {tuple(ghost.shape)}"
            )
        if ghost.dtype != v.dtype and not (
            ghost.dtype == torch.float32 and v.dtype in (torch.bfloat16, torch.float16)
        ):
            raise TypeError(
                f"{name} must have v's dtype (or float32 beside halves), "
                f"got v {v.dtype} and {name} {ghost.dtype}"
            )
        if ghost.device != v.device:
            raise ValueError(
                f"v and {name} must be on one device, got v {v.device} and {name} {ghost.device}"
            )
