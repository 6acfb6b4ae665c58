"""The CUDA kernels on a GPU: values, bits, torch's features, memory."""

from __future__ import annotations

import pytest
import torch

from ops import elsa_attention
from tests.ops.oracle import make_inputs, oracle
from tests.ops.test_values import CASES, TOLERANCE, close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def on_gpu(inputs, dtype):
    return [t.detach().to("cuda", dtype, copy=True).requires_grad_() for t in inputs]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(case, dtype):
    *sizes, k, dilation, stride = case
    ours = on_gpu(make_inputs(*sizes, k, stride), dtype)
    exact = [t.detach().cpu().double().requires_grad_() for t in ours]
    out = elsa_attention(*ours, kernel_size=k, dilation=dilation, stride=stride)
    expected = oracle(*exact, k, dilation, stride)
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


def test_same_bits_every_time():
    inputs = on_gpu(make_inputs(4, 96, 3, 56, 56, 7, 1), torch.bfloat16)

    def once():
        out = elsa_attention(*inputs, kernel_size=7)
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


def test_extra_memory_is_small():
    before = torch.cuda.memory_allocated()
    inputs = on_gpu(make_inputs(8, 96, 3, 56, 56, 7, 1), torch.float32)
    needed = 2 * sum(t.nbytes for t in inputs) + 2 * inputs[0].nbytes
    torch.cuda.reset_peak_memory_stats()
    elsa_attention(*inputs, kernel_size=7).sum().backward()
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * needed
