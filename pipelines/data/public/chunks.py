"""The parts of a public data set: which files they are, what their classes are, and their check."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.data.checks import by, decode, folders, read_label_map
from pipelines.data.errors import DataError
from pipelines.data.layout import IMAGES, LAYOUTS
from pipelines.data.manifest import ChunkEntry

CHUNK = 500  # images in a chunk of COCO or ADE20K


@dataclass(frozen=True)
class Chunk:
    """Files that are checked together."""

    kind: str
    name: str
    """Its key in the manifest."""
    split: str
    files: tuple[str, ...] | None
    """Paths within the data set; None: the images of folder `name`."""
    labels: int = 0
    """The largest label of ADE20K's maps."""


@dataclass(frozen=True)
class Found:
    """What the check of a chunk found."""

    name: str
    stat: str
    """Digest of names, sizes and times: while it is the same, the rest holds."""
    entry: str
    """Its line in the manifest, without the corrupt images."""
    images: int
    """Images that decode (ADE20K: images and label maps)."""
    labelled: int
    """Label maps with a labelled pixel (ADE20K only)."""
    corrupt: dict[str, str]
    """The reason by path of an image that does not decode."""
    faults: list[str]
    """What no limit allows."""
    shapes: dict[str, tuple[int, int]]
    """Width and height by path (COCO only: its annotations name them)."""


def chunks(place: Path, kind: str, classes: Sequence[str]) -> list[Chunk]:
    """All of a data set in folder `place`, in chunks; raises DataError if a split is missing."""
    if not place.is_dir():
        raise DataError(f"there is no folder {place} on {socket.gethostname()}")
    missing = [folder for folder in folders(kind) if not (place / folder).is_dir()]
    if missing:
        raise DataError(
            f"{place} has no folder {missing[0]}/, which the {kind} layout needs; it holds"
            f" {', '.join(sorted(path.name for path in place.iterdir())[:8]) or 'nothing'}"
        )
    if kind == "imagenet":
        return [
            Chunk(kind, f"{split}/{name}", split, None)
            for split in LAYOUTS[kind].images
            for name in _class_folders(place, split)
        ]
    return _coco_chunks(place) if kind == "coco" else _ade20k_chunks(place, len(classes))


def _coco_chunks(place: Path) -> list[Chunk]:
    kind, found = "coco", []
    names = tuple(LAYOUTS[kind].annotations.values())
    for name in names:
        if not (place / name).is_file():
            raise DataError(f"{place} has no {name}")
    found.append(Chunk(kind, "annotations", "", names))
    for split, folder in LAYOUTS[kind].images.items():
        files = _images(place, folder)
        found += [
            Chunk(kind, f"{folder}/{i:07d}", split, tuple(files[i : i + CHUNK]))
            for i in range(0, len(files), CHUNK)
        ]
    return found


def _ade20k_chunks(place: Path, labels: int) -> list[Chunk]:
    kind, found = "ade20k", []
    for split, images in LAYOUTS[kind].images.items():
        folder = Path(images).name
        pictures, maps = (
            {Path(name).stem: name for name in _images(place, f"{part}/{folder}")}
            for part in ("images", "annotations")
        )
        if lonely := sorted(pictures.keys() ^ maps.keys()):
            raise DataError(
                f"{place}: {len(lonely)} of images/{folder} and annotations/{folder} have no"
                f" counterpart in the other: {', '.join(lonely[:3])}"
            )
        stems = sorted(pictures)
        for i in range(0, len(stems), CHUNK):
            part = stems[i : i + CHUNK]
            files = [name for stem in part for name in (pictures[stem], maps[stem])]
            found.append(Chunk(kind, f"{folder}/{i:07d}", split, tuple(files), labels))
    return found


def _images(place: Path, folder: str) -> list[str]:
    with os.scandir(place / folder) as entries:
        names = [f"{folder}/{entry.name}" for entry in entries]
    return sorted(name for name in names if name.lower().endswith(IMAGES))


def _class_folders(place: Path, split: str) -> list[str]:
    folders, loose = [], []
    with os.scandir(place / split) as entries:
        for entry in entries:
            if entry.is_dir():
                folders.append(entry.name)
            elif entry.name.lower().endswith(IMAGES):
                loose.append(entry.name)
    if loose or not folders:
        raise DataError(
            f"{place / split} needs a folder for each class with the images of that class in it,"
            f" but has {len(loose)} images outside of any ({', '.join(sorted(loose)[:2])})"
        )
    return sorted(folders)


