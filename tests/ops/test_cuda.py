"""The CUDA kernels on a GPU: values, bits, torch's features, memory."""

from __future__ import annotations

import pytest
import torch

from ops import elsa_attention, window_softmax
from tests.ops.oracle import make_inputs, oracle
from tests.ops.test_values import BOTH, TOLERANCE, close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def on_gpu(inputs, dtype):
    return [t.detach().to("cuda", dtype, copy=True).requires_grad_() for t in inputs]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("case", "border"), BOTH)
def test_forward_and_gradients(case, border, dtype):
    *sizes, k, dilation, stride = case
    ours = on_gpu(make_inputs(*sizes, k, stride), dtype)
    exact = [t.detach().cpu().double().requires_grad_() for t in ours]
    out = elsa_attention(*ours, kernel_size=k, dilation=dilation, stride=stride, border=border)
    expected = oracle(*exact, k, dilation, stride, border)
    close(out.cpu(), expected, TOLERANCE[dtype])
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream.cpu().double())
    for mine, theirs in zip(ours, exact, strict=True):
        close(mine.grad.cpu(), theirs.grad, TOLERANCE[dtype])


@pytest.mark.parametrize("present", [(False, False), (True, False), (False, True)])
def test_absent_ghosts(present):
    v, h, *ghosts = on_gpu(make_inputs(2, 24, 3, 9, 11, 7, 1), torch.float64)
    ghosts = [ghost if there else None for ghost, there in zip(ghosts, present, strict=True)]
    exact = [t.detach().cpu() if t is not None else None for t in (v, h, *ghosts)]
    out = elsa_attention(v, h, *ghosts, kernel_size=7)
    close(out.cpu(), oracle(*exact, 7, 1, 1), 1e-12)
    out.sum().backward()
    assert v.grad is not None


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("add", ["", "half", "float"])
@pytest.mark.parametrize(
    "sizes",
    [  # b, c, g, h, w, k: what banded.h does, in all depths of a head, kernels and widths of copies
        (2, 96, 3, 56, 56, 7),
        (2, 64, 2, 28, 28, 7),
        (3, 64, 2, 14, 14, 7),
        (1, 32, 1, 20, 75, 7),
        (2, 48, 3, 6, 7, 5),
        (1, 48, 1, 40, 70, 9),
        (1, 16, 2, 33, 66, 3),
        (1, 8, 1, 2, 3, 9),
        (1, 64, 1, 30, 41, 7),
    ],
)
def test_banded_kernels(sizes, add, dtype):
    v, h, _, ghost = make_inputs(*sizes)
    inputs = on_gpu([v, h], dtype)
    if add:
        inputs += on_gpu([ghost], dtype if add == "half" else torch.float32)
    exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
    out = elsa_attention(*inputs[:2], None, *inputs[2:], kernel_size=sizes[-1])
    expected = oracle(*exact[:2], None, *(exact[2:] or [None]), sizes[-1], 1, 1)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream.cpu().double())
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(inputs, exact, strict=True))]
    for ours, theirs in pairs:
        tolerance = 1.01 * rounding if ours.dtype == dtype else 1e-5
        scale = float(theirs.abs().max())
        torch.testing.assert_close(
            ours.detach().cpu().double(), theirs.detach(), rtol=tolerance, atol=2e-5 * scale
        )


@pytest.mark.parametrize("dtype", HALVES)
def test_a_nan_stays_with_the_pixels_whose_window_covers_it(dtype):
    v, h, _, add = on_gpu(make_inputs(1, 32, 2, 20, 40, 5), dtype)
    with torch.no_grad():
        v[0, 3, 4, 9] = v[0, 20, 11, 30] = float("nan")
    out = elsa_attention(v, h, None, add, kernel_size=5)
    exact = oracle(*(t.detach().cpu().double() for t in (v, h)), None, add.cpu().double(), 5, 1, 1)
    assert torch.equal(out.isnan().cpu(), exact.isnan())


def test_views_that_start_at_odd_elements():
    v, h, _, add = on_gpu(make_inputs(1, 32, 1, 16, 24, 7), torch.bfloat16)
    expected = elsa_attention(v, h, None, add, kernel_size=7)
    shifted = [torch.empty(t.numel() + 1, dtype=t.dtype, device="cuda")[1:] for t in (v, h)]
    shifted = [s.view_as(t).copy_(t.detach()) for s, t in zip(shifted, (v, h), strict=True)]
    assert torch.equal(elsa_attention(*shifted, None, add, kernel_size=7), expected)


def side_by_side(t):
    """The same values as a part of the channels of a channels_last tensor."""
    batch, channels, height, width = t.shape
    wide = torch.zeros(batch, height, width, channels + 16, dtype=t.dtype, device=t.device)
    part = wide[..., 8 : 8 + channels].permute(0, 3, 1, 2)
    return part.copy_(t.detach()).requires_grad_()


