"""The CUDA kernels run on the CPU: kernels.h thread by thread, banded.h block by block.

What this cannot show: the launches, the PTX in warp.h and speed. `test_cuda.py` does on a GPU, and
`ops.build` compares with the reference wherever it builds for one.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from ops import elsa_attention_reference

HERE = Path(__file__).parent


def compiled(directory: Path, name: str) -> ctypes.CDLL:
    library = directory / f"{name}.so"
    compiler = os.environ.get("CXX", "c++")
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    headers = [part for path in include_paths() for part in ("-isystem", path)]
    command = [compiler, *flags, *headers, str(HERE / f"{name}.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("host"), "cuda_kernels_on_host").run


@pytest.fixture(scope="module")
def banded(tmp_path_factory):
    library = compiled(tmp_path_factory.mktemp("host"), "banded_on_host")
    library.turns_per_matrix.restype = ctypes.c_double
    return library


def pointer(t):
    return ctypes.c_void_p(t.data_ptr() if t is not None else None)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("ghosts", ["", "mul", "add", "mul add"])
@pytest.mark.parametrize(
    ("batch", "channels", "heads", "height", "width", "k", "dilation", "stride", "border"),
    [
        (2, 24, 3, 9, 11, 7, 1, 1, "zeros"),
        (1, 20, 2, 8, 7, 5, 2, 1, "zeros"),  # channels of a head: one whole chunk and a part
        (2, 6, 6, 9, 9, 3, 1, 2, "zeros"),
        (1, 9, 3, 10, 13, 3, 2, 3, "zeros"),
        (1, 8, 1, 2, 3, 13, 1, 1, "zeros"),  # a window larger than the image
        (1, 3, 1, 1, 1, 1, 1, 1, "zeros"),
        (2, 24, 3, 9, 11, 7, 1, 1, "shift"),
        (1, 9, 3, 15, 17, 5, 3, 1, "shift"),
        (1, 9, 3, 10, 13, 3, 2, 3, "shift"),
        (1, 3, 1, 5, 5, 5, 1, 1, "shift"),
    ],
)
def test_every_thread_function_matches_the_reference(
    run, batch, channels, heads, height, width, k, dilation, stride, border, ghosts, channels_last
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
        v, h, mul, add, kernel_size=k, dilation=dilation, stride=stride, border=border
    )
    expected.backward(upstream)

    sizes = (batch, channels, heads, height, width, out_h, out_w, k, dilation, stride)
    shift = border == "shift"
    nan = float("nan")
    out, grad_v, grad_h = (torch.full(t.shape, nan).double() for t in (expected, v, h))
    grad_mul, grad_add = (torch.zeros(channels, k, k, dtype=torch.float64) for _ in range(2))

    images = [upstream, v.detach(), out, grad_v]
    if channels_last:
        images = [t.contiguous(memory_format=torch.channels_last) for t in images]
    upstream, values, out, grad_v = images
    run(
        (ctypes.c_int64 * 11)(*sizes, shift),
        (ctypes.c_int64 * 16)(*(step for t in images for step in t.stride())),
        *map(pointer, (upstream, values, h, mul, add, out, grad_v, grad_h, grad_mul, grad_add)),
    )
    torch.testing.assert_close(out, expected.detach())
    torch.testing.assert_close(grad_v, v.grad)
    torch.testing.assert_close(grad_h, h.grad)
    for ours, ghost in ((grad_mul, mul), (grad_add, add)):
        if ghost is not None:
            torch.testing.assert_close(ours, ghost.grad)


def among_other_channels(t, count):
    """The same values as the middle of a channels_last tensor of so many channels."""
    batch, channels, height, width = t.shape
    wide = torch.full((batch, height, width, count), float("nan"), dtype=t.dtype)
    first = (count - channels) // 16 * 8
    part = wide[..., first : first + channels].permute(0, 3, 1, 2)
    return part.copy_(t)


class Banded:
    """One call of the banded kernels and of the reference in float64 on the same rounded inputs."""

    NAMES = ("out", "grad_v", "grad_h", "grad_add")

    def __init__(self, sizes, dtype, add, spoil=lambda v, h, grad: None):
        torch.manual_seed(0)
        self.sizes, self.dtype = sizes, dtype
        batch, channels, heads, height, width, k = sizes
        self.v = torch.randn(batch, channels, height, width).to(dtype)
        self.h = torch.randn(batch, heads, k * k, height, width).softmax(2).to(dtype)
        self.add = {
            "": None,
            "half": torch.randn(channels, k, k).to(dtype).float(),
            "float": torch.randn(channels, k, k),
        }[add]
        self.parts = 2 if add == "float" else 1
        self.grad = torch.randn_like(self.v)
        spoil(self.v, self.h, self.grad)
        inputs = [t.double().requires_grad_() for t in (self.v, self.h, self.add) if t is not None]
        out = elsa_attention_reference(*inputs[:2], None, *(inputs[2:] or [None]), kernel_size=k)
        grads = torch.autograd.grad(out, inputs, self.grad.double())
        self.expected = [out.detach(), *grads]

    def run(self, banded, segments=0, rows=0, splits=1, reverse=False, only_add=False, column=0):
        """With `column` the images have their channels side by side, so many elements apart."""
        vector = next(n for n in (4, 2, 1) if self.sizes[4] % n == 0)
        setting = (vector, segments, rows, self.parts, splits, reverse, column)
        nan = float("nan")
        inputs = [self.grad, self.v]
        results = [torch.full_like(t, nan) for t in (self.v, self.v, self.h)]
        if column:
            inputs = [among_other_channels(t, column) for t in inputs]
            results[:2] = [t.to(memory_format=torch.channels_last) for t in results[:2]]
        if self.add is not None:
            results.append(torch.full_like(self.add, nan))
        if only_add:
            results[2] = None
        tensors = [*inputs, self.h, self.add, *results, None]
        self.fixed_tiles = banded.run_banded(
            self.dtype == torch.bfloat16,
            (ctypes.c_int64 * 6)(*self.sizes),
            (ctypes.c_int64 * 7)(*setting),
            (ctypes.c_void_p * 8)(*(pointer(t) for t in tensors[:8])),
        )
        return results

    def compare(self, results):
        # One rounding of the result, and the sums in float32.
        rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[self.dtype]
        for name, ours, exact in zip(self.NAMES, results, self.expected, strict=False):
            scale = exact.abs().nan_to_num(0, 0, 0).max()
            close = 1.01 * rounding if ours.dtype == self.dtype else 1e-5
            torch.testing.assert_close(
                ours.double(),
                exact,
                rtol=close,
                atol=2e-5 * float(scale),
                equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )


DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", ["", "half", "float"])
@pytest.mark.parametrize(
    "sizes",
    [  # batch, channels, heads, height, width, k
        (2, 96, 3, 5, 12, 7),
        (1, 32, 1, 17, 72, 7),  # more than one tile in both directions
        (1, 16, 2, 9, 66, 3),
        (2, 48, 3, 6, 7, 5),
        (1, 48, 1, 10, 14, 9),
        (1, 8, 1, 2, 3, 9),  # smaller than the window
        (1, 64, 1, 7, 9, 7),
        (1, 24, 1, 1, 1, 3),
        (1, 40, 1, 4, 28, 5),
    ],
)
def test_banded_kernels_match_the_reference(banded, sizes, add, dtype):
    case = Banded(sizes, dtype, add)
    case.compare(case.run(banded))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("k", [3, 5, 7, 9])
@pytest.mark.parametrize(("segments", "rows"), [(8, 2), (4, 4), (2, 2), (1, 6)])
def test_banded_kernels_with_any_tile_and_order_of_warps(banded, segments, rows, k, reverse):
    case = Banded((3, 16, 1, 13, 22, k), torch.bfloat16, "float")
    case.compare(case.run(banded, segments, rows, splits=2, reverse=reverse))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("k", "segments", "rows"),
    [(3, 0, 0), (7, 0, 0), (9, 0, 0), (5, 8, 2), (5, 4, 4), (5, 2, 2), (5, 1, 6)],
)
def test_banded_kernels_with_the_channels_of_a_pixel_side_by_side(
    banded, k, segments, rows, reverse
):
    case = Banded((2, 64, 2, 11, 21, k), torch.bfloat16, "float")
    case.compare(case.run(banded, segments, rows, reverse=reverse, column=104))


@pytest.mark.parametrize("column", [0, 64])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("dtype", "add"), [(torch.bfloat16, "half"), (torch.float16, "float")])
@pytest.mark.parametrize(("segments", "rows", "width"), [(8, 8, 76), (4, 8, 28), (2, 4, 14)])
def test_banded_kernels_whose_tile_the_compiler_knows(
    banded, segments, rows, width, dtype, add, reverse, column
):
    """Those of ELSA-Swin's stages."""
    case = Banded((1, 64, 2, 11, width, 7), dtype, add)
    case.compare(case.run(banded, segments, rows, reverse=reverse, column=column))
    assert case.fixed_tiles == 3
    assert banded.turns_per_matrix() == 1  # no bank of shared memory is asked twice at a time


