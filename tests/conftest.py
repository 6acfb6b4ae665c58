"""One compiled library for all processes of a session: that of ELSA_OPS_LIBRARY, or `build/op`
where it is fresh, else one that pytest's cache keeps for the next session."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

INTEGRATION = "tests/integration/test_"
SHARING = ("pipeline.py", "processes.py", "your_data.py")
"""Those of `INTEGRATION` that share a workspace."""

# A shell script's background jobs ignore Ctrl-C, and what tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules first: begun last, one would run alone beside an idle process."""

    def short(item: pytest.Item) -> tuple[bool, bool]:
        return INTEGRATION not in item.nodeid, item.get_closest_marker("slow") is None

    items.sort(key=short)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests run in one process, and so do those of the files that share a workspace."""
    from xdist.scheduler import LoadFileScheduling

    class ByWorkspace(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "workspace" if file.removeprefix(INTEGRATION) in SHARING else file

    return ByWorkspace(config, log)


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
def compiled_library(pytestconfig: pytest.Config) -> Path:
    """The folder of the compiled operator, loaded into this process."""
    import ops
    from ops import build, library

    def fits(directory: Path) -> bool:
        try:
            library.verify(directory)
        except (FileNotFoundError, ops.StaleLibraryError):
            return False
        return True

    directory = Path(os.environ.get("ELSA_OPS_LIBRARY", library.DEFAULT_DIR))
    if "ELSA_OPS_LIBRARY" not in os.environ and not fits(directory):
        assert pytestconfig.cache
        directory = pytestconfig.cache.mkdir("op")
        with directory.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not fits(directory):
                build.build(directory)
    ops.load_library(directory)
    return directory
