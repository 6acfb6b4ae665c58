"""A Ray that can't be had is told in one message."""

from typing import Any

import pytest
import ray

from pipelines.errors import PipelineError
from pipelines.run.session import ray_session


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (None, r"a local Ray can't be started: .*timed out.*other programs"),
        ("10.0.0.1:6379", r"the cluster at RAY_ADDRESS=10.0.0.1:6379 can't be used: .*timed out"),
    ],
)
def test_a_ray_that_does_not_start(monkeypatch: Any, address: str | None, message: str) -> None:
    def too_slow(**options: Any) -> None:
        raise Exception("The current node timed out during startup.")  # as Ray does

    monkeypatch.setattr(ray, "init", too_slow)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(PipelineError, match=message), ray_session():
        pass
