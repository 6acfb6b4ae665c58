"""Verify a public data set where it is, and describe it in a manifest.

The work is cut into chunks (an ImageNet class, some hundred images), each checked by itself,
anywhere; finished chunks are noted in a journal and not checked again while names, sizes and
times of their files stay as they are. What the chunks found is put together by `conclude`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from timm.utils.misc import natural_key

from pipelines.data import images
from pipelines.data.checks import (
    FOLDERS,
    IMAGES,
    DataError,
    by,
    check_coco,
    decode,
    read_label_map,
)
from pipelines.data.manifest import (
    MANIFEST,
    ChunkEntry,
    chunk_manifest,
    parse_manifest,
    read_manifest,
    sizes_digest,
)

CHUNK = 500  # images in a chunk of COCO or ADE20K
SHOWN = 10  # faults that an error lists; all are in the file that it names
VERSION = 1  # of what is checked: raise it, and journals of before do not count
COCO_SPLITS = {"train": "train2017", "val": "val2017"}
ADE_SPLITS = {"train": "training", "val": "validation"}
INSTANCES = "annotations/instances_{}.json"

Each = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]], str, Callable[[Any], None]], Any]
"""Calls a function with each tuple of arguments, anywhere; `unit` names one call in a progress
line; the last argument is called here with each result as it comes."""


class Expected(Protocol):
    """Counts that a data set must have; 0 expects nothing."""

    @property
    def classes(self) -> int: ...
    @property
    def train(self) -> int: ...
    @property
    def val(self) -> int: ...


class Settings(Protocol):
    """The section `prepare` of the parameters."""

    @property
    def check(self) -> str: ...
    @property
    def max_corrupt(self) -> int: ...
    @property
    def max_empty_boxes(self) -> int: ...


TRAINING = {
    "imagenet": ("train/",),
    "coco": (f"{COCO_SPLITS['train']}/",),
    "ade20k": ("images/training/", "annotations/training/"),
}
"""How the paths of training images begin: of those, corrupt ones may be left out."""


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


# ---- the parts ---------------------------------------------------------------------------------


def chunks(place: Path, kind: str, classes: Sequence[str]) -> list[Chunk]:
    """All of a data set in folder `place`, in chunks; raises DataError if a split is missing."""
    if not place.is_dir():
        raise DataError(f"there is no folder {place} on {socket.gethostname()}")
    missing = [folder for folder in FOLDERS[kind] if not (place / folder).is_dir()]
    if missing:
        raise DataError(
            f"{place} has no folder {missing[0]}/, which the {kind} layout needs; it holds"
            f" {', '.join(sorted(path.name for path in place.iterdir())[:8]) or 'nothing'}"
        )
    if kind == "imagenet":
        return [
            Chunk(kind, f"{split}/{name}", split, None)
            for split in ("train", "val")
            for name in _class_folders(place, split)
        ]
    found = []
    if kind == "coco":
        names = tuple(INSTANCES.format(folder) for folder in COCO_SPLITS.values())
        for name in names:
            if not (place / name).is_file():
                raise DataError(f"{place} has no {name}")
        found.append(Chunk(kind, "annotations", "", names))
        for split, folder in COCO_SPLITS.items():
            files = _images(place, folder)
            found += [
                Chunk(kind, f"{folder}/{i:07d}", split, tuple(files[i : i + CHUNK]))
                for i in range(0, len(files), CHUNK)
            ]
        return found
    for split, folder in ADE_SPLITS.items():
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
            found.append(Chunk(kind, f"{folder}/{i:07d}", split, tuple(files), len(classes)))
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
    return sorted(folders, key=natural_key)


def class_names(place: Path, kind: str, splits: Sequence[str] = ("train", "val")) -> list[str]:
    """The classes of a data set in the order of their labels, as its `splits` have them.

    ImageNet: the class folders. COCO: the categories. ADE20K: the lines of `classes.txt`; the
    150 names that mmseg has if there is the public `objectInfo150.txt` instead.
    """
    if kind == "imagenet":
        found = {split: _class_folders(place, split) for split in splits}
        first, last = found[splits[0]], found[splits[-1]]
        if odd := sorted(set(first) ^ set(last)):
            raise DataError(
                f"{place}: train has {len(first)} class folders and val {len(last)}; they differ"
                f" in {', '.join(odd[:5])}"
            )
        return first
    if kind == "coco":
        path = place / INSTANCES.format(f"{splits[0]}2017")
        try:
            return [category["name"] for category in json.loads(path.read_bytes())["categories"]]
        except OSError as error:
            raise DataError(f"{path} can't be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} has no list of named categories ({error!r})") from None
    if (place / "classes.txt").is_file():
        lines = (place / "classes.txt").read_text(encoding="utf-8").splitlines()
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


def _files_of(place: Path, chunk: Chunk) -> dict[str, os.stat_result]:
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
        stats = _files_of(root, chunk)
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


class Journal:
    """Finished chunks in a file, one a line, so that a killed check goes on where it was."""

    def __init__(self, storage: Path, kind: str, place: str) -> None:
        where = hashlib.sha256(place.encode()).hexdigest()[:12]
        self.path = storage / "verified" / f"{kind}-{where}-v{VERSION}.jsonl"
        self.found: dict[str, Found] = {}
        if self.path.is_file():
            for line in self.path.read_bytes().splitlines():
                try:
                    entry = Found(**json.loads(line))
                except (ValueError, TypeError):
                    continue  # cut short when the process was killed
                self.found[entry.name] = entry

    def add(self, found: Found) -> None:
        self.found[found.name] = found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(b"\n" + json.dumps(vars(found), separators=(",", ":")).encode())


# ---- the whole ---------------------------------------------------------------------------------


def verify(
    kind: str, place: str, settings: Settings, expected: Expected, storage: Path, each: Each
) -> dict[str, Any]:
    """Verify a data set at `place` and return its manifest.

    One that carries a manifest of this pipeline is compared with it by names and sizes, unless
    `settings.check` is `content`.

    Raises:
        DataError: all that is wrong, in one message.
    """
    if images.is_shards(place):
        manifest = _verify_shards(kind, place, settings, each)
    else:
        manifest = _verify_folder(kind, place, settings, storage, each)
    counts = manifest["counts"] | {"classes": len(manifest["classes"])}
    counts["train"] += left_out(kind, manifest["skipped"])
    wrong = [
        f"{counts[key]} {what}, {wanted} expected (prepare.{kind}.{key})"
        for key, what in (
            ("classes", "classes"),
            ("train", "training images"),
            ("val", "validation images"),
        )
        if (wanted := getattr(expected, key)) not in (0, counts[key])
    ]
    if wrong:
        raise DataError(
            f"{images.public_url(place)} has {'; '.join(wrong)}. Complete it, or set what is"
            " expected (0 expects nothing)"
        )
    return manifest


def _verify_folder(
    kind: str, place: str, settings: Settings, storage: Path, each: Each
) -> dict[str, Any]:
    root = Path(place)
    carried = read_manifest(root / MANIFEST)
    if carried and "chunks" in carried and carried["dataset"] == kind and settings.check == "sizes":
        if fault := difference(place, carried):
            raise DataError(
                f"{place} is not as the {MANIFEST} in it says: {fault}. Copy it again, or remove"
                f" that {MANIFEST} to have the data verified as it is"
            )
        return carried
    # First what is cheap: the layout, then the classes.
    chunks(root, kind, ())
    classes = class_names(root, kind)
    parts, journal = chunks(root, kind, classes), Journal(storage, kind, place)
    known = {part.name: journal.found.get(part.name) for part in parts}

    def done(found: Found | None) -> None:
        if found:
            journal.add(found)

    arguments = [(place, p, k.stat if (k := known[p.name]) else None) for p in parts]
    each(check_chunk, arguments, "chunks", done)
    found = [journal.found[part.name] for part in parts]
    return conclude(root, kind, classes, parts, found, settings, journal.path)


def conclude(
    place: Path,
    kind: str,
    classes: Sequence[str],
    parts: Sequence[Chunk],
    found: Sequence[Found],
    settings: Settings,
    journal: Path,
) -> dict[str, Any]:
    """The manifest of what all chunks found; raises DataError with all that is wrong."""
    corrupt = {name: reason for f in found for name, reason in f.corrupt.items()}
    faults = [fault for f in found for fault in f.faults]
    fixed = [name for name in corrupt if not name.startswith(TRAINING[kind])]
    reason = ""
    if fixed or len(corrupt) > settings.max_corrupt:
        faults += [f"{place / name} can't be decoded: {why}" for name, why in corrupt.items()]
        reason = (
            f"{len(corrupt)} corrupt images, prepare.max_corrupt={settings.max_corrupt}"
            + ", and none of the validation images" * bool(fixed)
        )
    elif not faults and kind == "coco":
        shapes = {name: tuple(wh) for f in found for name, wh in f.shapes.items()}
        for folder in COCO_SPLITS.values():
            empty = check_coco(place, folder, classes, shapes, corrupt)  # type: ignore[arg-type]
            path = INSTANCES.format(folder)
            faults += [f"{path}: annotation {number} {why}" for number, why in empty.items()]
        reason = f"prepare.max_empty_boxes={settings.max_empty_boxes}"
        if len(faults) <= settings.max_empty_boxes:
            for fault in faults:
                print(f"prepare: left out, {fault}", flush=True)
            faults = []
    if faults:
        listed = journal.with_suffix(".faults.txt")
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("\n".join(faults) + "\n", encoding="utf-8")
        shown = "\n  ".join(faults[:SHOWN])
        more = f"\n  and {len(faults) - SHOWN} more in {listed}" if len(faults) > SHOWN else ""
        allowed = f" ({reason})" if reason and (corrupt or kind == "coco") else ""
        raise DataError(f"{place} has {len(faults)} faults{allowed}:\n  {shown}{more}")
    for name, why in corrupt.items():
        print(f"prepare: left out, {place / name} can't be decoded: {why}", flush=True)
    counts = dict.fromkeys(("train", "val"), 0)
    labelled = dict.fromkeys(("train", "val"), 0)
    for part, f in zip(parts, found, strict=True):
        if part.split:
            every = (f.images + len(f.corrupt)) // (2 if kind == "ade20k" else 1)
            counts[part.split] += every - left_out(kind, f.corrupt)
            labelled[part.split] += f.labelled
    for split in counts:
        if not counts[split] or (kind == "ade20k" and not labelled[split]):
            raise DataError(f"{place} has no {split} images with ground truth")
    return chunk_manifest(kind, classes, counts, {f.name: f.entry for f in found}, corrupt)


def left_out(kind: str, corrupt: Collection[str]) -> int:
    """How many images the corrupt files take away; ADE20K's come with a label map each."""
    return len({Path(name).stem for name in corrupt} if kind == "ade20k" else corrupt)


