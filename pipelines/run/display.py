"""What a user sees while the cluster works: progress, lines, and the wish to stop.

Imports stay light: the actor's process is started anew for each run, and loads this module.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.errors import PipelineError


@ray.remote(num_cpus=0)
class Display:
    """Holds what the workers last reported, until the driver fetches it."""

    def __init__(self) -> None:
        self._failure: str | None = None
        self._stop = self._moving = False
        self._state: tuple[int, int, str, str] | None = None
        self._lines: list[str] = []

    def update(self, done: int, total: int, unit: str, note: str) -> None:
        self._state = (done, total, unit, note)

    def line(self, text: str) -> None:
        self._lines.append(text)

    def stop(self) -> None:
        self._stop = True

    def stopping(self) -> bool:
        """Whether the user, or the machine, wants the run to end after its next checkpoint."""
        return self._stop

    def move(self, nodes: list[str]) -> None:
        """The workers leave nodes that are being taken away, after a checkpoint."""
        if not self._moving:
            self._moving = True
            self.line(
                f"node {', '.join(nodes)} is about to be taken away: after a checkpoint training"
                " continues on the others as soon as there is room for the workers"
            )

    def moved(self) -> bool:
        """Whether the workers have left for that since the last question."""
        moving, self._moving = self._moving, False
        return moving

    def fail(self, message: str) -> None:
        self._failure = self._failure or message

    def failure(self) -> str | None:
        """The first error that a user can fix; trying again would only repeat it."""
        return self._failure

    def fetch(self) -> tuple[tuple[int, int, str, str] | None, list[str]]:
        lines, self._lines = self._lines, []
        return self._state, lines


class Progress:
    """Shows progress with rate and ETA: a bar on a terminal, plain lines elsewhere."""

    INTERVAL = 15.0
    """Seconds between plain lines."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._bar: Any = None
        self._task: Any = None
        self._first: tuple[float, int] | None = None
        self._printed = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn(f"[bold]{name}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(name, total=None, rate="", note="starting")

    def update(self, done: int, total: int, unit: str, note: str = "") -> None:
        now = time.monotonic()
        if self._first is None or done < self._first[1]:
            self._first = (now, done)
        elapsed, advanced = now - self._first[0], done - self._first[1]
        rate = advanced / elapsed if elapsed > 0 and advanced else 0.0
        shown = f"{rate:.1f} {unit}/s" if rate else ""
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, rate=shown, note=note)
        elif now - self._printed > self.INTERVAL and done < total:
            self._printed = now
            eta = f", ETA {_duration((total - done) / rate)}" if rate else ""
            self.line(f"{100 * done / total:.0f}% {shown}{eta} {note}".rstrip())

    def line(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(f"{self.name}: {text}", highlight=False, markup=False)
        else:
            print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


@contextmanager
def showing(name: str, quiet: bool = False) -> Iterator[Any]:
    """A `Display` actor whose content is shown in this process while the block runs, unless
    `quiet`."""
    # Here: with the driver's node all is lost anyway, with another it would not be.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Ray ends it with the workers where memory runs low; a new one knows of no failure before.
    restarts = {"max_restarts": -1, "max_task_retries": -1}
    actor = Display.options(scheduling_strategy=here, **restarts).remote()  # type: ignore[attr-defined]
    if quiet:
        yield actor
        return
    progress, stop = Progress(name), threading.Event()

    def show() -> None:
        state, lines = ray.get(actor.fetch.remote())
        for line in lines:
            progress.line(line)
        if state:
            progress.update(*state)

    def poll() -> None:
        while not stop.wait(0.5):
            try:
                show()
            except ray.exceptions.RayError:
                return  # the actor or the cluster is gone; the stage itself reports why

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield actor
        stop.set()
        thread.join()
        show()
    finally:
        stop.set()
        progress.close()


def track(
    tasks: list[Any], name: str, unit: str, done: Callable[[Any], None] = lambda result: None
) -> list[Any]:
    """Results of Ray tasks in their order, with progress while they run.

    `done` gets each result as it comes.
    """
    progress, waiting = Progress(name), list(tasks)
    try:
        while waiting:
            ended, waiting = ray.wait(waiting, num_returns=1)
            try:
                done(ray.get(ended[0]))  # a failed task ends the stage at once
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, PipelineError):
                    raise error.cause from None
                raise
            progress.update(len(tasks) - len(waiting), len(tasks), unit)
        return ray.get(tasks)
    finally:
        progress.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
        if minutes >= 60
        else f"{minutes}:{seconds:02d}"
    )
