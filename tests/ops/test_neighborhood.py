"""Neighbourhood attention against dense attention with a mask, which knows nothing of windows."""

from __future__ import annotations

import pytest
import torch

import ops
from ops import na2d_av, na2d_qk


def draw(*size, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)


def neighbours(length, k, dilation):
    """(length, length): whether the second is in the window of the first."""
    near = torch.zeros(length, length, dtype=torch.bool)
    for centre in range(length):
        line = [at for at in range(length) if (at - centre) % dilation == 0]
        # The k nearest of the line, which in the middle are as many to both sides.
        near[centre, sorted(line, key=lambda at: abs(at - centre))[:k]] = True
    return near


def dense(query, key, value, k, dilation):
    """The same by softmax over all pixels, of which the mask leaves the neighbours."""
    height, width = query.shape[2:4]
    rows, cols = neighbours(height, k, dilation), neighbours(width, k, dilation)
    mask = (rows[:, None, :, None] & cols[None, :, None, :]).flatten(2).flatten(0, 1)
    assert (mask.sum(1) == k * k).all()
    flat = [t.flatten(2, 3) for t in (query, key, value)]
    out = torch.nn.functional.scaled_dot_product_attention(*flat, attn_mask=mask, scale=1.0)
    return out.unflatten(2, (height, width))


def ours(query, key, value, k, dilation):
    return na2d_av(na2d_qk(query, key, k, dilation).softmax(-1), value, k, dilation)


@pytest.mark.parametrize("backend", ["compiled", "reference"])
@pytest.mark.parametrize(
    ("size", "k", "dilation"),
    [
        ((2, 3, 9, 8, 5), 3, 1),
        ((1, 2, 12, 11, 32), 7, 1),
        ((1, 1, 17, 18, 8), 17, 1),
        ((1, 2, 11, 13, 4), 3, 2),
        ((1, 2, 16, 15, 4), 5, 3),
    ],
)
def test_equals_dense_attention_with_a_mask(size, k, dilation, backend):
    leaves = [draw(*size, seed=seed).requires_grad_() for seed in range(3)]
    upstream = draw(*size, seed=3)
    with ops.use_backend(backend):
        out = ours(*leaves, k, dilation)
        grads = torch.autograd.grad(out, leaves, upstream)
    expected = dense(*leaves, k, dilation)
    torch.testing.assert_close(out, expected)
    for a, b in zip(grads, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    tensors = [draw(2, 2, 10, 9, 16, dtype=dtype, seed=seed) for seed in range(3)]
    attn = na2d_qk(*tensors[:2], 5)
    assert attn.dtype == dtype
    exact = na2d_qk(*(t.double() for t in tensors[:2]), 5)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert (attn.double() - exact).abs().max() < tolerance * exact.abs().max()
    weights = attn.softmax(-1)
    out = na2d_av(weights, tensors[2], 5)
    assert out.dtype == dtype
    exact = na2d_av(weights.double(), tensors[2].double(), 5)
    assert (out.double() - exact).abs().max() < tolerance * exact.abs().max()


def test_gradcheck():
    query, key, value = (draw(1, 1, 4, 5, 2, seed=seed).requires_grad_() for seed in range(3))
    assert torch.autograd.gradcheck(lambda q, k: na2d_qk(q, k, 3), (query, key))
    attn = draw(1, 1, 4, 5, 9, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, v: na2d_av(a, v, 3), (attn, value))


def test_compile_and_autocast():
    tensors = [draw(1, 2, 8, 7, 8, dtype=torch.float32, seed=seed) for seed in range(3)]
    leaves, again = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    ours(*leaves, 5, 1).square().sum().backward()
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    compiled(*again, 5, 1).square().sum().backward()
    for a, b in zip(leaves, again, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert na2d_qk(*tensors[:2], 5).dtype == torch.bfloat16
        assert ours(*tensors, 5, 1).dtype == torch.bfloat16


def test_bad_input():
    q, k, v = (draw(1, 2, 8, 7, 4, seed=seed) for seed in range(3))
    attn = na2d_qk(q, k, 5)
    for call, error, message in (
        (lambda: na2d_qk(q, k[:, :, :6], 5), ValueError, r"query must be \(1, 2, 6, 7, 4\)"),
        (lambda: na2d_qk(q, k, 7, 2), ValueError, "at least 14 pixels a side, got 8 x 7"),
        (lambda: na2d_qk(q, k, 4), ValueError, "odd and positive, got 4"),
        (lambda: na2d_qk(q, k.float(), 3), TypeError, "float64 and torch.float32"),
        (lambda: na2d_qk(q[0], k[0], 3), ValueError, r"got shape \(2, 8, 7, 4\)"),
        (lambda: na2d_av(attn, v, 3), ValueError, r"attn must be \(1, 2, 8, 7, 9\)"),
        (lambda: na2d_av(attn, v[0], 5), ValueError, r"got shape \(2, 8, 7, 4\)"),
    ):
        with pytest.raises(error, match=message):
            call()
