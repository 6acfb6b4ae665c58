"""Bad input is refused with its shapes, by the Python entry and by the op itself."""

from __future__ import annotations

import pytest
import torch

from ops import elsa_attention


def good() -> dict:
    return {
        "v": torch.zeros(2, 8, 6, 6),
        "h_attn": torch.zeros(2, 2, 9, 6, 6),
        "ghost_mul": torch.zeros(8, 3, 3),
        "ghost_add": torch.zeros(8, 3, 3),
        "kernel_size": 3,
        "dilation": 1,
        "stride": 1,
        "border": "zeros",
    }


BAD = [
    ({"kernel_size": 4}, ValueError, "odd and positive, got 4"),
    ({"kernel_size": -3}, ValueError, "got -3"),
    ({"dilation": 0}, ValueError, "dilation=0"),
    ({"stride": 0}, ValueError, "stride=0"),
    ({"border": "reflect"}, ValueError, "'zeros', 'shift'.*got 'reflect'"),
    ({"border": "shift", "dilation": 3}, ValueError, "at least 9 pixels a side, got 6 x 6"),
    ({"stride": 2}, ValueError, r"\(2, 2, 9, 3, 3\).*got \(2, 2, 9, 6, 6\)"),
    ({"kernel_size": 5}, ValueError, r"\(2, 2, 25, 6, 6\)"),
    ({"v": torch.zeros(8, 6, 6)}, ValueError, r"\(8, 6, 6\)"),
    ({"h_attn": torch.zeros(2, 18, 6, 6)}, ValueError, r"\(2, 18, 6, 6\)"),
    ({"h_attn": torch.zeros(2, 3, 9, 6, 6)}, ValueError, r"divide.*\(2, 3, 9, 6, 6\)"),
    ({"h_attn": torch.zeros(2, 0, 9, 6, 6)}, ValueError, "divide"),
    ({"h_attn": torch.zeros(1, 2, 9, 6, 6)}, ValueError, r"got \(1, 2, 9, 6, 6\)"),
    ({"h_attn": torch.zeros(2, 2, 9, 6, 6).double()}, TypeError, "float32.*float64"),
    ({"v": torch.zeros(2, 8, 6, 6, dtype=torch.int64)}, TypeError, "int64"),
    ({"ghost_mul": torch.zeros(8, 9)}, ValueError, r"ghost_mul.*\(8, 3, 3\).*\(8, 9\)"),
    ({"ghost_add": torch.zeros(1, 8, 3, 3)}, ValueError, r"ghost_add.*\(1, 8, 3, 3\)"),
    ({"ghost_add": torch.zeros(8, 3, 3).half()}, TypeError, "ghost_add.*float16"),
    ({"h_attn": torch.zeros(2, 2, 9, 6, 6, device="meta")}, ValueError, "one device"),
    ({"ghost_add": torch.zeros(8, 3, 3, device="meta")}, ValueError, "one device"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda x: None)
def test_bad_input(change, error, message):
    arguments = {**good(), **change}
    with pytest.raises(error, match=message):
        elsa_attention(
            arguments.pop("v"),
            arguments.pop("h_attn"),
            arguments.pop("ghost_mul"),
            arguments.pop("ghost_add"),
            **arguments,
        )
    if any(torch.is_tensor(t) and t.is_meta for t in change.values()):
        return  # torch sends these to the fake kernel, which touches no memory
    with pytest.raises((RuntimeError, TypeError)):
        torch.ops.elsa.elsa_attention(*{**good(), **change}.values())


def test_bad_gradient_shape():
    v, h, mul, add, *numbers = good().values()
    with pytest.raises(
        RuntimeError, match=r"grad_out must be .*\[2, 8, 6, 6\], got .*\[2, 8, 6, 5\]"
    ):
        torch.ops.elsa.elsa_attention_backward(
            torch.zeros(2, 8, 6, 5), v, h, mul, add, *numbers, [True] * 4
        )