@pytest.mark.parametrize(
    ("sizes", "stride"),
    [
        ((2, 96, 3, 56, 56, 7), 1),  # heads of 32 channels: read and written where they lie
        ((2, 64, 2, 29, 37, 5), 1),
        ((2, 48, 3, 14, 14, 7), 1),  # heads of 16: copied
        ((2, 64, 2, 17, 20, 3), 2),  # the plain kernels
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_channels_that_lie_side_by_side(sizes, stride, dtype):
    v, h, _, add = on_gpu(make_inputs(*sizes, stride), dtype)
    last = side_by_side(v)
    gradient = torch.randn(2, sizes[1], sizes[3] // stride, sizes[4] // stride, device="cuda")
    results = []
    for values in (v, last):
        out = elsa_attention(values, h, None, add, kernel_size=sizes[-1], stride=stride)
        upstream = torch.empty_like(out).copy_(gradient)
        results.append((out, *torch.autograd.grad(out, (values, h, add), upstream)))
    for ours, planes in zip(results[1], results[0], strict=True):
        assert torch.equal(ours, planes)
    for image in results[1][:2]:
        assert image.is_contiguous(memory_format=torch.channels_last)
    fakes = "test_schema", "test_faketensor"
    arguments = (last, h, None, add, sizes[-1], 1, stride)
    torch.library.opcheck(torch.ops.elsa.elsa_attention, arguments, test_utils=fakes)


@pytest.mark.parametrize("layout", ["planes", "side by side", "strided"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", [(2, 3, 49, 28, 30), (1, 2, 9, 1, 1), (1, 1, 961, 9, 9)])
def test_window_softmax(sizes, dtype, layout):
    logits = torch.randn(sizes, device="cuda").to(dtype)
    if layout == "side by side":
        logits = logits.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    elif layout == "strided":
        logits = torch.stack([logits, logits], -1)[..., :-1, 0] if sizes[4] > 1 else logits
    logits.requires_grad_()
    exact = logits.detach().double().requires_grad_()
    weights, expected = window_softmax(logits), exact.softmax(2)
    assert weights.is_contiguous()
    close(weights, expected, TOLERANCE[dtype])
    upstream = torch.randn_like(weights)
    weights.backward(upstream)
    expected.backward(upstream.double())
    close(logits.grad, exact.grad, TOLERANCE[dtype])
    if layout == "side by side" and sizes[2] > 1:
        assert logits.grad.stride(2) == 1
    fakes = "test_schema", "test_faketensor"
    torch.library.opcheck(torch.ops.elsa.window_softmax, (logits,), test_utils=fakes)


def test_window_softmax_by_vmap():
    logits = torch.randn(2, 3, 2, 9, 8, 10, device="cuda")
    ours = torch.func.vmap(window_softmax, in_dims=1)(logits)
    torch.testing.assert_close(ours, logits.transpose(0, 1).softmax(3))


@pytest.mark.parametrize("mul", [False, True])
def test_same_bits_every_time(mul):
    v, h, ghost_mul, add = on_gpu(make_inputs(4, 96, 3, 56, 56, 7), torch.bfloat16)
    inputs = [v, h, ghost_mul, add] if mul else [v, h, add]

    def once():
        out = elsa_attention(v, h, ghost_mul if mul else None, add, kernel_size=7)
        return out, *torch.autograd.grad(out.float().square().sum(), inputs)

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


def test_torch_features():
    inputs = on_gpu(make_inputs(2, 16, 2, 9, 10, 5, 1), torch.float32)
    torch.library.opcheck(torch.ops.elsa.elsa_attention, (*inputs, 5, 1, 1))

    def call(*tensors):
        return elsa_attention(*tensors, kernel_size=5)

    eager = call(*inputs)
    torch.testing.assert_close(torch.compile(call, fullgraph=True)(*inputs), eager)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = call(*inputs)
    graph.replay()
    torch.testing.assert_close(captured, eager.detach())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert call(*inputs).dtype == torch.bfloat16


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extra_memory_is_small(dtype, channels_last):
    before = torch.cuda.memory_allocated()
    v, h, mul, add = on_gpu(make_inputs(8, 96, 3, 56, 56, 7, 1), dtype)
    if channels_last:
        v = v.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    mul = mul if dtype == torch.float32 else None  # with halves: banded.h
    inputs = [t for t in (v, h, mul, add) if t is not None]
    needed = 2 * sum(t.nbytes for t in inputs) + 2 * v.nbytes
    torch.cuda.reset_peak_memory_stats()
    out = elsa_attention(v, h, mul, add, kernel_size=7)
    out.backward(torch.empty_like(out))
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * needed
