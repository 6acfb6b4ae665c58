"""What torch asks of an op: opcheck, compile, export, autocast, checkpoint, vmap."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import ops
from ops import elsa_attention
from tests.ops.oracle import make_inputs


@pytest.mark.parametrize(("stride", "border"), [(1, "zeros"), (2, "zeros"), (1, "shift")])
def test_opcheck(stride, border):
    inputs = [t.requires_grad_() for t in make_inputs(2, 4, 2, 6, 5, 3, stride, torch.float32)]
    v, h, mul, add = inputs
    for args in ((v, h, mul, add), (v, h, None, add), (v.detach(), h, None, None)):
        torch.library.opcheck(torch.ops.elsa.elsa_attention.default, (*args, 3, 1, stride, border))
    plain = [t.detach() for t in inputs]
    grad = torch.randn(2, 4, 6 // stride, 5 // stride)
    for mask in ([True] * 4, [False, True, False, True]):
        torch.library.opcheck(
            torch.ops.elsa.elsa_attention_backward.default,
            (grad, *plain, 3, 1, stride, border, mask),
        )


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_compile_fullgraph_equals_eager(backend):
    def step(v, h, mul, add):
        return elsa_attention(v, h, mul, add, kernel_size=3).square().sum()

    inputs = make_inputs(1, 4, 2, 7, 6, 3, dtype=torch.float32)
    leaves = [t.clone().requires_grad_() for t in inputs]
    again = [t.clone().requires_grad_() for t in inputs]
    with ops.use_backend(backend):
        step(*leaves).backward()
        torch._dynamo.reset()
        # aot_eager traces forward and backward as inductor does, without its C++ compilation.
        torch.compile(step, fullgraph=True, backend="aot_eager")(*again).backward()
    for a, b in zip(leaves, again, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_with_dynamic_sizes(backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda v, h, add: elsa_attention(v + 1, h, None, add, kernel_size=3) * 2,
        fullgraph=True,
        dynamic=True,
        backend=backend,
    )
    for size in (6, 9):
        v, h, _, add = make_inputs(2, 4, 2, size, size + 1, 3, dtype=torch.float32)
        expected = elsa_attention(v + 1, h, None, add, kernel_size=3) * 2
        torch.testing.assert_close(compiled(v, h, add), expected)


def test_compiled_code_follows_the_backend():
    torch._dynamo.reset()
    graphs = []

    def remember(graph, _):
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(
        lambda v, h: elsa_attention(v, h, kernel_size=3), fullgraph=True, backend=remember
    )
    v, h, *_ = make_inputs(1, 4, 2, 6, 6, 3)
    compiled(v, h)
    with ops.use_backend("reference"):
        compiled(v, h)
    assert ["elsa.elsa_attention" in g for g in graphs] == [True, False]


def test_export():
    class Module(torch.nn.Module):
        def forward(self, v, h):
            return elsa_attention(v, h, kernel_size=3)

    v, h, *_ = make_inputs(1, 4, 2, 6, 6, 3, dtype=torch.float32)
    exported = torch.export.export(Module(), (v, h))
    assert "elsa.elsa_attention" in str(exported.graph)
    assert torch.equal(exported.module()(v, h), Module()(v, h))


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_autocast_casts_values_and_attention_together(backend):
    v, h, mul, add = (
        t.requires_grad_() for t in make_inputs(1, 4, 2, 6, 6, 3, dtype=torch.float32)
    )
    with ops.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        out = elsa_attention(v.bfloat16(), h, mul, add, kernel_size=3)
        double = elsa_attention(v.double(), h.double(), kernel_size=3)
    assert out.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    out.float().sum().backward()
    assert h.grad.dtype == add.grad.dtype == torch.float32


def test_checkpoint():
    inputs = [t.requires_grad_() for t in make_inputs(1, 4, 2, 6, 6, 3)]
    plain = torch.autograd.grad(elsa_attention(*inputs, kernel_size=3).square().sum(), inputs)
    out = checkpoint(lambda *a: elsa_attention(*a, kernel_size=3), *inputs, use_reentrant=False)
    saved = torch.autograd.grad(out.square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_vmap(backend):
    sets = [make_inputs(1, 4, 2, 5, 5, 3, seed=seed) for seed in range(3)]
    stacked = [torch.stack(parts) for parts in zip(*sets, strict=True)]
    with ops.use_backend(backend):
        out = torch.func.vmap(lambda *a: elsa_attention(*a, kernel_size=3))(*stacked)
        expected = torch.stack([elsa_attention(*s, kernel_size=3) for s in sets])
        torch.testing.assert_close(out, expected)
        moved = torch.func.vmap(
            lambda v, h: elsa_attention(v, h, kernel_size=3), in_dims=(1, None)
        )(stacked[0].transpose(0, 1), sets[0][1])
        expected = torch.stack([elsa_attention(s[0], sets[0][1], kernel_size=3) for s in sets])
        torch.testing.assert_close(moved, expected)


def test_second_derivative_is_refused_by_the_compiled_op_only():
    inputs = [t.requires_grad_() for t in make_inputs(1, 2, 1, 3, 3, 3)]
    out = elsa_attention(*inputs, kernel_size=3)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="use_backend\\('reference'\\)"):
        grad.sum().backward()
    with ops.use_backend("reference"):
        assert torch.autograd.gradgradcheck(
            lambda *a: elsa_attention(*a, kernel_size=3), inputs, fast_mode=True
        )


@pytest.mark.parametrize(
    ("mul", "add", "forward", "backward"),
    # FLOPs per channel, output pixel and neighbour. Backward: grad_v, grad_h, then the ghosts'.
    [
        (False, False, 2, 2 + 2),
        (False, True, 3, 3 + 2 + 2),
        (True, False, 3, 3 + 3 + 3),
        (True, True, 4, 4 + 3 + 3 + 2),
    ],
)
def test_flop_counter_counts_by_hand(mul, add, forward, backward):
    v, h, *ghosts = make_inputs(2, 6, 2, 7, 8, 3, stride=2)
    ghosts = [g.requires_grad_() if on else None for g, on in zip(ghosts, (mul, add), strict=True)]
    products = 2 * 6 * 3 * 4 * 9  # B, C, Ho, Wo, k*k
    h.requires_grad_()
    for frozen in (False, True):
        v.requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counter:
            out = elsa_attention(v, h, *ghosts, kernel_size=3, stride=2)
        assert counter.get_total_flops() == forward * products
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        # The gradient of v takes what the forward does.
        assert counter.get_total_flops() == (backward - forward * frozen) * products


def test_on_a_gpu_results_lie_as_v_does():
    """The fake kernels; `test_cuda.py` compares them with the real ones."""
    with FakeTensorMode():
        wide = torch.empty(2, 6, 5, 48, device="cuda", requires_grad=True)
        v = wide[..., 8:40].permute(0, 3, 1, 2)
        h = torch.empty(2, 2, 9, 6, 5, device="cuda")
        for values, step in ((v, 1), (torch.empty(v.shape, device="cuda"), 30)):
            inputs = (values, h, None, None, 3)
            out = torch.ops.elsa.elsa_attention(*inputs)
            mask = [True, True, False, False]
            grads = torch.ops.elsa.elsa_attention_backward(out, *inputs, 1, 1, "zeros", mask)
            assert out.stride(1) == grads[0].stride(1) == step
            assert grads[1].is_contiguous()


@pytest.fixture
def no_vmap_fallback():
    """torch's own way for ops without a rule, which warns of itself, is shut."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