def difference(place: str, manifest: Mapping[str, Any]) -> str | None:
    """How the data at `place` differs from a manifest in names or sizes; None if it does not.

    Reads no image: 1.3 million files take seconds on a local disk, a minute or two over NFS.
    """
    if images.is_shards(place):
        shard_set = images.ShardSet(place)
        wrong = _index_difference(shard_set, manifest)
        return wrong or shard_set.cut()
    root, skipped = Path(place), manifest["skipped"]
    wanted = {name: ChunkEntry.parse(line) for name, line in manifest["chunks"].items()}
    parts = chunks(root, manifest["dataset"], manifest["classes"])
    if odd := sorted({part.name for part in parts} ^ wanted.keys()):
        return f"{odd[0]} is only in one of them"

    def compare(part: Chunk) -> str | None:
        try:
            sizes = {n: s.st_size for n, s in _files_of(root, part).items() if n not in skipped}
        except OSError as error:
            return f"{error.filename}: {error.strerror}"
        entry = wanted[part.name]
        if sizes_digest([f"{name}\0{size}" for name, size in sorted(sizes.items())]) == entry.sizes:
            return None
        return (
            f"{part.name} has {len(sizes)} files of {sum(sizes.values())} bytes, {entry.files} of"
            f" {entry.bytes} when it was verified"
        )

    with ThreadPoolExecutor(16) as pool:
        return next((fault for fault in pool.map(compare, parts) if fault), None)


