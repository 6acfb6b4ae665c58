"""A budget of a training: its hours over all starts, and money and energy as hours of workers."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import PipelineError
from pipelines.params import Budget, Params
from pipelines.run.identity import RunState

TICK_S = 5.0
"""Between two notes of the time, so that a killed run loses no more of it."""
MARGIN_S = 30.0
"""What it takes to stop, at most: some steps and a checkpoint."""


@dataclass(frozen=True)
class Limit:
    """The tightest limit of a budget, as time."""

    about: str
    """The parameter and its value."""
    seconds: float
    """Infinite where the budget sets no limit."""

    def left_s(self, spent_s: float) -> float:
        """Seconds until a training must stop, so that its last checkpoint is within the limit."""
        return self.seconds - spent_s - MARGIN_S


def limit_of(budget: Budget, workers: int) -> Limit:
    """The tightest limit of `budget`.

    Args:
        workers: that cost money and energy at a time; where fewer run, it lasts longer.

    Raises:
        PipelineError: it is too small for a checkpoint.
    """
    hours = {
        "hours": budget.hours,
        "money": budget.money / (workers * budget.price) if budget.money else 0.0,
        "kwh": 1000 * budget.kwh / (workers * budget.watts) if budget.kwh else 0.0,
    }
    limits = {key: 3600 * value for key, value in hours.items() if value}
    key = min(limits, key=limits.__getitem__, default="hours")
    found = Limit(f"budget.{key}={getattr(budget, key)}", limits.get(key, math.inf))
    if found.left_s(0) < MARGIN_S:
        raise PipelineError(
            f"{found.about} is {found.seconds:.0f} s of {workers} workers: less than a start and a"
            " checkpoint take",
            "Raise it",
        )
    return found


@contextmanager
def counted(state: RunState, folder: Path) -> Iterator[None]:
    """Add the time that the block takes to `state.seconds`, and save that to `folder` meanwhile."""
    began, before = time.monotonic(), state.seconds
    done = threading.Event()

    def note() -> None:
        state.seconds = before + time.monotonic() - began
        state.save(folder)

    def count() -> None:
        while not done.wait(TICK_S):
            note()

    counting = threading.Thread(target=count, daemon=True)
    counting.start()
    try:
        yield
    finally:
        done.set()
        counting.join()
        note()


@contextmanager
def within_budget(params: Params, state: RunState, folder: Path) -> Iterator[float]:
    """Count the time of a training, which stops after a checkpoint before its budget is spent.

    Args:
        state: has the seconds of earlier starts, and is saved to `folder` with those of this one.

    Yields:
        Seconds after which the training must stop, as by a Ctrl-C; infinite without a limit.

    Raises:
        PipelineError: the budget is spent, or too small for a checkpoint.
    """
    workers = params.scaling.num_workers
    limit = limit_of(params.budget, workers)
    spent = PipelineError(
        f"{limit.about} is spent ({limit.seconds / 3600:.3g} h of {workers} workers); the last"
        " checkpoint is kept",
        "Raise it and start the stage again: it resumes",
    )
    if limit.left_s(state.seconds) <= 0:
        raise spent
    try:
        with counted(state, folder):
            yield limit.left_s(state.seconds)
    except KeyboardInterrupt:
        if limit.left_s(state.seconds) <= 0:
            raise spent from None
        raise
