"""`elsa.ELSA` against the formula of the paper, written out for single positions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import elsa


def at_position(module: elsa.ELSA, x: torch.Tensor, b: int, y: int, x0: int) -> torch.Tensor:
    """The output of one position by loops over heads, neighbours and channels."""
    qkv = F.conv2d(x.permute(0, 3, 1, 2), module.pre_proj.weight, module.pre_proj.bias)
    q, k = qkv[:, : module.dim_qk], qkv[:, module.dim_qk : 2 * module.dim_qk]
    v = qkv[:, 2 * module.dim_qk :]
    hadamard = q * k * module.scale
    if module.stride > 1:
        hadamard = F.avg_pool2d(hadamard, module.stride)
    size, heads, width = module.kernel_size, module.num_heads, module.dim_v // module.num_heads
    h_attn = module.attn(hadamard)[b, :, y, x0].reshape(heads, size * size).softmax(-1)
    ghost = module.ghost_head
    mul = torch.ones(module.dim_v, size, size)
    add = torch.zeros(module.dim_v, size, size)
    if module.lam and module.gamma:
        mul, add = ghost[0, 0] ** module.lam, ghost[1, 0] * module.gamma
    elif module.lam:
        mul = ghost[0] ** module.lam
    elif module.gamma:
        add = ghost[0] * module.gamma
    out = torch.zeros(module.dim_v)
    for c in range(module.dim_v):
        for i in range(size * size):
            dy, dx = ((j - size // 2) * module.dilation for j in divmod(i, size))
            yy, xx = y * module.stride + dy, x0 * module.stride + dx
            if 0 <= yy < x.shape[1] and 0 <= xx < x.shape[2]:
                weight = h_attn[c // width, i] * mul.flatten(1)[c, i] + add.flatten(1)[c, i]
                out[c] += weight * v[b, c, yy, xx]
    return module.post_proj(out)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"lam": 1, "gamma": 1},
        {"lam": 2, "gamma": 0},
        {"lam": 0, "gamma": 0, "dilation": 2},
        {"kernel_size": 5, "stride": 2, "lam": 1, "gamma": 0.5, "qk_scale": 0.3},
        {"dim_qk": 8, "dim_v": 16, "groups": 2, "group_width": 4},
    ],
)
@torch.no_grad()
def test_matches_the_formula(kwargs):
    torch.manual_seed(0)
    module = elsa.ELSA(12, 2, **({"kernel_size": 3, "group_width": 4} | kwargs)).eval()
    x = torch.randn(2, 6, 8, 12)
    out = module(x)
    assert out.shape == (2, 6 // module.stride, 8 // module.stride, 12)
    for b, y, x0 in [(0, 0, 0), (1, 1, 2), (1, out.shape[1] - 1, out.shape[2] - 1)]:
        torch.testing.assert_close(
            out[b, y, x0], at_position(module, x, b, y, x0), rtol=1e-4, atol=1e-5
        )


def test_default_qk_width():
    assert elsa.ELSA(96, 3, group_width=4).dim_qk == 64
    every = elsa.ELSA(96, 3, group_width="all")
    assert (every.dim_qk, every.attn[0].groups) == (64, 1)
    assert elsa.ELSA(128, 4, group_width=8).dim_qk == 88  # 84, raised to a multiple of 8


def test_ghost_shapes_and_initial_values():
    torch.manual_seed(0)
    shapes = {(0, 1): (1, 64, 7, 7), (1, 0): (1, 64, 7, 7), (1, 1): (2, 1, 64, 7, 7)}
    stds = {(0, 1): (0.02,), (1, 0): (1.0,), (1, 1): (1.0, 0.02)}
    for (lam, gamma), shape in shapes.items():
        ghost = elsa.ELSA(64, 2, lam=lam, gamma=gamma).ghost_head
        assert ghost.shape == shape
        heads = ghost.reshape(-1, 64 * 49)
        for head, std in zip(heads, stds[lam, gamma], strict=True):
            assert head.std().item() == pytest.approx(std, rel=0.1)
    assert elsa.ELSA(64, 2, lam=0, gamma=0).ghost_head is None


def test_block_keeps_the_shape_and_trains():
    block = elsa.ELSABlock(12, 2, kernel_size=3, group_width=4, drop_path=0.1)
    x = torch.randn(2, 5, 7, 12, requires_grad=True)
    out = block(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None for p in block.parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": 5}, "num_heads must divide"),
        ({"kernel_size": 2}, "kernel_size must be odd"),
        ({"lam": 1.5}, "lam must be a whole number"),
        ({"lam": -1}, "lam must be a whole number"),
        ({"dim_qk": 10}, "group_width must divide dim_qk"),
        ({"groups": 7}, "groups must divide"),
        ({"stride": 0}, "stride must be at least 1"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        elsa.ELSA(12, **({"num_heads": 2, "group_width": 4, "kernel_size": 3} | kwargs))


def test_block_refuses_a_stride():
    with pytest.raises(ValueError, match="stride must be 1"):
        elsa.ELSABlock(12, 2, stride=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_autocast_makes_no_float32_map_of_the_window():
    module = elsa.ELSA(32, 2, kernel_size=5).cuda()
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.autocast("cuda", torch.bfloat16),
    ):
        module(torch.randn(2, 8, 8, 32, device="cuda"))
    maps = [t.dtype for t in saved if t.dim() == 5 and t.shape[2] == 25]
    assert set(maps) == {torch.bfloat16}
