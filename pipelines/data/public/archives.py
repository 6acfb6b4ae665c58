"""The public archives of ImageNet, COCO 2017 and ADE20K: checked, and unpacked safely.

Each is unpacked into `<target>.unpacking` and renamed when all of it is there. Every file is
written aside and renamed too, so a killed unpacking resumes where it was, and what stands under
the name of a file is whole.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pipelines.data.errors import DataError

VAL_LABELS = "imagenet_2012_validation_synset_labels.txt"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
VAL_TAR, TRAIN_TAR = "ILSVRC2012_img_val.tar", "ILSVRC2012_img_train.tar"

NAMES = {
    "imagenet": (TRAIN_TAR, VAL_TAR),
    "coco": ("train2017.zip", "val2017.zip", "annotations_trainval2017.zip"),
    "ade20k": ("ADEChallengeData2016.zip",),
}
CHECKSUMS = {
    # https://docs.pytorch.org/vision/stable/_modules/torchvision/datasets/imagenet.html
    TRAIN_TAR: "md5:1d675b47d978889d74fa0da5fadfb00e",
    VAL_TAR: "md5:29b22e2961454d5413ddabcf34fc5622",
    DEVKIT: "md5:fa75699e90414af021442c21a62c3abf",
    # https://github.com/PaddlePaddle/PaddleDetection/blob/develop/ppdet/utils/download.py
    "train2017.zip": "md5:cced6f7f71b7629ddf16f17bbcfab6b2",
    "val2017.zip": "md5:442b8da7639aecaf257c1dceb8ba8c80",
    "annotations_trainval2017.zip": "md5:f4bbac642086de4f52a3fdda2de5fa2c",
    # https://github.com/dmlc/gluon-cv/blob/master/scripts/datasets/ade20k.py
    "ADEChallengeData2016.zip": "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
}
PART = 2000  # files of a zip that are unpacked together
_BLOCK = 2**20


@dataclass(frozen=True)
class Part:
    """Files of an archive that are unpacked together."""

    archive: str
    target: str
    """The folder that the names below are in."""
    names: Mapping[str, str]
    """Path below the target by member; of a tar empty: all members, by their own names."""
    start: int = 0
    """Where a tar begins within the file, in bytes."""


def found(folder: Path, kind: str) -> list[Path]:
    """The public archives of a data set in a folder; empty if it holds none of them."""
    return [folder / name for name in NAMES[kind] if (folder / name).is_file()]


def unpack(folder: Path, kind: str, target: Path, each: Callable[..., Any]) -> None:
    """Check the archives of a data set in `folder` and unpack them into folder `target`.

    Args:
        each: see `pipelines.data.public.verify.Each`.

    Raises:
        DataError: an archive is missing or wrong, or there is no space for what is in it.
    """
    if target.is_dir():
        return
    paths = [folder / name for name in NAMES[kind]]
    if kind == "imagenet":
        paths.append(folder / (VAL_LABELS if (folder / VAL_LABELS).is_file() else DEVKIT))
    if missing := [path.name for path in paths if not path.is_file()]:
        also = f" (or {VAL_LABELS})" if missing == [DEVKIT] else ""
        raise DataError(f"{folder} has {found(folder, kind)[0].name} but not {missing[0]}{also}")
    staging = target.with_name(f"{target.name}.unpacking")
    each(check_sum, [(str(path),) for path in paths], "archives", lambda _: None)
    parts, size = _parts(paths, kind, staging)
    _check_space(staging, size)
    each(unpack_part, [(part,) for part in parts], "parts", lambda _: None)
    staging.replace(target)


def check_sum(path: str) -> None:
    """Compare a file with its published checksum, if there is one."""
    known = CHECKSUMS.get(Path(path).name)
    if known is None:
        return
    algorithm, wanted = known.split(":")
    with Path(path).open("rb") as file:
        is_now = hashlib.file_digest(
            file, lambda: hashlib.new(algorithm, usedforsecurity=False)
        ).hexdigest()
    if is_now != wanted:
        raise DataError(
            f"{path} has {algorithm} {is_now}, the published one is {wanted}: it is another file"
            f" or was cut short ({Path(path).stat().st_size} bytes). Fetch it again; an archive of"
            " your own: unpack it and give the folder"
        )


def _parts(paths: Sequence[Path], kind: str, staging: Path) -> tuple[list[Part], int]:
    """All the work, and the bytes that it writes (a little less than)."""
    if kind == "imagenet":
        train, val, labels = paths
        with _readable(train), tarfile.open(train) as outer:
            parts = []
            for member in outer:
                name = _safe(train, member.name)
                if not member.isreg() or name.suffix != ".tar" or len(name.parts) != 1:
                    raise DataError(f"{train}: {member.name} is not a tar of one class")
                target = str(staging / "train" / name.stem)
                parts.append(Part(str(train), target, {}, member.offset_data))
        parts.append(Part(str(val), str(staging / "val"), val_classes(val, labels)))
        return parts, train.stat().st_size + val.stat().st_size
    parts, total = [], 0
    for path in paths:
        with _readable(path), zipfile.ZipFile(path) as archive:
            wanted = {}
            for info in archive.infolist():
                name = _safe(path, info.filename)
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise DataError(f"{path}: {info.filename} is a link, which is rejected")
                inner = PurePosixPath(*name.parts[1:]) if kind == "ade20k" else name
                needed = kind == "ade20k" or "annotations" not in path.name
                if not info.is_dir() and (needed or name.name.startswith("instances_")):
                    wanted[info.filename] = str(inner)
                    total += info.file_size
        items = sorted(wanted.items())
        for i in range(0, len(items), PART):
            parts.append(Part(str(path), str(staging), dict(items[i : i + PART])))
    return parts, total


def val_classes(val: Path, labels: Path) -> dict[str, str]:
    """`<class>/<file>` of each member of ImageNet's validation tar.

    Args:
        labels: the devkit, or a text file with the class of each image in the order of their
            names, one a line.
    """
    with _readable(val), tarfile.open(val) as archive:
        names = sorted(m.name for m in archive if m.isreg())
    plain = labels.name == VAL_LABELS
    classes = _text(labels).split() if plain else _devkit_classes(labels)
    if len(classes) != len(names):
        raise DataError(f"{labels} has {len(classes)} labels for the {len(names)} images of {val}")
    pairs = zip(names, classes, strict=True)
    return {name: str(_safe(labels, f"{c}/{Path(name).name}")) for name, c in pairs}


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no text ({error})") from None


def _devkit_classes(devkit: Path) -> list[str]:
    import scipy.io

    with _readable(devkit), tarfile.open(devkit) as archive:
        files = {}
        for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"):
            member = archive.extractfile(f"ILSVRC2012_devkit_t12/data/{name}")
            if member is None:
                raise DataError(f"{devkit}: {name} is no file; fetch it again")
            files[name] = member.read()
    try:
        synsets = scipy.io.loadmat(io.BytesIO(files["meta.mat"]), squeeze_me=True)["synsets"]
        by_id = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets}
        return [by_id[int(i)] for i in files["ILSVRC2012_validation_ground_truth.txt"].split()]
    except Exception as error:  # scipy raises a dozen kinds at damaged bytes, and documents none
        raise DataError(f"{devkit}: its meta.mat and labels do not fit ({error!r})") from None


def unpack_part(part: Part) -> int:
    """Unpack a part; the number of its files. Those that are there already stay."""
    path, target = Path(part.archive), Path(part.target)
    count = 0
    with _readable(path), path.open("rb") as file:
        for name, size, member in _members(path, file, part):
            destination = target / name
            if not destination.is_file() or destination.stat().st_size != size:
                _write(destination, member, size, path)
            count += 1
    if part.names and count != len(part.names):
        raise DataError(f"{path} has {count} of {len(part.names)} files; fetch it again")
    return count


def _members(path: Path, file: IO[bytes], part: Part) -> Iterator[tuple[str, int, IO[bytes]]]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(file) as archive:
            for name, inner in part.names.items():
                with archive.open(name) as member:
                    yield inner, archive.getinfo(name).file_size, member
        return
    file.seek(part.start)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for info in archive:
            inside = _safe(path, info.name)
            if info.isdir():
                continue
            content = archive.extractfile(info) if info.isreg() else None
            if content is None:
                raise DataError(f"{path}: {info.name} is a link or a device, which is rejected")
            yield part.names.get(info.name, str(inside)), info.size, content


def _safe(archive: Path, name: str) -> PurePosixPath:
    """The path of a member, if it stays inside the target."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise DataError(
            f"{archive}: {name!r} would be written outside of the target; it is rejected"
        )
    return path


