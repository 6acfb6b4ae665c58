"""One compiled library for all of tests/ops: `build/op` where it is fresh, else a build in tmp."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ops
from ops import build, library


@pytest.fixture(scope="session", autouse=True)
def compiled_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(2)
    directory = library.DEFAULT_DIR
    try:
        library.verify(directory)
    except (FileNotFoundError, ops.StaleLibraryError):
        directory = tmp_path_factory.mktemp("op")
        build.build(directory)
    ops.load_library(directory)
    return directory


@pytest.fixture(autouse=True)
def compiled_backend(compiled_library: Path):
    with ops.use_backend("compiled"):
        yield
