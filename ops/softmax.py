"""`window_softmax`: the weights of a window from its logits, as `elsa_attention` reads them.

The convolution that makes the logits leaves a pixel's k*k values side by side (channels_last),
while the attention reads a plane of pixels for each. torch's softmax copies the map for that, and
then reads it three times. The CUDA kernel changes the layout on the way: one read, one write. A CPU
does not need it: there softmax takes 1% of a training step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops import library


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
