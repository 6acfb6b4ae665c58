"""What the operator is timed beside; each does the same work, or less, on the same tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, int, int, int, int, int]
"""(B, C, G, H, W, kernel_size)."""
Peer = tuple[Callable[..., Tensor], list[Tensor]]
"""A differentiable function and its inputs."""


def depthwise(shape: Shape, v: Tensor, add: Tensor) -> Peer:
    """The depthwise k x k convolution in the layout of `v`: it has no dynamic weights."""
    _, channels, *_, k = shape

    def function(v: Tensor, add: Tensor) -> Tensor:
        return F.conv2d(v, add.unsqueeze(1), padding=k // 2, groups=channels)

    return function, [v, add]


def unfold(shape: Shape, v: Tensor, h: Tensor, add: Tensor) -> Peer:
    """Autograd through `unfold`: k*k times the memory of v."""
    batch, channels, heads, height, width, k = shape

    def function(v: Tensor, h: Tensor, add: Tensor) -> Tensor:
        window = F.unfold(v, k, padding=k // 2)
        window = window.view(batch, heads, channels // heads, k * k, height, width)
        weight = h.unsqueeze(2) + add.view(1, heads, channels // heads, k * k, 1, 1)
        return (weight * window).sum(3).flatten(1, 2)

    return function, [v, h, add]


def flex_attention(shape: Shape, dtype: torch.dtype) -> Peer:
    """torch's compiled attention over the same window, with weights from queries and keys."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, channels, heads, height, width, k = shape

    def near(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        near_y = (q // width - kv // width).abs() <= k // 2
        return near_y & ((q % width - kv % width).abs() <= k // 2)

    # Each shape compiles anew; beyond dynamo's limit of them it would silently run unfused.
    torch._dynamo.reset()
    pixels = height * width
    make_mask: Callable[..., Any] = torch.compile(create_block_mask, dynamic=False)
    block_mask = make_mask(near, None, None, pixels, pixels, device="cuda")
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    size = (batch, heads, pixels, channels // heads)
    qkv = [torch.randn(size, dtype=dtype, device="cuda") for _ in range(3)]
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask), qkv


def natten(shape: Shape, dtype: torch.dtype) -> Peer:
    """NATTEN's product of given weights and values; other borders, no ghost head.

    Raises:
        ImportError: NATTEN is not installed, or has dropped the kernel (0.20).
    """
    try:
        na2d_av = importlib.import_module("natten.functional").na2d_av
    except AttributeError as error:
        raise ImportError("this NATTEN has no na2d_av") from error
    batch, channels, heads, height, width, k = shape
    size = (batch, heads, height, width)
    weights = torch.randn(*size, k * k, device="cuda").softmax(-1).to(dtype)
    values = torch.randn(*size, channels // heads, dtype=dtype, device="cuda")
    return lambda weights, values: na2d_av(weights, values, k, 1), [weights, values]


_plain_library: Any = None


def plain_kernel(shape: Shape, v: Tensor, h: Tensor, add: Tensor) -> Peer:
    """A plain float32 CUDA kernel, one thread per output element; compiled on first use."""
    global _plain_library
    if _plain_library is None:
        from torch.utils.cpp_extension import load

        source = Path(__file__).with_name("plain_kernel.cu")
        _plain_library = load("elsa_plain_kernel", [str(source)], extra_cuda_cflags=["-O3"])
    library, k = _plain_library, shape[-1]

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Tensor:
            ctx.save_for_backward(*tensors)
            return library.forward(*tensors, k)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return tuple(library.backward(grad, *ctx.saved_tensors, k))

    return Plain.apply, [t.float() for t in (v, h, add)]
