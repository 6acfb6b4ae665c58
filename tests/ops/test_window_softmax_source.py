"""The CUDA kernels of `window_softmax` run on the CPU, block by block."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.ops.test_cuda_source import compiled, pointer

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("host"), "window_softmax_on_host")


def laid_out(values, side_by_side):
    """(batch, heads, taps, pixels) as planes of pixels, or with a pixel's taps side by side."""
    if not side_by_side:
        return values.contiguous()
    return values.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "shared"),
    [
        ((2, 3, 49, 301), 48 * 1024),
        ((1, 2, 9, 256), 48 * 1024),
        ((2, 1, 81, 5), 48 * 1024),
        ((1, 2, 100, 70), 2 * 8 * 100 * 33),  # room for runs of 32 pixels only
        ((1, 1, 1, 40), 48 * 1024),
    ],
)
def test_both_layouts_match_float64(library, sizes, shared, dtype, side_by_side):
    torch.manual_seed(0)
    logits = laid_out((4 * torch.randn(sizes)).to(dtype), side_by_side)
    grad = torch.randn(sizes).to(dtype)
    weights, grad_logits = torch.empty_like(grad), torch.empty_like(logits)
    tensors = [logits, weights, grad, grad_logits]
    library.run_softmax(
        DTYPES.index(dtype),
        (ctypes.c_int64 * 5)(*sizes, shared),
        (ctypes.c_int64 * 16)(*(step for t in tensors for step in t.stride())),
        (ctypes.c_void_p * 4)(*map(pointer, tensors)),
    )
    close = {"rtol": 1.01 * ROUNDING[dtype], "atol": 1e-7 if dtype != torch.float64 else 1e-15}
    torch.testing.assert_close(weights.double(), logits.double().softmax(2), **close)
    exact = weights.double()
    exact *= grad.double() - (exact * grad.double()).sum(2, keepdim=True)
    close["atol"] = {torch.float64: 1e-14, torch.float32: 2e-6}.get(dtype, 1e-5)
    torch.testing.assert_close(grad_logits.double(), exact, **close)


def test_a_nan_stays_with_its_pixel(library):
    logits = torch.randn(1, 1, 9, 12)
    logits[0, 0, 4, 5] = float("nan")
    logits[0, 0, :, 7] = -float("inf")
    logits[0, 0, 1:, 9] = -float("inf")
    tensors = [logits, *(torch.empty_like(logits) for _ in range(3))]
    library.run_softmax(
        1,
        (ctypes.c_int64 * 5)(*logits.shape, 48 * 1024),
        (ctypes.c_int64 * 16)(*(step for t in tensors for step in t.stride())),
        (ctypes.c_void_p * 4)(*map(pointer, tensors)),
    )
    torch.testing.assert_close(tensors[1], logits.softmax(2), equal_nan=True)