@pytest.mark.parametrize("reverse", [False, True])
def test_the_ghost_gradient_alone(banded, reverse):
    case = Banded((3, 16, 1, 9, 16, 3), torch.bfloat16, "half")
    grad_add = case.run(banded, splits=1, reverse=reverse, only_add=True)[3]
    torch.testing.assert_close(grad_add.double(), case.expected[3], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("column", [0, 40])
@pytest.mark.parametrize("add", ["", "float"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_banded_kernels_keep_a_nan_to_its_window(banded, value, dtype, add, column):
    def spoil(v, h, grad):
        v[0, 3, 4, 9] = v[0, 20, 11, 30] = value
        grad[0, 9, 6, 17] = value

    case = Banded((1, 32, 1 if column else 2, 12, 40, 5), dtype, add, spoil)
    out, grad_v, grad_h, *_ = case.run(banded, column=column)
    for ours, exact in zip((out, grad_v, grad_h), case.expected, strict=False):
        assert 0 < exact.isfinite().sum() < exact.numel()
        assert torch.equal(ours.isfinite(), exact.isfinite())
    finite = [exact.isfinite() for exact in case.expected[:3]]
    case.compare(
        [
            torch.where(f, t, e.to(dtype))
            for f, t, e in zip(finite, (out, grad_v, grad_h), case.expected, strict=False)
        ]
    )


def test_banded_kernels_with_a_ghost_head_beyond_float16(banded):
    case = Banded((1, 8, 1, 3, 8, 3), torch.float16, "float")
    case.add[2, 1, 1] = 1e5
    out = case.run(banded)[0]
    expected = elsa_attention_reference(
        case.v.double() / 1e5, case.h.double(), None, case.add.double(), kernel_size=3
    )
    fits = (expected * 1e5).abs() < 6e4
    torch.testing.assert_close(out[fits].double(), (expected * 1e5)[fits], rtol=1e-3, atol=1e-3)
