"""Shard sets: whether their bytes and their index are those that were packed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from pipelines.data import store
from pipelines.data.manifest import MANIFEST, ChunkEntry


def check_shard(place: str, name: str, size: int, sha256: str) -> str | None:
    """What is wrong with the bytes of a shard; None if they are those that were packed."""
    data = store.Store(place).read(name)
    if len(data) != size:
        return f"shard {name} has {len(data)} bytes, {size} when it was packed"
    if hashlib.sha256(data).hexdigest() != sha256:
        return f"shard {name} has another sha256 than when it was packed"
    return None


def index_difference(shard_set: store.ShardSet, manifest: Mapping[str, Any]) -> str | None:
    """How the index of a shard set differs from a manifest; None if it does not."""
    if shard_set.classes != manifest["classes"]:
        return f"{store.INDEX} has other classes"
    if index_chunks(shard_set) != dict(manifest["chunks"]):
        return f"{store.INDEX} is of other images than {MANIFEST}"
    return None


def index_chunks(shard_set: store.ShardSet) -> dict[str, str]:
    """The chunks of the manifest of a shard set: those of the folder, class by class."""
    chunks: dict[str, dict[str, tuple[int, str]]] = {}
    for split in shard_set.splits:
        columns = shard_set.images(split, "name", "size", "sha256")
        for name, entry in store.entries(*columns.values()).items():
            chunks.setdefault(name.rsplit("/", 1)[0], {})[name] = entry
    return {name: str(ChunkEntry.of(files)) for name, files in chunks.items()}