def _write(destination: Path, member: IO[bytes], size: int, archive: Path) -> None:
    aside = destination.with_name(f".{destination.name}.{os.getpid()}.part")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            shutil.copyfileobj(member, file, _BLOCK)
        if aside.stat().st_size != size:
            raise DataError(f"{archive} ends within {destination.name}: fetch it again")
        aside.replace(destination)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"no space left in {destination.parent} for {archive.name}: free some, or set"
                " data.storage to a larger disk, and start again: what is unpacked stays"
            ) from None
        raise
    finally:
        aside.unlink(missing_ok=True)


def _check_space(staging: Path, size: int) -> None:
    staging.mkdir(parents=True, exist_ok=True)
    there = sum(p.stat().st_size for p in staging.rglob("*") if p.is_file())
    free = shutil.disk_usage(staging).free
    if free < size - there:
        raise DataError(
            f"no space left to unpack into {staging.parent}: {(size - there) / 2**30:.1f} GiB"
            f" needed, {free / 2**30:.1f} GiB free; set data.storage to a larger disk"
        )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What the libraries raise for a broken archive, as DataError."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise DataError(f"{path} is damaged or cut short ({error}): fetch it again") from None
    except (NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path} can't be unpacked: {error}") from None  # such as encrypted
    except OSError as error:
        if error.errno is None:  # gzip: not a gzipped file
            raise DataError(f"{path} is damaged or cut short ({error})") from None
        raise
