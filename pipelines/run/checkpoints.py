"""The checkpoints of a Ray Train run in its storage: which are whole, and which to resume from.

Ray uploads a checkpoint file by file, and keeps a list of those it knows. A worker that dies
meanwhile leaves a part of one, or a whole one that the list lacks; and what happens to the storage
itself Ray does not look at.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.fs
import ray.train

from pipelines.data.files import sha256_file
from pipelines.run.ray_internals import (
    CHECKPOINT_LIST,
    CHECKPOINT_PREFIX,
    is_whole_list,
    listed_checkpoints,
)

SEAL = "digests.json"


def seal(folder: Path) -> None:
    """Write the SHA-256 of every file of a checkpoint into it, as the last of its files."""
    digests = {
        file.relative_to(folder).as_posix(): sha256_file(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != SEAL
    }
    (folder / SEAL).write_text(json.dumps(digests, indent=1))


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    if not (folder / SEAL).is_file():
        return f"it has no {SEAL}: it was not written to its end"
    try:
        digests = json.loads((folder / SEAL).read_text())
    except ValueError:
        return f"its {SEAL} is cut short"
    for name, digest in digests.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_file(folder / name) != digest:
            return f"{name} is not what was written"
    return None


def delete(run: str) -> None:
    """Delete all of a run, of which nothing more is needed.

    Args:
        run: folder or URL of the run, which need not exist.
    """
    system, root = pyarrow.fs.FileSystem.from_uri(run)
    if system.get_file_info(root).type is pyarrow.fs.FileType.Directory:
        system.delete_dir(root)


def all_of(run: str) -> "list[ray.train.Checkpoint]":
    """The checkpoints of a run, oldest first, whole or not.

    Args:
        run: folder or URL of the run.
    """
    system, root = pyarrow.fs.FileSystem.from_uri(run)
    return [ray.train.Checkpoint(f"{root}/{n}", system) for n in sorted(_names(system, root))]


def newest_complete(
    run: str, tell: Callable[[str], None] = lambda line: None
) -> "ray.train.Checkpoint | None":
    """The newest checkpoint of a run that is whole.

    Args:
        run: folder or URL of the run.
        tell: gets a line about each newer one that is not.
    """
    system, root = pyarrow.fs.FileSystem.from_uri(run)
    for name in sorted(_names(system, root), reverse=True):
        checkpoint = ray.train.Checkpoint(f"{root}/{name}", system)
        with checkpoint.as_directory() as folder:
            wrong = fault(Path(folder))
        if wrong is None:
            return checkpoint
        tell(f"{name} can't be used: {wrong}; the run resumes from the one before")
    return None


def repair(run: str, tell: Callable[[str], None]) -> None:
    """Before a run resumes: delete what it can't resume from, and what would never be deleted.

    Deleted are checkpoints that are not whole and those, but for the newest, that Ray's list lacks.
    Ray does not resume where one of its list is missing: the list is then begun anew.
    """
    system, root = pyarrow.fs.FileSystem.from_uri(run)
    path = f"{root}/{CHECKPOINT_LIST}"
    if system.get_file_info(path).type == pyarrow.fs.FileType.NotFound:
        return
    with system.open_input_stream(path) as file:
        text = file.read().decode()
    known = listed_checkpoints(text)
    newest = newest_complete(run, tell)
    keep = {newest.path.rpartition("/")[2]} if newest else set()
    for name in _names(system, root):
        if name not in keep and (name not in known or _incomplete(system, f"{root}/{name}")):
            system.delete_dir(f"{root}/{name}")
    if missing := known - _names(system, root):
        tell(f"{', '.join(sorted(missing))} is gone from the storage: Ray's list begins anew")
    if missing or not is_whole_list(text):
        system.delete_file(path)


def _names(system: pyarrow.fs.FileSystem, root: str) -> set[str]:
    found = system.get_file_info(pyarrow.fs.FileSelector(root, allow_not_found=True))
    return {
        item.base_name
        for item in found
        if item.type == pyarrow.fs.FileType.Directory
        and item.base_name.startswith(CHECKPOINT_PREFIX)
    }


def _incomplete(system: pyarrow.fs.FileSystem, path: str) -> bool:
    with ray.train.Checkpoint(path, system).as_directory() as folder:
        return fault(Path(folder)) is not None
