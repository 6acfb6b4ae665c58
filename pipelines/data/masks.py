"""Masks in COCO's form."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def run_lengths(mask: NDArray[Any]) -> dict[str, Any]:
    """A mask (H, W) as COCO's run lengths, as JSON can hold them."""
    from pycocotools import mask as masks

    encoded = masks.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(map(int, encoded["size"])), "counts": encoded["counts"].decode()}