# ---- shards ------------------------------------------------------------------------------------


def check_shard(place: str, name: str, size: int, sha256: str) -> str | None:
    """What is wrong with the bytes of a shard; None if they are those that were packed."""
    data = images.Store(place).read(name)
    if len(data) != size:
        return f"shard {name} has {len(data)} bytes, {size} when it was packed"
    if hashlib.sha256(data).hexdigest() != sha256:
        return f"shard {name} has another sha256 than when it was packed"
    return None


def _verify_shards(kind: str, place: str, settings: Settings, each: Each) -> dict[str, Any]:
    if kind != "imagenet":
        raise DataError(f"{images.public_url(place)} is a shard set, which only ImageNet can be")
    shard_set = images.ShardSet(place)
    manifest = parse_manifest(shard_set.store.read(MANIFEST))
    if manifest is None or "chunks" not in manifest:
        raise DataError(f"{images.public_url(place)}/{MANIFEST} is not a manifest of this pipeline")
    faults = [f for f in (difference(place, manifest),) if f]
    if settings.check == "content" and not faults:

        def done(fault: str | None) -> None:
            if fault:
                faults.append(fault)

        arguments = [(place, n, s["bytes"], s["sha256"]) for n, s in shard_set.shards().items()]
        each(check_shard, arguments, "shards", done)
    if faults:
        shown = "\n  ".join(sorted(faults)[:SHOWN])
        raise DataError(f"{images.public_url(place)} is not as it was packed:\n  {shown}")
    return manifest


def _index_difference(shard_set: images.ShardSet, manifest: Mapping[str, Any]) -> str | None:
    if shard_set.classes != manifest["classes"]:
        return f"{images.INDEX} has other classes"
    if index_chunks(shard_set) != dict(manifest["chunks"]):
        return f"{images.INDEX} is of other images than {MANIFEST}"
    return None


def index_chunks(shard_set: images.ShardSet) -> dict[str, str]:
    """The chunks of the manifest of a shard set: those of the folder, class by class."""
    chunks: dict[str, dict[str, tuple[int, str]]] = {}
    for split in shard_set.splits:
        columns = shard_set.images(split, "name", "size", "sha256")
        for name, entry in images.entries(*columns.values()).items():
            chunks.setdefault(name.rsplit("/", 1)[0], {})[name] = entry
    return {name: str(ChunkEntry.of(files)) for name, files in chunks.items()}
