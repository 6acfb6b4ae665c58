"""What the training loops need to stop within an epoch and to resume exactly there."""

import random
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from timm.utils import random_seed

if TYPE_CHECKING:
    from pipelines.train.reporter import Reporter


def rng_state(device: torch.device) -> dict[str, Any]:
    """All random state of this process, as `torch.load(weights_only=True)` reads it."""
    _, keys, *rest = np.random.get_state()
    version, numbers, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": [version, list(numbers), gauss],
    }


def gather(value: Any, world_size: int) -> list[Any]:
    """The value of every rank; all ranks call it."""
    values = [value] * world_size
    if world_size > 1:
        dist.all_gather_object(values, value)
    return values


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Resume from what `rng_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.cpu().numpy().astype(np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


def resume_random(
    begun: Mapping[str, Any], seed: int, epoch: int, reporter: "Reporter", device: torch.device
) -> float:
    """Take over the random state of an epoch that a checkpoint was written in.

    Args:
        begun: of the checkpoint: `step`, and of each rank its losses so far, added up, and its
            `rng_state`.

    Returns:
        the losses so far, added up.
    """
    losses, states = zip(*begun["ranks"], strict=True)
    if len(losses) == reporter.world_size:
        set_rng_state(states[reporter.rank], device)
        return float(losses[reporter.rank])
    # On another number of workers nothing can be repeated; but nothing may be drawn twice.
    entropy = np.random.SeedSequence([seed, epoch, begun["step"]]).generate_state(1)[0]
    random_seed(int(entropy // 2), reporter.rank)
    return float(sum(losses) / len(losses))


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
