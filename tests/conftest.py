"""One compiled library for the whole session: that of ELSA_OPS_LIBRARY, or `build/op` where it is
fresh, else a build in tmp."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# A shell script's background jobs ignore Ctrl-C, and what tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def compiled_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the compiled operator, loaded into this process."""
    import ops
    from ops import build, library

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
