"""Write ImageNet, or any folder of classes, as tar shards in the WebDataset format.

Images are dealt to the shards in a fixed random order, so that readers which stream a shard see
mixed classes. Each shard is written aside and renamed (a URL gets it in one upload); then its
part of the index is written, by which a killed packing knows what is done. The bytes of a shard
depend on the images and the options only.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from PIL import Image

from pipelines.data.errors import DataError
from pipelines.data.images import Folder
from pipelines.data.manifest import MANIFEST, make_manifest
from pipelines.data.public import verify
from pipelines.data.public.shards import index_chunks
from pipelines.data.store import INDEX, ShardSet, Store, is_url, public_url

QUALITY = 95
"""JPEG quality of resized images."""


@dataclass(frozen=True)
class Shard:
    """What goes into one shard."""

    source: str
    target: str
    name: str
    resize: int
    images: tuple[tuple[int, str, int, str], ...]
    """For each image its index in the order of the folder, path, label and class."""


def pack(
    source: Path,
    target: str,
    manifest: dict[str, Any],
    each: Callable[..., Any],
    *,
    shard_bytes: int = 256 * 2**20,
    resize: int = 0,
) -> dict[str, Any]:
    """Pack a verified folder; the manifest of the shard set.

    Without `resize` it is that of the folder: training on either is the same run.

    Args:
        source: a folder with `{train,val}/<class>/`.
        target: a folder or an fsspec URL.
        manifest: of the folder, by `prepare`.
        shard_bytes: about how large a shard is.
        resize: shorter side in pixels that larger images are reduced to; 0 keeps all bytes.

    Raises:
        DataError: the folder is not as its manifest says, or the target can't be written.
    """
    if fault := verify.difference(str(source), manifest):
        raise DataError(f"{source} is not what was verified: {fault}")
    writer = _Writer(target)
    shards: dict[str, list[str]] = {}
    for split in ("train", "val"):
        work = _shards(source, target, split, manifest, shard_bytes, resize)
        shards[split] = [shard.name for shard in work]
        done = writer.finished(resize, work)
        left = [(shard,) for shard in work if shard.name not in done]
        each(write_shard, left, "shards", lambda _: None)
    index: dict[str, Any] = {"classes": manifest["classes"], "resize": resize, "splits": {}}
    for split, names in shards.items():
        parts = [writer.part(name) for name in names]
        table = _table(parts)
        writer.write(f"{split}.npz", table)
        keys = ("name", "bytes", "sha256")
        index["splits"][split] = {
            "images": sum(len(part["images"]) for part in parts),
            "shards": [{key: part[key] for key in keys} for part in parts],
        }
    writer.write(INDEX, json.dumps(index, indent=1).encode())
    chunks = index_chunks(ShardSet(target))
    packed = make_manifest(
        "imagenet", manifest["classes"], manifest["counts"], chunks, manifest["skipped"]
    )
    if not resize and packed != manifest:
        raise DataError(f"{source} changed while it was packed; pack it again")
    writer.write(MANIFEST, (json.dumps(packed, sort_keys=True, indent=1) + "\n").encode())
    for names in shards.values():
        for name in names:
            writer.remove(f"{name}.json")
    return packed


def _shards(
    source: Path,
    target: str,
    split: str,
    manifest: dict[str, Any],
    shard_bytes: int,
    resize: int,
) -> list[Shard]:
    folder = Folder(str(source), split, manifest["skipped"])
    images, sizes = [], []
    for i, (path, label) in enumerate(folder.samples):
        name = Path(path).relative_to(source).as_posix()
        images.append((i, name, label, manifest["classes"][label]))
        sizes.append(Path(path).stat().st_size)
    order = np.random.default_rng(0).permutation(len(images))
    # Cut where the running sum passes a multiple of the shard's size.
    bounds = np.cumsum(np.array(sizes)[order]) // shard_bytes
    groups = np.split(order, np.flatnonzero(np.diff(bounds)) + 1)
    return [
        Shard(str(source), target, f"{split}-{n:05d}.tar", resize, tuple(images[i] for i in group))
        for n, group in enumerate(groups)
    ]


def write_shard(shard: Shard) -> None:
    """Write a shard, then its part of the index."""
    writer = _Writer(shard.target)
    rows = []

    def fill(file: Any) -> None:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for index, name, label, class_name in shard.images:
                data, suffix = _image(Path(shard.source) / name, shard.resize)
                key = f"{index:09d}"
                note = json.dumps({"name": name, "class": class_name}).encode()
                offset = _add(archive, f"{key}.{suffix}", data)
                _add(archive, f"{key}.cls", str(label).encode())
                _add(archive, f"{key}.json", note)
                digest = hashlib.sha256(data).hexdigest()
                rows.append((index, offset, len(data), label, name, digest))

    size, sha256 = writer.write_file(shard.name, fill)
    part = {"name": shard.name, "bytes": size, "sha256": sha256, "images": rows}
    writer.write(
        f"{shard.name}.json", json.dumps(part | {"work": _work(shard, shard.resize)}).encode()
    )


def _work(shard: Shard, resize: int) -> str:
    return hashlib.sha256(repr((shard.images, resize)).encode()).hexdigest()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a member; the offset of its content."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    offset = archive.offset + tarfile.BLOCKSIZE
    archive.addfile(info, io.BytesIO(data))
    return offset


def _image(path: Path, resize: int) -> tuple[bytes, str]:
    """An encoded image and the suffix that says how it is encoded."""
    data = path.read_bytes()
    suffix = {".jpeg": "jpg"}.get(path.suffix.lower(), path.suffix.lower().removeprefix("."))
    if not resize:
        return data, suffix
    with Image.open(io.BytesIO(data)) as image:
        if min(image.size) <= resize:
            return data, suffix
        scale = resize / min(image.size)
        size = tuple(max(resize, round(side * scale)) for side in image.size)
        small = image.convert("RGB").resize((size[0], size[1]), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue(), "jpg"


def _table(parts: Sequence[dict[str, Any]]) -> bytes:
    rows = sorted((*row, n) for n, part in enumerate(parts) for row in part["images"])
    _, offsets, sizes, labels, names, digests, shards = zip(*rows, strict=True)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        shard=np.array(shards, np.int32),
        offset=np.array(offsets, np.int64),
        size=np.array(sizes, np.int32),
        label=np.array(labels, np.int32),
        name=np.array([name.encode() for name in names]),
        sha256=np.array([np.frombuffer(bytes.fromhex(d), np.uint8) for d in digests]),
    )
    return buffer.getvalue()


class _Writer:
    """Writes files whole or not at all into a folder or to an fsspec URL."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.fs, self.root = fsspec.core.url_to_fs(target, skip_instance_cache=True)

    def write(self, name: str, data: bytes) -> None:
        self.write_file(name, lambda file: file.write(data))

    def write_file(self, name: str, fill: Callable[[Any], Any]) -> tuple[int, str]:
        """Size and sha256 of what `fill` wrote."""
        try:
            if not is_url(self.target):
                Path(self.target).mkdir(parents=True, exist_ok=True)
            folder = None if is_url(self.target) else self.target
            handle, path = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
            try:
                with os.fdopen(handle, "w+b") as file:
                    fill(file)
                    size = file.tell()
                    file.seek(0)
                    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore
                if folder is None:
                    self.fs.put_file(path, f"{self.root}/{name}")
                else:
                    Path(path).chmod(0o644)
                    Path(path).replace(Path(folder) / name)
            finally:
                Path(path).unlink(missing_ok=True)
            return size, digest
        except DataError:
            raise
        except Exception as error:  # every fsspec library has its own
            why = f"{type(error).__name__}: {error}".replace(self.target, public_url(self.target))
            raise DataError(
                f"{public_url(self.target)}/{name} can't be written ({public_url(why)}); start the"
                " same packing again, it resumes with the shards that are missing"
            ) from None

    def part(self, name: str) -> dict[str, Any]:
        return dict(json.loads(Store(self.target).read(f"{name}.json")))

    def finished(self, resize: int, work: Sequence[Shard]) -> set[str]:
        """Names of the shards that are written already, of the same images and options."""
        if not is_url(self.target) and not Path(self.target).is_dir():
            return set()
        try:
            sizes = Store(self.target).sizes()
        except DataError as error:
            if "FileNotFoundError" in str(error):
                return set()
            raise
        found = set()
        for shard in work:
            if f"{shard.name}.json" in sizes:
                part = self.part(shard.name)
                same = part["work"] == _work(shard, resize)
                if same and sizes.get(shard.name) == part["bytes"]:
                    found.add(shard.name)
        return found

    def remove(self, name: str) -> None:
        self.fs.rm(f"{self.root}/{name}")
