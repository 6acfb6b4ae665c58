"""One compiled library for the whole session: `build/op` where it is fresh, else a build in tmp."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def compiled_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the compiled operator, loaded into this process."""
    import ops
    from ops import build, library

    directory = library.DEFAULT_DIR
    try:
        library.verify(directory)
    except (FileNotFoundError, ops.StaleLibraryError):
        directory = tmp_path_factory.mktemp("op")
        build.build(directory)
    ops.load_library(directory)
    return directory
