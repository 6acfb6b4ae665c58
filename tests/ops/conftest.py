from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ops


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def compiled_backend(compiled_library: Path):
    with ops.use_backend("compiled"):
        yield
