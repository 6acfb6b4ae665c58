"""Forward and backward against the float64 oracle."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import ops
from ops import elsa_attention
from tests.ops.oracle import make_inputs, oracle, oracle_loops

# B, C, G, H, W, kernel_size, dilation, stride
CASES = [
    (2, 8, 2, 6, 7, 3, 1, 1),
    (1, 32, 1, 14, 14, 7, 1, 1),  # one vector and a bit; rows in pairs
    (2, 10, 2, 9, 37, 7, 1, 1),  # channels left over from the register tile
    (1, 3, 3, 33, 5, 5, 1, 1),  # one channel per head
    (2, 40, 1, 9, 20, 5, 1, 1),  # heads wider than a block of channels, by less than a vector
    (1, 100, 2, 8, 18, 3, 1, 2),  # by more
    (1, 4, 1, 3, 3, 7, 1, 1),  # image smaller than the kernel
    (2, 6, 2, 1, 1, 5, 1, 1),
    (1, 4, 2, 1, 40, 3, 1, 1),
    (1, 4, 2, 40, 1, 3, 1, 1),
    (1, 8, 2, 11, 13, 3, 2, 1),
    (1, 8, 2, 11, 13, 5, 3, 1),
    (1, 8, 2, 11, 13, 3, 1, 2),
    (1, 8, 2, 12, 12, 3, 2, 2),
    (1, 8, 2, 17, 19, 5, 2, 3),
    (1, 4, 1, 10, 10, 7, 3, 2),
    (1, 4, 2, 6, 5, 1, 1, 1),
    (1, 4, 2, 15, 18, 13, 1, 1),
    (1, 4, 2, 9, 10, 9, 1, 1),
    (1, 8, 1, 70, 66, 3, 1, 1),  # more than one task per head
    (3, 4, 2, 8, 8, 11, 2, 1),
    (1, 4, 2, 2, 2, 3, 1, 5),  # no output at all
    (0, 4, 2, 6, 6, 3, 1, 1),
]
SHIFTED = [
    (2, 8, 2, 7, 9, 3, 1, 1),
    (1, 32, 1, 14, 14, 7, 1, 1),
    (1, 96, 2, 9, 11, 5, 1, 1),  # heads of three vectors with AVX-512
    (2, 10, 2, 9, 8, 7, 1, 1),  # few pixels whose window is centred
    (1, 6, 3, 5, 5, 5, 1, 1),  # one window for all
    (1, 8, 2, 11, 13, 3, 2, 1),  # lines of different lengths under dilation
    (1, 8, 2, 17, 16, 5, 3, 1),
    (1, 8, 2, 11, 13, 3, 1, 2),
    (1, 8, 2, 17, 19, 5, 2, 3),
    (1, 4, 1, 18, 17, 17, 1, 1),
    (1, 4, 2, 3, 3, 3, 1, 5),  # no output at all
    (0, 4, 2, 6, 6, 3, 1, 1),
]
BOTH = [*((case, "zeros") for case in CASES), *((case, "shift") for case in SHIFTED)]
# Largest error allowed, relative to the largest value of the tensor.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}


def close(ours: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    assert ours.shape == exact.shape
    if exact.numel():
        error = (ours.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-3)
        assert error <= tolerance


def test_oracle_is_the_definition():
    for window in ((1, 1), (2, 1), (1, 2), (1, 1, "shift"), (2, 2, "shift")):
        inputs = make_inputs(1, 4, 2, 7, 6, 3, window[1])
        torch.testing.assert_close(oracle(*inputs, 3, *window), oracle_loops(*inputs, 3, *window))


@pytest.mark.parametrize("backend", ["compiled", "reference"])
@pytest.mark.parametrize(("case", "border"), BOTH, ids=str)
def test_matches_oracle(case, border, backend):
    *shape, k, dilation, stride = case
    dtypes = TOLERANCE if backend == "compiled" else (torch.float64, torch.bfloat16)
    for dtype in dtypes:
        inputs = [t.requires_grad_() for t in make_inputs(*shape, k, stride, dtype)]
        exact = [t.detach().to(torch.float64, copy=True).requires_grad_() for t in inputs]
        with ops.use_backend(backend):
            out = elsa_attention(
                *inputs, kernel_size=k, dilation=dilation, stride=stride, border=border
            )
        expected = oracle(*exact, k, dilation, stride, border)
        assert out.dtype == dtype
        assert out.is_contiguous()
        close(out, expected.detach(), TOLERANCE[dtype])
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        out.backward(upstream)
        expected.backward(upstream.double())
        for ours, theirs in zip(inputs, exact, strict=True):
            if ours.grad is None:  # the reference leaves out a term without any output
                assert out.numel() == 0
                continue
            assert ours.grad.dtype == dtype
            close(ours.grad, theirs.grad, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["compiled", "reference"])
@pytest.mark.parametrize("use_mul", [False, True])
@pytest.mark.parametrize("use_add", [False, True])
def test_gradcheck(use_mul, use_add, backend):
    for dilation, stride, border in ((1, 1, "zeros"), (2, 2, "zeros"), (1, 1, "shift")):
        v, h, mul, add = (t.requires_grad_() for t in make_inputs(1, 2, 1, 4, 3, 3, stride))

        def call(*tensors, dilation=dilation, stride=stride, border=border):
            rest = list(tensors[2:])
            return elsa_attention(
                tensors[0],
                tensors[1],
                rest.pop(0) if use_mul else None,
                rest.pop(0) if use_add else None,
                kernel_size=3,
                dilation=dilation,
                stride=stride,
                border=border,
            )

        ghosts = [t for t, used in ((mul, use_mul), (add, use_add)) if used]
        with ops.use_backend(backend):
            assert torch.autograd.gradcheck(call, (v, h, *ghosts))


@pytest.mark.parametrize("border", ["zeros", "shift"])
def test_only_wanted_gradients_are_computed(border):
    v, h, mul, add = make_inputs(1, 4, 2, 5, 4, 3)
    grads = torch.ops.elsa.elsa_attention_backward(
        torch.ones_like(v), v, h, mul, add, 3, 1, 1, border, [False, True, False, True]
    )
    assert [g.numel() for g in grads] == [0, h.numel(), 0, add.numel()]
    h.requires_grad_()
    elsa_attention(v, h, mul, add, kernel_size=3, border=border).sum().backward()
    assert h.grad is not None
    assert v.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_is_read_and_rounded_as_torch_does(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    v = bits.view(dtype).reshape(1, 1, 256, 256)
    scales = (1.0, 0.3330078125, 3.0, 2.0**-9)
    for scale in scales:
        h = torch.full((1, 1, 1, 256, 256), scale, dtype=dtype)
        out = elsa_attention(v, h, kernel_size=1)
        expected = (v.float() * h[:, :, 0].float()).to(dtype)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_float32_ghosts_beside_halves():
    v, h, mul, add = make_inputs(1, 4, 2, 5, 4, 3, dtype=torch.bfloat16)
    mul, add = mul.float().requires_grad_(), add.float().requires_grad_()
    for backend in ("compiled", "reference"):
        with ops.use_backend(backend):
            out = elsa_attention(v, h, mul, add, kernel_size=3)
            assert out.dtype == torch.bfloat16
            grads = torch.autograd.grad(out.float().sum(), (mul, add))
            assert [g.dtype for g in grads] == [torch.float32] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("stride", "border"), [(1, "zeros"), (2, "zeros"), (1, "shift")])
def test_layouts(stride, border, dtype):
    """The same bits, result and gradients, however the inputs and the gradient lie."""
    inputs = make_inputs(2, 40, 2, 10, 20, 3, stride, dtype)
    v, h, mul, add = inputs
    upstream = torch.randn(2, 40, 10 // stride, 20 // stride).to(dtype)
    last = torch.channels_last

    def run(upstream, *inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = elsa_attention(*leaves, kernel_size=3, stride=stride, border=border)
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    expected = run(upstream, *inputs)
    for other in (
        (upstream, v.contiguous(memory_format=last), h, mul, add),
        (upstream.contiguous(memory_format=last), v, h, mul, add),
        (upstream, v, h.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2), mul, add),
        (
            upstream,
            torch.stack([v, v], -1)[..., 0],
            torch.stack([h, h], -2)[..., 0, :],
            mul.transpose(1, 2).contiguous().transpose(1, 2),
            torch.stack([add, add])[1],
        ),
    ):
        assert all(torch.equal(a, b) for a, b in zip(run(*other), expected, strict=True))
    # A sum hands an expanded gradient to the backward.
    one = torch.ones((), dtype=dtype).expand_as(upstream)
    for a, b in zip(run(one, *inputs), run(one.contiguous(), *inputs), strict=True):
        assert torch.equal(a, b)


def test_nan_passes_through():
    v, h, _, add = make_inputs(1, 2, 1, 12, 12, 3, dtype=torch.float32)
    v[0, 0, 6, 6] = float("nan")
    out = elsa_attention(v, h, None, add, kernel_size=3)
    assert torch.isnan(out[0, 0, 5:8, 5:8]).all()
    assert torch.isnan(out).sum() == 9


@pytest.mark.parametrize("border", ["zeros", "shift"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_every_run_and_for_any_number_of_threads(dtype, border):
    inputs = make_inputs(2, 12, 2, 40, 21, 5, dtype=dtype)
    results = []
    try:
        for threads in (2, 2, 1):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in inputs]
            out = elsa_attention(*leaves, kernel_size=5, border=border)
            out.float().square().sum().backward()
            results.append([out, *(t.grad for t in leaves)])
    finally:
        torch.set_num_threads(2)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["generic", "avx2"])
def test_older_processors(name, compiled_library):
    code = (
        "import sys, torch, ops; from ops.check import Case, check; torch.set_num_threads(1);"
        "ops.load_library(sys.argv[1]);"
        "check(cases=[Case(1, 8, 2, 9, 18, 5), Case(1, 4, 1, 8, 7, 3, stride=2),"
        "Case(1, 40, 2, 9, 18, 5), Case(1, 14, 1, 8, 7, 3, stride=2),"
        "Case(1, 40, 2, 9, 18, 5, border='shift')]);"
        "print(torch.ops.elsa.cpu_instruction_set())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(compiled_library)],
        env={**os.environ, "ELSA_OPS_CPU": name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in {name, "generic"}
