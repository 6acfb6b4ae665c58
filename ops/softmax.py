"""`window_softmax`: the weights of a window from its logits, as `elsa_attention` reads them.

The convolution that makes the logits leaves a pixel's k*k values side by side (channels_last),
while the attention reads a plane of pixels for each. torch's softmax copies the map for that, and
then reads it three times. The CUDA kernel changes the layout on the way: one read, one write. A CPU
does not need it: there softmax takes 1% of a training step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ops import library
from ops.functional import loop_vmap

FORWARD = "elsa::window_softmax"
BACKWARD = "elsa::window_softmax_backward"


def window_softmax(logits: Tensor) -> Tensor:
    """Softmax over the k*k pixels of each window.

    Args:
        logits: (B, G, k*k, H, W), float32, bfloat16, float16 or float64, in any layout.

    Returns:
        (B, G, k*k, H, W), dtype of `logits`, also under autocast; sums are in float32 (float64 of
        float64). Contiguous on a GPU. Differentiable once (the reference backend: any number of
        times); on a GPU the gradient has the layout of `logits`.

    Raises:
        ValueError: not five dimensions.
    """
    if logits.dim() != 5:
        raise ValueError(f"logits must be (B, G, k*k, H, W), got shape {tuple(logits.shape)}")
    if logits.device.type == "cuda" and library.use_compiled("cuda", library.state.backend):
        return torch.ops.elsa.window_softmax(logits)
    # The dtype is named, as autocast on a GPU would else make a float32 map of k*k planes.
    return logits.softmax(dim=2, dtype=logits.dtype)


def _taps_side_by_side(logits: Tensor) -> bool:
    return logits.shape[2] > 1 and logits.stride(2) == 1


def _fake(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _fake_backward(grad: Tensor, weights: Tensor, side_by_side: bool) -> Tensor:
    if not side_by_side:
        return _fake(weights)
    batch, heads, taps, height, width = weights.shape
    return weights.new_empty((batch, height, width, heads, taps)).permute(0, 3, 4, 1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.side_by_side = _taps_side_by_side(inputs[0])
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    (weights,) = ctx.saved_tensors
    return torch.ops.elsa.window_softmax_backward(grad, weights, ctx.side_by_side)


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "the compiled window_softmax has no second derivative; run this part under "
        "`ops.use_backend('reference')`"
    )


def register() -> None:
    """Give the ops of a freshly loaded library their fakes, autograd and vmap rules."""
    torch.library.register_fake(FORWARD)(_fake)
    torch.library.register_fake(BACKWARD)(_fake_backward)
    torch.library.register_autograd(FORWARD, _backward, setup_context=_setup_context)
    torch.library.register_autograd(
        BACKWARD, _refuse_second_derivative, setup_context=lambda ctx, inputs, output: None
    )
    torch.library.register_vmap(FORWARD, loop_vmap(torch.ops.elsa.window_softmax))
    torch.library.register_vmap(BACKWARD, loop_vmap(torch.ops.elsa.window_softmax_backward))
