"""Folders for files that end with a process, also where it is killed: the next one removes them."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX, LOCK = "elsa-", "lock"


@contextmanager
def scratch_folder(parent: str = "") -> Iterator[Path]:
    """A folder of this user and process alone, which is removed in the end.

    Args:
        parent: where to make it; the place for temporary files (`TMPDIR`) if empty.
    """
    parent = parent or tempfile.gettempdir()
    remove_abandoned(parent)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with (folder / "new").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "new").rename(folder / LOCK)  # whoever finds it finds it locked
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(parent: str = "") -> None:
    """Remove the folders of this user whose processes were killed."""
    for folder in Path(parent or tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # it has no lock or a locked one, or is removed meanwhile
            if folder.lstat().st_uid == os.getuid():
                with (folder / LOCK).open() as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
