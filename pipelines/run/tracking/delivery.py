"""Metrics on their way to a run, which nobody waits for."""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.run.tracking.runs import Tracker
from pipelines.run.tracking.store import TrackingError
from pipelines.run.tracking_uri import without_password


class Delivery:
    """Metrics on their way to a run, by a thread of their own: nobody waits for the server.

    While it does not answer they are kept and tried again, at longer and longer intervals.

    Args:
        tell: gets a line when the server stops and when it begins to answer.
    """

    LONGEST_WAIT = 30.0
    """Seconds between two tries."""

    def __init__(self, tracker: Tracker, tell: Callable[[str], None]) -> None:
        # Minutes of the client's own retries would hide how things are.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        self._tracker, self._tell = tracker, tell
        self._waiting: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._deliver, daemon=True)
        self._thread.start()

    def put(self, metrics: Mapping[str, float], step: int) -> None:
        self.put_all([{"metrics": dict(metrics), "step": step, "time_ms": time.time_ns() // 10**6}])

    def put_all(self, items: Sequence[Mapping[str, Any]]) -> None:
        """What `undelivered` gave, of this process or an earlier one."""
        with self._changed:
            self._waiting += [dict(item) for item in items]
            self._changed.notify()

    def undelivered(self) -> list[dict[str, Any]]:
        """What has not arrived yet, as JSON can hold it."""
        with self._changed:
            return list(self._waiting)

    def close(self, seconds: float) -> None:
        """Deliver the rest, if that takes no more than `seconds`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)

    def _deliver(self) -> None:
        wait = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                item = self._waiting[0]
            try:
                self._tracker.log_metrics(**item)
            except TrackingError as error:
                if not wait:
                    reason = without_password(error.message).splitlines()[0][:200]
                    self._tell(f"MLflow does not answer, its metrics are kept: {reason}")
                wait = min(2 * wait or 1.0, self.LONGEST_WAIT)
                with self._changed:
                    if self._closing:
                        return
                    self._changed.wait_for(lambda: self._closing, wait)
                continue
            if wait:
                self._tell("MLflow answers again")
                wait = 0.0
            with self._changed:
                self._waiting.pop(0)
