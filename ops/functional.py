"""`elsa_attention`: input checks, dispatch, and what torch must know about the compiled op.

Shape legend: B batch, C channels, G heads, k kernel size, (H, W) size of `v`, (Ho, Wo) size of
the output, `Ho = H // stride`, `Wo = W // stride`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from ops import library
from ops.reference import elsa_attention_reference

FORWARD = "elsa::elsa_attention"
BACKWARD = "elsa::elsa_attention_backward"
BORDERS = ("zeros", "shift")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def elsa_attention(
    v: Tensor,
    h_attn: Tensor,
    ghost_mul: Tensor | None = None,
    ghost_add: Tensor | None = None,
    *,
    kernel_size: int,
    dilation: int = 1,
    stride: int = 1,
    border: str = "zeros",
) -> Tensor:
    """Aggregate `v` over a k x k window with dynamic weights and a static ghost head.

        out[b, c, y, x] = sum_i (h_attn[b, head(c), i, y, x] * ghost_mul[c, i] + ghost_add[c, i])
                          * v[b, c, y * stride + dy(i), x * stride + dx(i)]

    `dy, dx` run row-major over the centred k x k window times `dilation`; `v` is zero outside
    the image. With the border "shift" the window of a pixel at the border is moved inside the image
    by steps of `dilation`, as in neighbourhood attention (arXiv 2204.07143, 2209.15001): every
    window then has k*k pixels, and `i` counts them from its own corner.

    Args:
        v: (B, C, H, W), float32, bfloat16, float16 or float64.
        h_attn: (B, G, k*k, H // stride, W // stride), dtype and device of `v`; G divides C. The
            size is that of an average pooling by `stride`, which drops the rest.
        ghost_mul: (C, k, k) or None (ones); dtype of `v`, or float32 beside halves.
        ghost_add: (C, k, k) or None (zeros); likewise.
        kernel_size: odd k.
        dilation, stride: at least 1.
        border: "zeros" or "shift"; the latter needs H and W of at least k * dilation.

    Returns:
        (B, C, H // stride, W // stride), dtype of `v`. Halves accumulate in float32. Contiguous; on
        a GPU channels_last where the channels of `v` lie side by side.

    Under autocast `v` and `h_attn` are cast to its dtype together, the ghosts stay as they are.
    Differentiable once in all four tensors (the reference backend: any number of times).

    Raises:
        ValueError: shapes, devices or integers that do not fit, with the shapes in the message.
        TypeError: dtypes that do not fit.
        StaleLibraryError: the library found was built for something else.
    """
    v, h_attn = autocast_together(v, h_attn)
    _check(v, h_attn, ghost_mul, ghost_add, kernel_size, dilation, stride, border)
    if library.use_compiled(v.device.type, library.state.backend):
        return torch.ops.elsa.elsa_attention(
            v, h_attn, ghost_mul, ghost_add, kernel_size, dilation, stride, border
        )
    return elsa_attention_reference(
        v,
        h_attn,
        ghost_mul,
        ghost_add,
        kernel_size=kernel_size,
        dilation=dilation,
        stride=stride,
        border=border,
    )


def autocast_together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast the tensors in its dtype, as those of one product; float64 stays as it is."""
    device_type = tensors[0].device.type
    # Meta tensors have no autocast, and asking for it raises.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    if tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) for t in tensors)


def check_window(
    kernel_size: int, dilation: int, stride: int, border: str, height: int, width: int
) -> None:
    """Raise ValueError unless the window is one that an image of this size can have."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    if dilation < 1 or stride < 1:
        raise ValueError(
            f"dilation and stride must be at least 1, got dilation={dilation}, stride={stride}"
        )
    if border not in BORDERS:
        raise ValueError(f"border must be one of {BORDERS}, got {border!r}")
    if border == "shift" and min(height, width) < kernel_size * dilation:
        raise ValueError(
            f"a shifted window of kernel_size {kernel_size} and dilation {dilation} needs an image "
            f"of at least {kernel_size * dilation} pixels a side, got {height} x {width}"
        )


def _check(
    v: Tensor,
    h_attn: Tensor,
    ghost_mul: Tensor | None,
    ghost_add: Tensor | None,
    kernel_size: int,
    dilation: int,
    stride: int,
    border: str,
) -> None:
    if v.dim() != 4:
        raise ValueError(f"v must be (B, C, H, W), got shape {tuple(v.shape)}")
    if h_attn.dim() != 5:
        raise ValueError(
            f"h_attn must be (B, G, k*k, H // stride, W // stride), got shape {tuple(h_attn.shape)}"
        )
    batch, channels, height, width = v.shape
    check_window(kernel_size, dilation, stride, border, height, width)
    heads = h_attn.shape[1]
    if heads < 1 or channels % heads != 0:
        raise ValueError(
            f"the heads of h_attn must divide the channels of v, got v {tuple(v.shape)} and "
            f"h_attn {tuple(h_attn.shape)}"
        )
    expected = (batch, heads, kernel_size * kernel_size, height // stride, width // stride)
    if h_attn.shape != expected:
        raise ValueError(
            f"h_attn must be (B, G, k*k, H // stride, W // stride) = {tuple(expected)} for "
            f"v {tuple(v.shape)}, kernel_size {kernel_size}, stride {stride}; "
            f"got {tuple(h_attn.shape)}"
        )
    if v.dtype not in DTYPES:
        raise TypeError(f"v must be float32, bfloat16, float16 or float64, got {v.dtype}")
    if h_attn.dtype != v.dtype:
        raise TypeError(
            f"v and h_attn must share a dtype, got v {v.dtype} and h_attn {h_attn.dtype}"
        )
    if h_attn.device != v.device:
        raise ValueError(
            f"v and h_attn must be on one device, got v {v.device} and h_attn {h_attn.device}"
        )
    for name, ghost in (("ghost_mul", ghost_mul), ("ghost_add", ghost_add)):
        if ghost is None:
            continue
        if ghost.shape != (channels, kernel_size, kernel_size):
            raise ValueError(
                f"{name} must be (C, k, k) = {(channels, kernel_size, kernel_size)} for "
                f"v {tuple(v.shape)}, got {tuple(ghost.shape)}"
            )
        if ghost.dtype != v.dtype and not (
            ghost.dtype == torch.float32 and v.dtype in (torch.bfloat16, torch.float16)
        ):
            raise TypeError(
                f"{name} must have v's dtype (or float32 beside halves), "
                f"got v {v.dtype} and {name} {ghost.dtype}"
            )
        if ghost.device != v.device:
            raise ValueError(
                f"v and {name} must be on one device, got v {v.device} and {name} {ghost.device}"
            )


def _fake(v, h_attn, ghost_mul, ghost_add, kernel_size, dilation=1, stride=1, border="zeros"):
    batch, channels, height, width = v.shape
    return _empty_like(v, (batch, channels, height // stride, width // stride))


def _empty_like(v: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """An image in the layout that results have: format_of of csrc/cuda/tensors.h on a GPU."""
    last = v.device.type == "cuda" and v.shape[1] > 1 and v.stride(1) == 1
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=v.dtype, device=v.device, memory_format=layout)


def _fake_backward(
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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    v, h_attn, ghost_mul, ghost_add, *ctx.window = inputs
    ctx.save_for_backward(v, h_attn, ghost_mul, ghost_add)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
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


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "the compiled elsa_attention has no second derivative; run this part under "
        "`ops.use_backend('reference')`"
    )


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    return None


def loop_vmap(op: Any):
    """A vmap rule that runs the op once per slice: ghosts may be batched, so no folding."""

    def rule(info, in_dims, *args):
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


def register() -> None:
    """Give the ops of a freshly loaded library their fakes, autograd, vmap rules and FLOPs."""
    _register_flops()
    torch.library.register_fake(FORWARD)(_fake)
    torch.library.register_fake(BACKWARD)(_fake_backward)
    torch.library.register_autograd(FORWARD, _backward, setup_context=_setup_context)
    torch.library.register_autograd(
        BACKWARD, _refuse_second_derivative, setup_context=_keep_nothing
    )
    torch.library.register_vmap(FORWARD, loop_vmap(torch.ops.elsa.elsa_attention))
    torch.library.register_vmap(BACKWARD, loop_vmap(torch.ops.elsa.elsa_attention_backward))