def test_window_softmax_of_a_gpu_has_a_vmap_rule(no_vmap_fallback):
    """The shapes; `test_cuda.py` has the values."""
    softmax = torch.ops.elsa.window_softmax
    with FakeTensorMode():
        logits = torch.empty(4, 2, 3, 9, 6, 5, device="cuda")
        assert torch.func.vmap(softmax, in_dims=1)(logits).shape == (2, 4, 3, 9, 6, 5)


def test_flop_counter_sees_of_the_reference_its_convolution_only():
    v, h, mul, add = make_inputs(2, 6, 2, 8, 8, 3)
    with ops.use_backend("reference"), FlopCounterMode(display=False) as counter:
        elsa_attention(v, h, mul, kernel_size=3)
        assert counter.get_total_flops() == 0
        elsa_attention(v, h, mul, add, kernel_size=3)
    assert counter.get_total_flops() == 2 * (2 * 6 * 8 * 8 * 9)


def test_flop_counter_that_was_there_before_the_library(compiled_library):
    code = """
import torch
from torch.utils.flop_counter import FlopCounterMode
from ops import elsa_attention
with FlopCounterMode(display=False) as counter:
    elsa_attention(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 9, 1, 1), kernel_size=3)
assert counter.get_total_flops() == 18, counter.get_total_flops()
"""
    environment = {**os.environ, "ELSA_OPS_LIBRARY": str(compiled_library)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
