"""One compiled library for all of tests/ops: that of ELSA_OPS_LIBRARY, or `build/op` where it is
fresh, else a build in tmp."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import ops
from ops import build, library


@pytest.fixture(scope="session", autouse=True)
def compiled_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(2)
    named = os.environ.get("ELSA_OPS_LIBRARY")
    directory = Path(named or library.DEFAULT_DIR)
    try:
        library.verify(directory)
    except (FileNotFoundError, ops.StaleLibraryError):
        if named:
            raise
        directory = tmp_path_factory.mktemp("op")
        build.build(directory)
    ops.load_library(directory)
    return directory


@pytest.fixture(autouse=True)
def compiled_backend(compiled_library: Path):
    with ops.use_backend("compiled"):
        yield
