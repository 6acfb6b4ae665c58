"""One compiled library for the whole session: that of ELSA_OPS_LIBRARY, or `build/op` where it is
fresh, else a build in tmp."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# A shell script's background jobs ignore Ctrl-C, and what tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules first: begun last, one would run alone beside an idle process."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def built_once(tmp_path_factory: pytest.TempPathFactory, build: Callable[[Path], object]) -> Path:
    """The folder of one build that all processes of a parallel run share."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    directory = root / "op"
    with (root / "op.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "build.json").is_file():
            build(directory)
    return directory


@pytest.fixture(autouse=True)
def compiles_for_itself() -> Iterator[None]:
    """No test meets what `torch.compile` learned in one before it: after other shapes of the same
    code it compiles for symbolic ones, which takes minutes."""
    yield
    if "torch._dynamo" in sys.modules:
        import torch

        torch.compiler.reset()


@pytest.fixture
def in_all_processes(compiled_library: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The compiled operator, also in processes that a test starts: its bits are its own."""
    monkeypatch.setenv("ELSA_OPS_LIBRARY", str(compiled_library))
    return compiled_library


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
        directory = built_once(tmp_path_factory, build.build)
    ops.load_library(directory)
    return directory