def class_names(place: Path, kind: str, splits: Sequence[str] = ("train", "val")) -> list[str]:
    """The classes of a data set in the order of their labels, as its `splits` have them.

    ImageNet: the class folders. COCO: the categories. ADE20K: the lines of `classes.txt`; the
    150 names that mmseg has if there is the public `objectInfo150.txt` instead.
    """
    if kind == "imagenet":
        from timm.utils.misc import natural_key  # with torch, which a driver has no need of

        found = {s: sorted(_class_folders(place, s), key=natural_key) for s in splits}
        first, last = found[splits[0]], found[splits[-1]]
        if odd := sorted(set(first) ^ set(last)):
            raise DataError(
                f"{place}: train has {len(first)} class folders and val {len(last)}; they differ"
                f" in {', '.join(odd[:5])}"
            )
        return first
    if kind == "coco":
        path = place / LAYOUTS[kind].annotations[splits[0]]
        try:
            return [category["name"] for category in json.loads(path.read_bytes())["categories"]]
        except OSError as error:
            raise DataError(f"{path} can't be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} has no list of named categories ({error!r})") from None
    if (place / "classes.txt").is_file():
        try:
            lines = (place / "classes.txt").read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{place / 'classes.txt'} is not text in UTF-8: {error}") from None
        names = [line.strip() for line in lines if line.strip()]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise DataError(f"{place / 'classes.txt'} names {twice[0]!r} more than once")
        return names
    if (place / "objectInfo150.txt").is_file():
        from mmseg.utils import ade_classes

        return list(ade_classes())
    raise DataError(
        f"{place} has no classes.txt: write the names of the classes into it, one a line, the"
        " first for label 1 (0 is ignored)"
    )


def files_of(place: Path, chunk: Chunk) -> dict[str, os.stat_result]:
    """The stat of each file of a chunk by path within the data set."""
    if chunk.files is not None:
        return {name: (place / name).stat() for name in chunk.files}
    found = {}
    with os.scandir(place / chunk.name) as entries:
        for entry in entries:
            if entry.is_dir():
                raise DataError(f"{entry.path} is a folder inside a class folder")
            if entry.name.lower().endswith(IMAGES):
                found[f"{chunk.name}/{entry.name}"] = entry.stat()
    return dict(sorted(found.items()))


def check_chunk(place: str, chunk: Chunk, previous: str | None = None) -> Found | None:
    """Read, hash and decode the files of a chunk.

    Args:
        previous: `Found.stat` of an earlier check.

    Returns:
        None if the files have not changed since `previous`.
    """
    root = Path(place)
    try:
        stats = files_of(root, chunk)
    except OSError as error:
        raise DataError(
            f"{error.filename} can't be read on {socket.gethostname()} ({error.strerror}): the data"
            " must be at the same path on all nodes"
        ) from None
    lines = [f"{name}\0{s.st_size}\0{s.st_mtime_ns}" for name, s in stats.items()]
    stat = hashlib.sha256("\n".join([repr(chunk.labels), *lines]).encode()).hexdigest()
    if stat == previous:
        return None
    files: dict[str, tuple[int, str]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    corrupt, faults, labelled = {}, [], 0
    for name in stats:
        try:
            data = (root / name).read_bytes()
            if name.lower().endswith(IMAGES):
                shapes[name] = decode(io.BytesIO(data))
        except (OSError, ValueError) as error:
            corrupt[name] = f"{error} ({stats[name].st_size} bytes)"
            continue
        files[name] = len(data), hashlib.sha256(data).hexdigest()
        if name.startswith("annotations/") and name in shapes:
            try:
                labelled += bool(read_label_map(io.BytesIO(data), chunk.labels).any())
            except ValueError as error:
                faults.append(f"{root / name} {error}")
    if not shapes and chunk.split:
        faults.append(f"{root / chunk.name} has no images")
    if chunk.kind == "ade20k" and chunk.files:
        for picture, labels in zip(chunk.files[::2], chunk.files[1::2], strict=True):
            a, b = shapes.get(labels), shapes.get(picture)
            if a and b and a != b:
                faults.append(f"{root / labels} is {by(a)}, its image {picture} {by(b)}")
    entry, count = str(ChunkEntry.of(files)), len(shapes)
    if chunk.kind != "coco":
        shapes = {}
    return Found(chunk.name, stat, entry, count, labelled, corrupt, faults, shapes)
