"""What torch must know of the compiled ops: fake kernels, autograd, vmap rules and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula


def register() -> None:
    """Tell torch of the ops of a freshly loaded library."""
    _register("elsa_attention", _fake_attention, _fake_attention_backward, _keep_inputs, _gradients)
    _register(
        "window_softmax", _fake_softmax, _fake_softmax_backward, _keep_weights, _gradient_of_logits
    )
    _register_flops()


def _register(
    name: str,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """The op of a name, and that of its gradients."""
    forward, gradient = f"elsa::{name}", f"elsa::{name}_backward"

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f"the compiled {name} has no second derivative; run this part under "
            "`ops.use_backend('reference')`"
        )

    torch.library.register_fake(forward)(fake)
    torch.library.register_fake(gradient)(fake_backward)
    torch.library.register_autograd(forward, backward, setup_context=setup_context)
    torch.library.register_autograd(gradient, refuse, setup_context=_keep_nothing)
    for op in (forward, gradient):
        rule = _loop_vmap(getattr(torch.ops.elsa, op.removeprefix("elsa::")))
        torch.library.register_vmap(op, rule)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    return None


def _loop_vmap(op: Any) -> Callable[..., Any]:
    """A vmap rule that runs the op once per slice: ghosts may be batched, so no folding."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        results = []
        for index in range(info.batch_size):
            results.append(
                op(
                    *(
                        arg.select(dim, index) if dim is not None and torch.is_tensor(arg) else arg
                        for arg, dim in zip(args, in_dims, strict=True)
                    )
                )
            )
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(part) for part in zip(*results, strict=True)), (0,) * 4

    return rule


def _fake_attention(
    v, h_attn, ghost_mul, ghost_add, kernel_size, dilation=1, stride=1, border="zeros"
):
    batch, channels, height, width = v.shape
    return _empty_like(v, (batch, channels, height // stride, width // stride))


def _empty_like(v: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """An image in the layout that results have: format_of of csrc/cuda/tensors.h on a GPU."""
    last = v.device.type == "cuda" and v.shape[1] > 1 and v.stride(1) == 1
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=v.dtype, device=v.device, memory_format=layout)


def _fake_attention_backward(
    grad_out, v, h_attn, ghost_mul, ghost_add, kernel_size, dilation, stride, border, output_mask
):
    inputs = (v, h_attn, ghost_mul, ghost_add)
    grads = [
        t.new_empty(t.shape) if wanted and t is not None else v.new_empty((0,))
        for t, wanted in zip(inputs, output_mask, strict=True)
    ]
    if output_mask[0]:
        grads[0] = _empty_like(v, v.shape)
    return tuple(grads)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    v, h_attn, ghost_mul, ghost_add, *ctx.window = inputs
    ctx.save_for_backward(v, h_attn, ghost_mul, ghost_add)


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    v, h_attn, ghost_mul, ghost_add = ctx.saved_tensors
    inputs = (v, h_attn, ghost_mul, ghost_add)
    mask = [
        wanted and t is not None for t, wanted in zip(inputs, ctx.needs_input_grad[:4], strict=True)
    ]
    grads = torch.ops.elsa.elsa_attention_backward(grad_out, *inputs, *ctx.window, mask)
    return (
        *(g if m else None for g, m in zip(grads, mask, strict=True)),
        *(None for _ in ctx.window),
    )


def _fake_softmax(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _fake_softmax_backward(grad: Tensor, weights: Tensor, side_by_side: bool) -> Tensor:
    if not side_by_side:
        return _fake_softmax(weights)
    batch, heads, taps, height, width = weights.shape
    return weights.new_empty((batch, height, width, heads, taps)).permute(0, 3, 4, 1, 2)


def _keep_weights(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    (logits,) = inputs
    ctx.side_by_side = logits.shape[2] > 1 and logits.stride(2) == 1  # a pixel's k*k logits
    ctx.save_for_backward(output)


def _gradient_of_logits(ctx: Any, grad: Tensor) -> Tensor:
    (weights,) = ctx.saved_tensors
    return torch.ops.elsa.window_softmax_backward(grad, weights, ctx.side_by_side)


def _flops(v, h_attn, ghost_mul, ghost_add, kernel_size, *args, out_shape, **kwargs) -> int:
    """2 per multiply-add of the windows with their weights, 1 per ghost to make each weight.

    Windows count in full at the border, as torch counts convolutions. Takes shapes.
    """
    ghosts = (ghost_mul is not None) + (ghost_add is not None)
    return (2 + ghosts) * math.prod(out_shape) * kernel_size**2


def _flops_backward(
    grad_out,
    v,
    h_attn,
    ghost_mul,
    ghost_add,
    kernel_size,
    dilation,
    stride,
    border,
    output_mask,
    **kwargs,
) -> int:
    """The same count for each gradient asked for, alone: nothing they could share is deducted.

    `v` takes the forward's count, `h_attn` a multiply-add (and `ghost_mul` on it), `ghost_mul`
    one more product than `ghost_add`, which takes a multiply-add.
    """
    mul, add = ghost_mul is not None, ghost_add is not None
    costs = (2 + mul + add, 2 + mul, 3 * mul, 2 * add)
    cost = sum(c for c, wanted in zip(costs, output_mask, strict=True) if wanted)
    return cost * math.prod(grad_out) * kernel_size**2


def _register_flops() -> None:
    formulas: dict[Any, Any] = {
        torch.ops.elsa.elsa_attention: _flops,
        torch.ops.elsa.elsa_attention_backward: _flops_backward,
    }
    for op, formula in formulas.items():
        register_flop_formula(op)(formula)
    # A counter copies the registry when it is made: those now counting, whose first call loads
    # the library, would leave the op out without a word.
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, FlopCounterMode):
            counter.flop_registry.update({op: flop_registry[op] for op in formulas})
