"""The arithmetic of the CUDA kernels, run on the CPU thread by thread.

What this cannot show: the launches, halves, the blocks' reductions and speed. `test_cuda.py`
does on a GPU, and `ops.build` compares with the reference wherever it builds for one.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
import torch

from ops import elsa_attention_reference

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    library = tmp_path_factory.mktemp("host") / "kernels.so"
    source = str(HERE / "cuda_kernels_on_host.cpp")
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    subprocess.run([compiler, *flags, source, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library)).run


@pytest.mark.parametrize("ghosts", ["", "mul", "add", "mul add"])
@pytest.mark.parametrize(
    ("batch", "channels", "heads", "height", "width", "k", "dilation", "stride"),
    [
        (2, 24, 3, 9, 11, 7, 1, 1),
        (1, 20, 2, 8, 7, 5, 2, 1),  # channels of a head: one whole chunk and a part
        (2, 6, 6, 9, 9, 3, 1, 2),
        (1, 9, 3, 10, 13, 3, 2, 3),
        (1, 8, 1, 2, 3, 13, 1, 1),  # a window larger than the image
        (1, 3, 1, 1, 1, 1, 1, 1),
    ],
)
def test_every_thread_function_matches_the_reference(
    run, batch, channels, heads, height, width, k, dilation, stride, ghosts
):
    torch.manual_seed(0)
    out_h, out_w = height // stride, width // stride

    def draw(*size):
        return torch.randn(*size, dtype=torch.float64, requires_grad=True)

    v, h = draw(batch, channels, height, width), draw(batch, heads, k * k, out_h, out_w)
    mul = draw(channels, k, k) if "mul" in ghosts else None
    add = draw(channels, k, k) if "add" in ghosts else None
    upstream = torch.randn(batch, channels, out_h, out_w, dtype=torch.float64)
    expected = elsa_attention_reference(
        v, h, mul, add, kernel_size=k, dilation=dilation, stride=stride
    )
    expected.backward(upstream)

    sizes = (batch, channels, heads, height, width, out_h, out_w, k, dilation, stride)
    nan = float("nan")
    out, grad_v, grad_h = (torch.full(t.shape, nan).double() for t in (expected, v, h))
    grad_mul, grad_add = (torch.zeros(channels, k, k, dtype=torch.float64) for _ in range(2))

    def pointer(t):
        return ctypes.c_void_p(t.data_ptr() if t is not None else None)

    run(
        (ctypes.c_int64 * 10)(*sizes),
        *map(pointer, (upstream, v, h, mul, add, out, grad_v, grad_h, grad_mul, grad_add)),
    )
    torch.testing.assert_close(out, expected.detach())
    torch.testing.assert_close(grad_v, v.grad)
    torch.testing.assert_close(grad_h, h.grad)
    for ours, ghost in ((grad_mul, mul), (grad_add, add)):
        if ghost is not None:
            torch.testing.assert_close(ours, ghost.grad)
