"""`manifest.json` of a data set: its classes, counts, files in chunks, and one digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

MANIFEST = "manifest.json"

FileEntry = tuple[int, str]  # bytes, sha256


def file_entry(path: Path) -> FileEntry:
    """Size and sha256 of a file."""
    data = path.read_bytes()
    return len(data), hashlib.sha256(data).hexdigest()


class _Counts(BaseModel, extra="allow", strict=True):
    train: int
    val: int


class _Manifest(BaseModel, extra="allow", strict=True):
    dataset: str
    classes: list[str]
    counts: _Counts
    digest: str
    chunks: dict[str, str]
    skipped: dict[str, str]


@dataclass(frozen=True)
class ChunkEntry:
    """A part of a data set (an ImageNet class, some thousand images) in its manifest."""

    files: int
    bytes: int
    sizes: str
    """Digest of names and sizes, quick to compare."""
    content: str
    """Digest of names, sizes and contents."""

    @classmethod
    def of(cls, files: Mapping[str, FileEntry]) -> ChunkEntry:
        """Of files by name within the data set."""
        lines = [f"{name}\0{size}" for name, (size, _) in sorted(files.items())]
        digests = [digest for _, (_, digest) in sorted(files.items())]
        content = "\n".join(f"{a}\0{b}" for a, b in zip(lines, digests, strict=True))
        total = sum(size for size, _ in files.values())
        return cls(len(files), total, sizes_digest(lines), _sha256(content))

    @classmethod
    def parse(cls, line: str) -> ChunkEntry:
        files, total, sizes, content = line.split()
        return cls(int(files), int(total), sizes, content)

    def __str__(self) -> str:
        return f"{self.files} {self.bytes} {self.sizes} {self.content}"


def sizes_digest(lines: Sequence[str]) -> str:
    """Of `<name>\\0<size>` lines, sorted."""
    return _sha256("\n".join(lines))[:32]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def make_manifest(
    dataset: str,
    classes: Sequence[str],
    counts: Mapping[str, int],
    chunks: Mapping[str, str],
    skipped: Mapping[str, str],
) -> dict[str, Any]:
    """The manifest of a data set.

    Args:
        chunks: a `ChunkEntry` as a line, by name.
        skipped: images that are left out by path, with the reason; they are in no chunk.
    """
    lines = dict(sorted(chunks.items()))
    text = json.dumps([list(classes), lines, sorted(skipped)], separators=(",", ":"))
    return {
        "dataset": dataset,
        "classes": list(classes),
        "counts": dict(counts),
        "chunks": lines,
        "skipped": dict(sorted(skipped.items())),
        "digest": _sha256(text),
    }


def read_manifest(path: Path) -> dict[str, Any] | None:
    """A manifest of this pipeline; None if there is none, or it is another's file."""
    try:
        return parse_manifest(path.read_bytes())
    except OSError:
        return None


def parse_manifest(data: bytes) -> dict[str, Any] | None:
    """Like `read_manifest`, of the file's content."""
    try:
        manifest = json.loads(data)
        for line in _Manifest.model_validate(manifest).chunks.values():
            ChunkEntry.parse(line)
    except (ValueError, TypeError, RecursionError):
        return None
    return dict(manifest)
