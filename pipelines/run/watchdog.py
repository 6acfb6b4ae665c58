"""Ends a worker that makes no progress, so that the run resumes, and tells where it stands."""

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

FRAMES = 6
"""Of the stack, the innermost."""
GRACE_S = 5.0
"""In which all workers of a run that hangs can tell: the one at fault, and those waiting for it."""


class Watchdog:
    """Watches the thread that makes it.

    Args:
        rank: of the worker.
        seconds: without a sign of life; 0 watches nothing.
        tell: gets a line for the user before the process ends with code 1.
    """

    def __init__(self, rank: int, seconds: float, tell: Callable[[str], None]) -> None:
        self.rank, self.seconds, self.tell = rank, seconds, tell
        self._thread, self._what = threading.get_ident(), "its start"
        self._last = time.monotonic()
        self._closed = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def alive(self, what: str = "") -> None:
        """A sign of life, and what was done, if that is new."""
        self._what, self._last = what or self._what, time.monotonic()

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(self.seconds / 4, 5.0)):
            silent = time.monotonic() - self._last
            if silent > self.seconds:
                self.tell(
                    f"worker {self.rank} on {socket.gethostname()} (process {os.getpid()}) hangs:"
                    f" nothing for {silent:.0f} s (scaling.hang_s) since {self._what}. It is in"
                    f" {self._stack()}"
                )
                if not self._closed.wait(GRACE_S):
                    os._exit(1)

    def _stack(self) -> str:
        """Functions of the watched thread, the innermost first."""
        frame = sys._current_frames().get(self._thread)
        found = traceback.extract_stack(frame)[-FRAMES:] if frame else []
        return ", called by ".join(
            f"{one.name} ({Path(one.filename).name}:{one.lineno})" for one in reversed(found)
        )
