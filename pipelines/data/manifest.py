"""`manifest.json` of a data set folder: its classes, counts, files and one digest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"

FileEntry = tuple[int, str]  # bytes, sha256


def file_entry(path: Path) -> FileEntry:
    """Size and sha256 of a file."""
    data = path.read_bytes()
    return len(data), hashlib.sha256(data).hexdigest()


def data_digest(files: Mapping[str, Sequence[Any]], classes: Sequence[str]) -> str:
    """The digest of a data set: of its sorted file entries and its classes."""
    entries = [[name, *files[name]] for name in sorted(files)]
    text = json.dumps({"classes": list(classes), "files": entries}, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write JSON with sorted keys, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    separators = (",", ":") if indent is None else None
    text = json.dumps(value, sort_keys=True, indent=indent, separators=separators)
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_manifest(
    root: Path,
    dataset: str,
    classes: Sequence[str],
    counts: Mapping[str, int],
    files: Mapping[str, FileEntry],
) -> dict[str, Any]:
    """Write the manifest of the data set in `root`, last of all its files; returns it."""
    manifest = {
        "dataset": dataset,
        "classes": list(classes),
        "counts": dict(counts),
        "files": {name: list(entry) for name, entry in sorted(files.items())},
        "digest": data_digest(files, classes),
    }
    write_json(root / MANIFEST, manifest, indent=1)
    return manifest
