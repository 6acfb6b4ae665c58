"""Verify a public data set where it is, and describe it in a manifest.

The work is cut into chunks (an ImageNet class, some hundred images), each checked by itself,
anywhere; finished chunks are noted in a journal and not checked again while names, sizes and
times of their files stay as they are. What the chunks found is put together by `conclude`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from pipelines.data import store
from pipelines.data.checks import check_coco
from pipelines.data.errors import DataError
from pipelines.data.layout import LAYOUTS
from pipelines.data.manifest import (
    MANIFEST,
    ChunkEntry,
    make_manifest,
    parse_manifest,
    read_manifest,
    sizes_digest,
)
from pipelines.data.public.chunks import Chunk, Found, check_chunk, chunks, class_names, files_of
from pipelines.data.public.shards import check_shard, index_difference

SHOWN = 10  # faults that an error lists; all are in the file that it names
VERSION = 1  # of what is checked: raise it, and journals of before do not count

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


class Journal:
    """Finished chunks in a file, one a line, so that a killed check resumes where it was."""

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


def verify(
    kind: str, place: str, settings: Settings, expected: Expected, storage: Path, each: Each
) -> dict[str, Any]:
    """Verify a data set at `place` and return its manifest.

    One that carries a manifest of this pipeline is compared with it by names and sizes, unless
    `settings.check` is `content`.

    Raises:
        DataError: all that is wrong, in one message.
    """
    if store.is_shards(place):
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
            f"{store.public_url(place)} has {'; '.join(wrong)}. Complete it, or set what is"
            " expected (0 expects nothing)"
        )
    return manifest


def _verify_folder(
    kind: str, place: str, settings: Settings, storage: Path, each: Each
) -> dict[str, Any]:
    root = Path(place)
    carried = read_manifest(root / MANIFEST)
    if carried and carried["dataset"] == kind and settings.check == "sizes":
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
    fixed = [name for name in corrupt if not name.startswith(LAYOUTS[kind].training)]
    reason, boxes_only = "", 0
    if fixed or len(corrupt) > settings.max_corrupt:
        faults += [f"{place / name} can't be decoded: {why}" for name, why in corrupt.items()]
        reason = (
            f"{len(corrupt)} corrupt images, prepare.max_corrupt={settings.max_corrupt}"
            + ", and none of the validation images" * bool(fixed)
        )
    elif not faults and kind == "coco":
        shapes = {name: tuple(wh) for f in found for name, wh in f.shapes.items()}
        for split, folder in LAYOUTS[kind].images.items():
            coco = check_coco(place, folder, classes, shapes, corrupt)  # type: ignore[arg-type]
            path = LAYOUTS[kind].annotations[split]
            faults += [f"{path}: annotation {number} {why}" for number, why in coco.empty.items()]
            boxes_only += len(coco.without_mask)
            if coco.without_mask:
                print(
                    f"prepare: {len(coco.without_mask)} of {coco.annotations} annotations of {path}"
                    " have no segmentation: they are for methods of boxes, such as faster-rcnn",
                    flush=True,
                )
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
    manifest = make_manifest(kind, classes, counts, {f.name: f.entry for f in found}, corrupt)
    return manifest | ({"without_mask": boxes_only} if boxes_only else {})


def left_out(kind: str, corrupt: Collection[str]) -> int:
    """How many images the corrupt files take away; ADE20K's come with a label map each."""
    return len({Path(name).stem for name in corrupt} if kind == "ade20k" else corrupt)


def difference(place: str, manifest: Mapping[str, Any]) -> str | None:
    """How the data at `place` differs from a manifest in names or sizes; None if it does not.

    Reads no image: 1.3 million files take seconds on a local disk, a minute or two over NFS.
    """
    if store.is_shards(place):
        shard_set = store.ShardSet(place)
        wrong = index_difference(shard_set, manifest)
        return wrong or shard_set.cut()
    root, skipped = Path(place), manifest["skipped"]
    wanted = {name: ChunkEntry.parse(line) for name, line in manifest["chunks"].items()}
    parts = chunks(root, manifest["dataset"], manifest["classes"])
    if odd := sorted({part.name for part in parts} ^ wanted.keys()):
        return f"{odd[0]} is only in one of them"

    def compare(part: Chunk) -> str | None:
        try:
            sizes = {n: s.st_size for n, s in files_of(root, part).items() if n not in skipped}
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


def _verify_shards(kind: str, place: str, settings: Settings, each: Each) -> dict[str, Any]:
    if kind != "imagenet":
        raise DataError(f"{store.public_url(place)} is a shard set, which only ImageNet can be")
    shard_set = store.ShardSet(place)
    manifest = parse_manifest(shard_set.store.read(MANIFEST))
    if manifest is None or "chunks" not in manifest:
        raise DataError(f"{store.public_url(place)}/{MANIFEST} is not a manifest of this pipeline")
    faults = [f for f in (difference(place, manifest),) if f]
    if settings.check == "content" and not faults:

        def done(fault: str | None) -> None:
            if fault:
                faults.append(fault)

        arguments = [(place, n, s["bytes"], s["sha256"]) for n, s in shard_set.shards().items()]
        each(check_shard, arguments, "shards", done)
    if faults:
        shown = "\n  ".join(sorted(faults)[:SHOWN])
        raise DataError(f"{store.public_url(place)} is not as it was packed:\n  {shown}")
    return manifest
