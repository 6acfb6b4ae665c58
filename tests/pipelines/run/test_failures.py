"""What is told of a training that failed for good."""

from typing import Any

import pytest

from pipelines.run.fit import _failed

SHORT = (
    "5 worker(s) were killed due to the node running low on memory. Memory on the node (IP:"
    " 10.0.0.1, ID: 0cbd9b1f) was 23.1GB used / 23.5GB limit (0.98)\nOOM kill reason: long\nlines"
)
TOLD = (
    "training failed: 5 worker(s) were killed due to the node running low on memory. Memory on the"
    " node 10.0.0.1 was 23.1GB used / 23.5GB limit (0.98). If memory was short, end other programs,"
    " or lower loader.data_workers"
)


class RunError(RuntimeError):
    """Ray's error of a run, as far as it is read."""

    def __init__(self, message: str, **failures: str) -> None:
        super().__init__(message)
        self.worker_failures = {int(k[1:]): RuntimeError(v) for k, v in failures.items()}


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RunError("workers failed", _0="exploded", _1=SHORT), TOLD),
        (RunError(f"controller error:\n{SHORT}"), TOLD),
        (
            RunError("workers failed", _1="DataLoader worker (pid 7) is killed by signal: Killed."),
            "training failed: DataLoader worker (pid 7) is killed by signal: Killed. If memory",
        ),
        (  # a defect, of which all is told
            RunError("workers failed", _0="Caught KeyError in DataLoader worker process 0.\n'a'"),
            "training failed: worker 0: Caught KeyError in DataLoader worker process 0.\n'a'",
        ),
    ],
)
def test_lack_of_memory_is_told_in_a_line_and_all_else_in_full(error: Any, told: str) -> None:
    assert str(_failed(error)).startswith(told)
