"""A budget of a training: its hours over all starts, and money and energy as hours of workers."""

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import PipelineError
from pipelines.params import Budget, Params
from pipelines.run.identity import RunState

TICK_S = 5.0
"""Between two notes of the time, so that a killed run loses no more of it."""
MARGIN_S = 30.0
"""What it takes to stop, at most: some steps and a checkpoint."""


def hours(budget: Budget, workers: int) -> dict[str, float]:
    """The hours that each limit which is set allows, by its key.

    Args:
        workers: that cost money and energy at a time; where fewer run, it lasts longer.
    """
    found = {
        "hours": budget.hours,
        "money": budget.money / (workers * budget.price) if budget.money else 0.0,
        "kwh": 1000 * budget.kwh / (workers * budget.watts) if budget.kwh else 0.0,
    }
    return {key: value for key, value in found.items() if value}


@contextmanager
def within_budget(params: Params, state: RunState, folder: Path) -> Iterator[None]:
    """Count the time of a training; it stops after a checkpoint before its budget is spent.

    Args:
        state: has the seconds of earlier starts, and is saved to `folder` with those of this one.

    Raises:
        PipelineError: the budget is spent, or too small for a checkpoint.
    """
    limits = hours(params.budget, params.scaling.num_workers)
    key = min(limits, key=limits.__getitem__, default="hours")
    limit = 3600 * limits.get(key, math.inf)
    if limit < MARGIN_S * 2:
        raise PipelineError(
            f"budget.{key}={getattr(params.budget, key)} is {limit:.0f} s of"
            f" {params.scaling.num_workers} workers: less than a start and a checkpoint take",
            "Raise it",
        )
    spent = PipelineError(
        f"budget.{key}={getattr(params.budget, key)} is spent ({limit / 3600:.3g} h of"
        f" {params.scaling.num_workers} workers); the last checkpoint is kept",
        "Raise it and start the stage again: it resumes",
    )
    if state.seconds + MARGIN_S >= limit:
        raise spent
    done, stopped = threading.Event(), threading.Event()
    main = threading.main_thread().ident
    assert main

    def count() -> None:
        while not done.wait(TICK_S):
            state.seconds += TICK_S
            state.save(folder)
            if state.seconds + MARGIN_S >= limit and not stopped.is_set():
                stopped.set()
                signal.pthread_kill(main, signal.SIGINT)  # as a Ctrl-C: after a checkpoint

    counting = threading.Thread(target=count, daemon=True)
    counting.start()
    try:
        yield
    except KeyboardInterrupt:
        if stopped.is_set():
            raise spent from None
        raise
    finally:
        done.set()
        counting.join()
