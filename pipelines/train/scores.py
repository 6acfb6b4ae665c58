"""A classifier's scores from its predictions; without torch, which the driver has no need of."""

from collections.abc import Mapping

import numpy as np


def scores_of(predictions: Mapping[str, np.ndarray]) -> dict[str, float]:
    """`top1` and `top5` in percent and `loss` in nats of what `evaluation.predict` returns."""
    right = predictions["classes"] == predictions["target"][:, None]
    return {
        "top1": 100 * float(right[:, 0].mean()),
        "top5": 100 * float(right.any(1).mean()),
        "loss": float(predictions["loss"].astype(np.float64).mean()),
    }
