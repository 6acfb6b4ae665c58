"""Archives of public data sets: checked, unpacked whole, and unable to write elsewhere."""

import errno
import io
import json
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.io

from pipelines.data.demo import draw as demo
from pipelines.data.public import archives

from .test_public_data import Calls, rejected, take

SIZES = SimpleNamespace(
    seed=5,
    digits_per_class=10,
    image_size=32,
    train_variants=1,
    scene_size=96,
    train_scenes=9,
    val_scenes=5,
    max_digits=3,
)
COUNTS = {
    "imagenet": {"classes": 10, "train": 80, "val": 20},
    "coco": {"classes": 10, "train": 9, "val": 5},
    "ade20k": {"classes": 11, "train": 9, "val": 5},
}


def add(archive: tarfile.TarFile, name: str, data: bytes, **attributes: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in attributes.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(data))


def pack_archives(root: Path, kind: str, folder: Path) -> None:
    """The data set in `root` as its public archives in `folder`."""
    folder.mkdir(parents=True)
    if kind != "imagenet":
        tops = {"train2017.zip": "train2017", "val2017.zip": "val2017"}
        tops["annotations_trainval2017.zip"] = "annotations"
        if kind == "ade20k":
            tops = {"ADEChallengeData2016.zip": "."}
        for name, top in tops.items():
            with zipfile.ZipFile(folder / name, "w") as archive:
                for path in sorted((root / top).rglob("*")):
                    inner = path.relative_to(root)
                    archive.write(path, f"ADEChallengeData2016/{inner}" if top == "." else inner)
        return
    with tarfile.open(folder / archives.TRAIN_TAR, "w") as outer:
        for group in sorted((root / "train").iterdir()):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for path in sorted(group.iterdir()):
                    inner.add(path, path.name)
            add(outer, f"{group.name}.tar", buffer.getvalue())
    val = sorted((root / "val").rglob("*.JPEG"), key=lambda path: path.name)
    with tarfile.open(folder / archives.VAL_TAR, "w") as outer:
        for path in val:
            outer.add(path, path.name)
    # As in the devkit, ids are not in the order of the names, and inner synsets follow.
    names = list(reversed(demo.CLASSES["imagenet"]))
    synsets = [{"ILSVRC2012_ID": i, "WNID": n} for i, n in enumerate([*names, "animal"], start=1)]
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    truth = "\n".join(str(names.index(path.parent.name) + 1) for path in val)
    with tarfile.open(folder / archives.DEVKIT, "w:gz") as devkit:
        add(devkit, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        label_name = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
        add(devkit, label_name, truth.encode())


@pytest.mark.parametrize("kind", demo.DATASETS)
def test_archives_are_checked_and_unpacked_whole(
    kind: str, public_data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    folder, unpacked = tmp_path / "archives", tmp_path / "storage" / kind
    pack_archives(public_data / kind, kind, folder)
    first = archives.NAMES[kind][0]
    rejected(tmp_path, kind, folder, first, "the published one is")
    monkeypatch.setattr(archives, "CHECKSUMS", {first: "md5:0"})
    rejected(tmp_path, kind, folder, first, "has md5", "the published one is 0")
    assert not unpacked.exists()

    monkeypatch.setattr(archives, "CHECKSUMS", {})
    monkeypatch.setattr(archives, "PART", 4)
    with pytest.raises(KeyboardInterrupt):
        take(tmp_path, kind, folder, Calls(stop_after=len(archives.NAMES[kind]) + 2))
    assert not unpacked.exists()
    manifest = take(tmp_path, kind, folder)
    assert manifest == take(tmp_path, kind, public_data / kind)
    assert json.loads((unpacked / "manifest.json").read_text()) == manifest
    assert [p.name for p in unpacked.parent.iterdir() if "unpacking" in p.name] == []
    calls = Calls()
    assert take(tmp_path, kind, folder, calls) == manifest
    assert not calls.results, "what is unpacked and verified is not touched again"


def test_a_list_of_labels_does_instead_of_the_devkit(
    public_data: Path, tmp_path: Path, monkeypatch: Any
):
    monkeypatch.setattr(archives, "CHECKSUMS", {})
    folder = tmp_path / "archives"
    pack_archives(public_data / "imagenet", "imagenet", folder)
    (folder / archives.DEVKIT).unlink()
    rejected(tmp_path, "imagenet", folder, archives.DEVKIT, archives.VAL_LABELS)
    val = sorted((public_data / "imagenet/val").rglob("*.JPEG"), key=lambda path: path.name)
    labels = [path.parent.name for path in val]
    (folder / archives.VAL_LABELS).write_text("\n".join(labels[:-1]))
    rejected(tmp_path, "imagenet", folder, "19 labels for the 20 images")
    (folder / archives.VAL_LABELS).write_text("\n".join(labels))
    assert take(tmp_path, "imagenet", folder)["counts"]["val"] == 20


@pytest.mark.parametrize("evil", ["../out.JPEG", "/out.JPEG", "link", "device"])
def test_archives_can_not_write_elsewhere(
    evil: str, public_data: Path, tmp_path: Path, monkeypatch: Any
):
    monkeypatch.setattr(archives, "CHECKSUMS", {})
    folder = tmp_path / "archives"
    pack_archives(public_data / "imagenet", "imagenet", folder)
    with tarfile.open(folder / archives.TRAIN_TAR, "a") as outer:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as inner:
            types = {"link": tarfile.SYMTYPE, "device": tarfile.CHRTYPE}
            linkname = "/etc/hostname" if evil == "link" else ""
            add(inner, evil, b"", type=types.get(evil, tarfile.REGTYPE), linkname=linkname)
        add(outer, "evil.tar", buffer.getvalue())
    rejected(tmp_path, "imagenet", folder, evil, "is rejected")
    assert not (tmp_path / "storage/imagenet").exists()
    assert not list(tmp_path.rglob("out.JPEG"))
    pack_archives(public_data / "ade20k", "ade20k", tmp_path / "zip")
    with zipfile.ZipFile(tmp_path / "zip/ADEChallengeData2016.zip", "a") as archive:
        info = zipfile.ZipInfo(f"ADEChallengeData2016/{evil}" if "." not in evil else evil)
        info.external_attr = 0o120777 << 16 if "." not in evil else 0
        archive.writestr(info, "/etc/hostname")
    rejected(tmp_path, "ade20k", tmp_path / "zip", evil, "is rejected")


def test_a_cut_archive_and_a_full_disk_leave_nothing_half(
    public_data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(archives, "CHECKSUMS", {})
    folder = tmp_path / "archives"
    pack_archives(public_data / "imagenet", "imagenet", folder)
    whole = (folder / archives.TRAIN_TAR).read_bytes()
    (folder / archives.TRAIN_TAR).write_bytes(whole[: len(whole) // 2])
    rejected(tmp_path, "imagenet", folder, archives.TRAIN_TAR, "damaged or cut short")
    (folder / archives.TRAIN_TAR).write_bytes(whole)

    usage = SimpleNamespace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(archives.shutil, "disk_usage", lambda path: usage)
        rejected(tmp_path, "imagenet", folder, "no space left", "set data.storage")

    def full(source: Any, target: Any, length: int) -> None:
        target.write(source.read(100))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(archives.shutil, "copyfileobj", full)
        rejected(tmp_path, "imagenet", folder, "no space left", "what is unpacked stays")
    assert not (tmp_path / "storage/imagenet").exists()
    assert not [p for p in (tmp_path / "storage").rglob("*") if p.is_file()]
    assert take(tmp_path, "imagenet", folder)["counts"]["train"] == 80
