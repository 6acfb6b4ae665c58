"""A data set, and where its files lie: a folder or an fsspec URL, as images or as tar shards.

A shard set (`pipelines.data.pack` writes it) is read at random through its index, so it has the
order, the epoch length and the splits of the folder it was made of, under any number of workers:

    <place>/index.json          classes, and for each split its shards with bytes and sha256
    <place>/train.npz val.npz   for each image shard, offset, size, label, name, sha256
    <place>/train-00000.tar     WebDataset format: 000000017.jpg 000000017.cls 000000017.json
    <place>/manifest.json       as of the folder
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from pipelines.data.errors import DataError, brief

INDEX = "index.json"
TRIES = 4
BACKOFF = 1.0
"""Seconds before the second try of a read from a URL; doubled before each further one."""


def is_url(place: str) -> bool:
    return "://" in place


def public_url(place: str) -> str:
    """A place without credentials, for messages."""
    return re.sub(r"(?<=://)[^/@]*@", "", place)


def is_shards(place: str) -> bool:
    """Whether a place holds shards, not a folder of images."""
    return is_url(place) or (Path(place) / INDEX).is_file()


class Store:
    """Files below a folder or an fsspec URL, read whole or in part.

    Reads from a URL are tried `TRIES` times. The connection belongs to the process, so a store
    may be handed to loader workers.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self._remote: tuple[int, Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "_remote": None}

    def read(self, name: str) -> bytes:
        """A whole file."""
        if is_url(self.place):
            return self._retry(name, lambda fs, root: fs.cat_file(f"{root}/{name}"))
        try:
            return (Path(self.place) / name).read_bytes()
        except OSError as error:
            raise DataError(f"{self.place}/{name} can't be read: {error.strerror}") from None

    def read_parts(self, parts: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """`size` bytes at `offset` of files, as (name, offset, size); together from a URL.

        Raises:
            DataError: a file is missing or cut short, or the URL can't be reached.
        """
        if is_url(self.place):
            found = self._retry(parts[0][0], lambda fs, root: self._ranges(fs, root, parts))
        else:
            found = [self._read_part(*part) for part in parts]
        for data, (name, offset, size) in zip(found, parts, strict=True):
            if len(data) != size:
                raise DataError(
                    f"{public_url(self.place)}/{name} is cut short: bytes {offset} to"
                    f" {offset + size} are wanted, {len(data)} of them are there; copy it again"
                )
        return found

    def sizes(self) -> dict[str, int]:
        """Size in bytes of each file, by name."""
        if is_url(self.place):

            def listing(fs: Any, root: str) -> list[dict[str, Any]]:
                fs.invalidate_cache()
                return fs.ls(root, detail=True)

            found = self._retry("", listing)
            return {e["name"].rsplit("/", 1)[1]: e["size"] for e in found if e["type"] == "file"}
        return {e.name: e.stat().st_size for e in os.scandir(self.place) if e.is_file()}

    def _read_part(self, name: str, offset: int, size: int) -> bytes:
        # Opened for each read, as the files of a folder are: a set may have more shards than a
        # process may have files open.
        try:
            with (Path(self.place) / name).open("rb", buffering=0) as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise DataError(f"{self.place}/{name} can't be read: {error.strerror}") from None

    @staticmethod
    def _ranges(fs: Any, root: str, parts: Sequence[tuple[str, int, int]]) -> list[bytes]:
        names = [f"{root}/{name}" for name, _, _ in parts]
        starts = [offset for _, offset, _ in parts]
        ends = [offset + size for _, offset, size in parts]
        found = fs.cat_ranges(names, starts, ends, on_error="return")
        for item in found:
            if isinstance(item, Exception):
                raise item
        return found

    def _retry(self, name: str, read: Callable[[Any, str], Any]) -> Any:
        url = public_url(f"{self.place}/{name}".rstrip("/"))
        for attempt in range(TRIES):
            try:
                if self._remote is None or self._remote[0] != os.getpid():
                    options = {"skip_instance_cache": True}
                    self._remote = (os.getpid(), *fsspec.core.url_to_fs(self.place, **options))
                return read(*self._remote[1:])
            except (FileNotFoundError, PermissionError, ImportError, ValueError) as error:
                raise DataError(f"{url} can't be read: {self._hide(error)}") from None
            except Exception as error:  # every library has its own for a lost connection
                if attempt + 1 == TRIES:
                    raise DataError(
                        f"{url} can't be reached after {TRIES} tries: {self._hide(error)}"
                    ) from None
                # Of a generator of its own: the global one draws augmentations.
                time.sleep(BACKOFF * 2**attempt * random.Random().uniform(0.5, 1))
        raise AssertionError

    def _hide(self, error: Exception) -> str:
        text = public_url(f"{type(error).__name__}: {error}")
        return text.replace(self.place, public_url(self.place))


class _Shard(BaseModel, extra="allow", strict=True):
    name: str
    bytes: int
    sha256: str


class _Split(BaseModel, extra="allow"):
    shards: list[_Shard]


class _Index(BaseModel, extra="allow"):
    classes: list[str]
    splits: dict[str, _Split]


class ShardSet:
    """The index of a shard set."""

    def __init__(self, place: str) -> None:
        self.place, self.store = place, Store(place)
        try:
            self.index: dict[str, Any] = json.loads(self.store.read(INDEX))
            _Index.model_validate(self.index)
        except (ValueError, TypeError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            raise self._damaged(INDEX, "the index", error) from None
        self.classes: list[str] = self.index["classes"]
        self.splits: dict[str, dict[str, Any]] = self.index["splits"]

    def _damaged(self, name: str, what: str, error: Exception) -> DataError:
        return DataError(
            f"{public_url(self.place)}/{name} is not {what} of a shard set ({brief(error)})",
            "Copy it again, or pack the images again with `elsa pack`",
        )

    def images(self, split: str, *columns: str) -> dict[str, NDArray[Any]]:
        """Columns of the table of a split's images, in the order of the folder."""
        name = f"{split}.npz"
        data = io.BytesIO(self.store.read(name))
        try:
            with np.load(data, allow_pickle=False) as table:
                return {column: table[column] for column in columns}
        except Exception as error:  # of zip, zlib or numpy, whatever a damaged table makes of it
            raise self._damaged(name, "a table", error) from None

    def shards(self) -> dict[str, dict[str, Any]]:
        """`bytes` and `sha256` of every shard by file name."""
        return {s["name"]: s for split in self.splits.values() for s in split["shards"]}

    def cut(self) -> str | None:
        """The first shard that is missing or not as long as the index says, and how."""
        have = self.store.sizes()
        for name, shard in self.shards().items():
            if name not in have:
                return f"shard {name} is missing"
            if have[name] != shard["bytes"]:
                return (
                    f"shard {name} has {have[name]} bytes, {shard['bytes']} when it was packed:"
                    " it was cut short or changed; copy it again"
                )
        return None


def entries(names: Any, sizes: Any, digests: Any) -> Mapping[str, tuple[int, str]]:
    """The columns of an index as file entries: {name: (bytes, sha256)}."""
    return {
        name.decode(): (int(size), bytes(digest).hex())
        for name, size, digest in zip(names, sizes, digests, strict=True)
    }


@dataclass(frozen=True)
class Dataset:
    """A data set as a training loop reads it; sent to the workers."""

    name: str
    """`imagenet`, `coco` or `ade20k`."""
    place: str
    """Folder or URL of its images."""
    classes: tuple[str, ...]
    """In the order of the labels."""
    counts: Mapping[str, int]
    """Images by split; empty where `prepare` did not verify it."""
    digest: str
    """Of its files and classes; empty where `prepare` did not verify it."""
    skipped: tuple[str, ...] = ()
    """Images that are left out as they do not decode, by path within it."""
    without_mask: int = 0
    """Annotations of COCO's layout that are a box alone."""
