"""What a training loop gets from whoever starts it."""

from dataclasses import dataclass
from typing import Any

from pipelines.data.store import Dataset
from pipelines.params import Params


@dataclass(frozen=True)
class Job:
    """One training: sent to the workers, and the same on all of them."""

    stage: str
    """`pretrain`, `detect` or `segment`: whose section of the parameters counts."""
    params: Params
    dataset: Dataset
    weights: str | None = None
    """File with the weights to start from; None starts from random ones."""
    flops: float | None = None
    """Of one image's forward pass, for the MFU of detection and segmentation on GPUs."""
    elastic: bool = True
    """Any number of workers gives the same result. Not with SyncBN."""

    @property
    def section(self) -> Any:
        """The stage's own parameters."""
        return getattr(self.params, self.stage)
