"""What the ranks of a training loop agree on: values, and when to stop or to keep a checkpoint."""

import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from pipelines.train.reporter import Reporter


def gather(value: Any, world_size: int) -> list[Any]:
    """The value of every rank; all ranks call it."""
    values = [value] * world_size
    if world_size > 1:
        dist.all_gather_object(values, value)
    return values


class Requests:
    """Whether to stop, or to write a checkpoint within an epoch: the same answer on all ranks.

    Args:
        minutes: between checkpoints within an epoch; 0 for none.
        device: where the ranks agree.
    """

    def __init__(self, reporter: "Reporter", minutes: float, device: torch.device) -> None:
        self.reporter, self.interval, self.device = reporter, 60 * minutes, device
        self._kept = time.monotonic()

    def kept(self) -> None:
        """A checkpoint was written, or an epoch begins: the interval starts anew."""
        self._kept = time.monotonic()

    def read(self) -> tuple[bool, bool]:
        """(stopping, due); all ranks call it."""
        passed = time.monotonic() - self._kept
        due = self.reporter.rank == 0 and 0 < self.interval <= passed
        asked = torch.tensor([self.reporter.stopping(), due], dtype=torch.uint8)
        if self.reporter.world_size > 1:
            asked = asked.to(self.device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        stopping, due = asked.bool().tolist()
        return stopping, due
