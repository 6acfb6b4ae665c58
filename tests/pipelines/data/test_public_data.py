"""Public data sets: unpacked safely, verified where they are, read from there, and refused."""

import errno
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.io
from mmengine.registry import DefaultScope, init_default_scope
from mmengine.runner import Runner
from PIL import Image

from pipelines import prepare
from pipelines.data import dataset as places
from pipelines.data import images
from pipelines.data.errors import DataError
from pipelines.data.demo import draw as demo
from pipelines.data.files import write_json
from pipelines.data.public import archives, verify
from pipelines.mm.train import Job, build_config
from pipelines.params import Params, load_params

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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three data sets as a colleague would have them: no manifest of ours."""
    root = tmp_path_factory.mktemp("public")
    demo.prepare(SIZES, root)
    for kind in demo.DATASETS:
        (root / kind / "manifest.json").unlink()
        (root / kind / "sources.json").unlink()
    (root / "ade20k/classes.txt").write_text("\n".join(demo.CLASSES["ade20k"]))
    return root


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    def of(kind: str) -> Path:
        return Path(shutil.copytree(made / kind, tmp_path / "given" / kind))

    return of


def with_data(tmp_path: Path, kind: str, place: Path | str, **changes: Any) -> Params:
    params = load_params("demo")
    data = params.data.model_copy(update={kind: str(place), "storage": str(tmp_path / "storage")})
    section = params.prepare.model_copy(update={"source": "public", **changes})
    return params.model_copy(update={"data": data, "prepare": section})


class Calls:
    """Calls in this process, in order; counts them, and can die after some."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.results: list[Any] = []
        self.stop_after = stop_after

    def __call__(self, function: Any, arguments: Any, unit: str, done: Any) -> None:
        for one in arguments:
            if len(self.results) == self.stop_after:
                raise KeyboardInterrupt
            self.results.append(function(*one))
            done(self.results[-1])

    @property
    def worked(self) -> int:
        return sum(result is not None for result in self.results)


def take(tmp_path: Path, kind: str, place: Path | str, each: Any = None, **changes: Any) -> Any:
    return prepare.take_one(with_data(tmp_path, kind, place, **changes), kind, each or Calls())


def refused(tmp_path: Path, kind: str, place: Path | str, *words: str, **changes: Any) -> str:
    with pytest.raises(DataError) as caught:
        take(tmp_path, kind, place, **changes)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return str(caught.value)


# ---- folders -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", demo.DATASETS)
def test_a_colleagues_folder_is_verified_where_it_is(
    kind: str, made: Path, copy: Callable[[str], Path], tmp_path: Path, monkeypatch: Any
) -> None:
    before = sorted(made.rglob("*"))
    expected = load_params("demo").prepare.coco.model_copy(update=COUNTS[kind])
    manifest = take(tmp_path, kind, made / kind, **{kind: expected})
    assert sorted(made.rglob("*")) == before, "nothing is written into a folder that was given"
    assert manifest["classes"] == list(demo.CLASSES[kind])
    assert manifest["counts"] == {k: v for k, v in COUNTS[kind].items() if k != "classes"}
    assert str(tmp_path) not in json.dumps(manifest)
    assert str(made) not in json.dumps(manifest)

    # The same data elsewhere has the same manifest, and so the same run identity.
    elsewhere = copy(kind)
    assert take(tmp_path, kind, elsewhere) == manifest
    # With the manifest in it nothing is read, until the content is asked for or a size differs.
    write_json(elsewhere / "manifest.json", manifest)
    calls = Calls()
    assert take(tmp_path, kind, elsewhere, calls) == manifest
    assert not calls.results
    monkeypatch.setattr(verify, "VERSION", 2)
    assert take(tmp_path, kind, elsewhere, calls, check="content") == manifest
    assert calls.worked == len(manifest["chunks"])

    # What a training stage does with it.
    params = with_data(tmp_path, kind, elsewhere)
    monkeypatch.setattr(places, "ROOT", tmp_path)
    write_json(tmp_path / "data" / kind / "manifest.json", manifest)
    found = places.check(params, kind, COUNTS[kind]["classes"])
    assert found["place"] == str(elsewhere)
    assert found["digest"] == manifest["digest"]
    with pytest.raises(DataError, match=r"classes, but num_classes is 3"):
        places.check(params, kind, 3)
    victim = next(
        p
        for p in sorted(elsewhere.rglob("*.*"))
        if p.suffix.lower() == ".jpg" or p.suffix == ".JPEG"
    )
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(DataError, match="is not what was verified"):
        places.check(params, kind, COUNTS[kind]["classes"])
    refused(tmp_path, kind, elsewhere, "is not as the manifest.json in it says")


def test_a_killed_verification_goes_on_where_it_was(made: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        take(tmp_path, "imagenet", made / "imagenet", Calls(stop_after=7))
    journal = next((tmp_path / "storage/verified").glob("*.jsonl"))
    journal.write_bytes(journal.read_bytes()[:-40])  # the last line was cut short by the kill
    calls = Calls()
    manifest = take(tmp_path, "imagenet", made / "imagenet", calls)
    assert calls.worked == len(manifest["chunks"]) - 6
    again = Calls()
    assert take(tmp_path, "imagenet", made / "imagenet", again) == manifest
    assert again.worked == 0


def test_corrupt_images_are_listed_and_left_out_within_the_limit(
    copy: Callable[[str], Path], tmp_path: Path, capsys: Any
) -> None:
    root = copy("imagenet")
    bad = [min((root / "train" / f"digit_{i}").iterdir()) for i in (2, 7)]
    bad[0].write_bytes(bad[0].read_bytes()[:600])
    bad[1].write_bytes(b"an error page")
    refused(
        tmp_path,
        "imagenet",
        root,
        "2 faults",
        "2 corrupt images, prepare.max_corrupt=0",
        *map(str, bad),
        "(600 bytes)",
        "it is no image, or of an unknown kind (13 bytes)",
    )
    refused(tmp_path, "imagenet", root, "2 corrupt images", max_corrupt=1)
    manifest = take(tmp_path, "imagenet", root, max_corrupt=2)
    elsewhere = Path(shutil.copytree(root, tmp_path / "elsewhere"))
    assert take(tmp_path, "imagenet", elsewhere, max_corrupt=2) == manifest
    names = [path.relative_to(root).as_posix() for path in bad]
    assert list(manifest["skipped"]) == names
    assert manifest["counts"]["train"] == 78
    assert str(bad[0]) in capsys.readouterr().out
    data = images.Images(str(root), "train", manifest["skipped"])
    assert len(data) == 78
    assert not {data.filename(i, absolute=True) for i in range(78)} & {str(p) for p in bad}
    with pytest.raises(DataError, match=bad[0].name):  # timm would take another in silence
        [image for image, _ in (images.Images(str(root), "train")[i] for i in range(80))]
    # Validation images are what is reported: none may be left out.
    path = min((root / "val/digit_1").iterdir())
    path.write_bytes(b"no image")
    refused(tmp_path, "imagenet", root, "none of the validation images", str(path), max_corrupt=9)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("coco", ["train2017/*.jpg"]),
        # An image, and the label map of another: both pairs are lost.
        ("ade20k", ["images/training/*.jpg", "annotations/training/*.png"]),
    ],
)
def test_scenes_that_do_not_decode_are_left_out_of_training(
    copy: Callable[[str], Path], tmp_path: Path, name: str, bad: list[str]
) -> None:
    root = copy(name)
    files = [sorted(root.glob(pattern))[place] for place, pattern in enumerate(bad)]
    for file in files:
        file.write_bytes(file.read_bytes()[:200])
    count = {"coco": 1, "ade20k": 2}[name]
    refused(tmp_path, name, root, f"{count} corrupt images, prepare.max_corrupt=0", str(files[0]))
    manifest = take(tmp_path, name, root, max_corrupt=count)
    left_out = tuple(file.relative_to(root).as_posix() for file in files)
    assert sorted(manifest["skipped"]) == sorted(left_out)
    assert manifest["counts"]["train"] == 9 - count

    stage = {"coco": "detect", "ade20k": "segment"}[name]
    job = Job(stage, load_params("demo"), str(root), tuple(manifest["classes"]), None, left_out)
    config = build_config(job, tmp_path, 1)
    DefaultScope._instance_dict.clear()
    init_default_scope(config.default_scope)
    loader = Runner.build_dataloader(config.train_dataloader)
    assert len(loader.dataset) == 9 - count
    seen = {loader.dataset[i]["data_samples"].img_path for i in range(len(loader.dataset))}
    stems = {file.stem for file in files}
    assert len(seen) == 9 - count
    assert not {Path(path).stem for path in seen} & stems
    # Validation images are what is reported.
    validation = min(root.glob({"coco": "val2017/*", "ade20k": "images/validation/*"}[name]))
    validation.write_bytes(b"no image")
    refused(tmp_path, name, root, "none of the validation images", max_corrupt=9)


def test_counts_classes_and_layout(copy: Callable[[str], Path], tmp_path: Path) -> None:
    expected = load_params("demo").prepare.imagenet
    root = copy("imagenet")
    wrong = expected.model_copy(update={"train": 81, "classes": 1000})
    refused(
        tmp_path,
        "imagenet",
        root,
        "10 classes, 1000 expected",
        "80 training images, 81 expected (prepare.imagenet.train)",
        imagenet=wrong,
    )
    (root / "val/digit_3").rename(root / "val/digit_x")
    refused(tmp_path, "imagenet", root, "differ in digit_3, digit_x")
    (root / "val/digit_x").rename(root / "val/digit_3")
    for path in (root / "train/digit_4").iterdir():
        path.unlink()
    refused(tmp_path, "imagenet", root, "train/digit_4 has no images")
    shutil.rmtree(root / "val")
    refused(tmp_path, "imagenet", root, "no folder val/", "it holds train")
    refused(tmp_path, "imagenet", tmp_path / "nowhere", "no folder", "nowhere")
    refused(tmp_path, "coco", "s3://bucket/coco", "only ImageNet's shards")


def edit_coco(root: Path, edit: Callable[[Any], Any]) -> None:
    path = root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    edit(content)
    write_json(path, content)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c["annotations"][1].update(bbox=[90, 5, 20, 10]), ["is outside", "96x96"]),
        (lambda c: c["annotations"][1].update(category_id=99), ["category_id 99"]),
        (lambda c: c["images"][1].update(id=c["images"][0]["id"]), ["id 1 more than once"]),
        (lambda c: c.update(annotations=[]), ["has no annotations"]),
        (lambda c: c["images"].pop(), ["no entry"]),
    ],
    ids=["outside", "category", "duplicate", "empty", "unlisted"],
)
def test_faulty_coco_annotations(
    copy: Callable[[str], Path], tmp_path: Path, edit: Callable[[Any], Any], words: list[str]
) -> None:
    root = copy("coco")
    edit_coco(root, edit)
    refused(tmp_path, "coco", root, "instances_train2017.json", *words)


def test_empty_boxes_of_coco_have_a_limit(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """COCO 2017 has two (annotations 918 and 2206849); mmdet leaves them out."""
    root = copy("coco")
    edit_coco(root, lambda c: c["annotations"][1].update(bbox=[3, 5, 4, 0.0]))
    edit_coco(root, lambda c: c["annotations"][0].update(bbox=[80.5, 5, 16, 9]))  # rounded: half px
    refused(tmp_path, "coco", root, "annotation 102", "empty bbox", "prepare.max_empty_boxes=0")
    assert take(tmp_path, "coco", root, max_empty_boxes=1)["counts"]["train"] == 9


def test_faulty_label_maps(copy: Callable[[str], Path], tmp_path: Path) -> None:
    root = copy("ade20k")
    (root / "classes.txt").write_text("\n".join(demo.CLASSES["ade20k"][:-1]))
    refused(tmp_path, "ade20k", root, "14 faults", "has label 11; allowed: 0 (ignored) to 10")
    (root / "classes.txt").write_text("\n".join(demo.CLASSES["ade20k"]))
    for path in (root / "annotations/validation").iterdir():
        Image.new("L", (96, 96)).save(path)
    refused(tmp_path, "ade20k", root, "no val images with ground truth")
    Image.new("L", (96, 50), 1).save(path)
    refused(tmp_path, "ade20k", root, path.name, "is 96x50, its image")
    path.unlink()
    refused(tmp_path, "ade20k", root, "no counterpart", path.stem)
    (root / "classes.txt").unlink()
    shutil.copy(min((root / "annotations/validation").iterdir()), path)
    refused(tmp_path, "ade20k", root, "write the names of the classes into it")


# ---- archives ------------------------------------------------------------------------------


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
    kind: str, made: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    folder, unpacked = tmp_path / "archives", tmp_path / "storage" / kind
    pack_archives(made / kind, kind, folder)
    first = archives.NAMES[kind][0]
    refused(tmp_path, kind, folder, first, "the published one is")
    monkeypatch.setattr(archives, "CHECKSUMS", {first: "md5:0"})
    refused(tmp_path, kind, folder, first, "has md5", "the published one is 0")
    assert not unpacked.exists()

    monkeypatch.setattr(archives, "CHECKSUMS", {})
    monkeypatch.setattr(archives, "PART", 4)
    with pytest.raises(KeyboardInterrupt):
        take(tmp_path, kind, folder, Calls(stop_after=len(archives.NAMES[kind]) + 2))
    assert not unpacked.exists()
    manifest = take(tmp_path, kind, folder)
    assert manifest == take(tmp_path, kind, made / kind)
    assert json.loads((unpacked / "manifest.json").read_text()) == manifest
    assert [p.name for p in unpacked.parent.iterdir() if "unpacking" in p.name] == []
    calls = Calls()
    assert take(tmp_path, kind, folder, calls) == manifest
    assert not calls.results, "what is unpacked and verified is not touched again"


def test_a_list_of_labels_does_instead_of_the_devkit(made: Path, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(archives, "CHECKSUMS", {})
    folder = tmp_path / "archives"
    pack_archives(made / "imagenet", "imagenet", folder)
    (folder / archives.DEVKIT).unlink()
    refused(tmp_path, "imagenet", folder, archives.DEVKIT, archives.VAL_LABELS)
    val = sorted((made / "imagenet/val").rglob("*.JPEG"), key=lambda path: path.name)
    labels = [path.parent.name for path in val]
    (folder / archives.VAL_LABELS).write_text("\n".join(labels[:-1]))
    refused(tmp_path, "imagenet", folder, "19 labels for the 20 images")
    (folder / archives.VAL_LABELS).write_text("\n".join(labels))
    assert take(tmp_path, "imagenet", folder)["counts"]["val"] == 20


@pytest.mark.parametrize("evil", ["../out.JPEG", "/out.JPEG", "link", "device"])
def test_archives_can_not_write_elsewhere(evil: str, made: Path, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(archives, "CHECKSUMS", {})
    folder = tmp_path / "archives"
    pack_archives(made / "imagenet", "imagenet", folder)
    with tarfile.open(folder / archives.TRAIN_TAR, "a") as outer:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as inner:
            types = {"link": tarfile.SYMTYPE, "device": tarfile.CHRTYPE}
            linkname = "/etc/hostname" if evil == "link" else ""
            add(inner, evil, b"", type=types.get(evil, tarfile.REGTYPE), linkname=linkname)
        add(outer, "evil.tar", buffer.getvalue())
    refused(tmp_path, "imagenet", folder, evil, "refused")
    assert not (tmp_path / "storage/imagenet").exists()
    assert not list(tmp_path.rglob("out.JPEG"))
    pack_archives(made / "ade20k", "ade20k", tmp_path / "zip")
    with zipfile.ZipFile(tmp_path / "zip/ADEChallengeData2016.zip", "a") as archive:
        info = zipfile.ZipInfo(f"ADEChallengeData2016/{evil}" if "." not in evil else evil)
        info.external_attr = 0o120777 << 16 if "." not in evil else 0
        archive.writestr(info, "/etc/hostname")
    refused(tmp_path, "ade20k", tmp_path / "zip", evil, "refused")


def test_a_cut_archive_and_a_full_disk_leave_nothing_half(
    made: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(archives, "CHECKSUMS", {})
    folder = tmp_path / "archives"
    pack_archives(made / "imagenet", "imagenet", folder)
    whole = (folder / archives.TRAIN_TAR).read_bytes()
    (folder / archives.TRAIN_TAR).write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, "imagenet", folder, archives.TRAIN_TAR, "damaged or cut short")
    (folder / archives.TRAIN_TAR).write_bytes(whole)

    usage = SimpleNamespace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(archives.shutil, "disk_usage", lambda path: usage)
        refused(tmp_path, "imagenet", folder, "no space left", "set data.storage")

    def full(source: Any, target: Any, length: int) -> None:
        target.write(source.read(100))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(archives.shutil, "copyfileobj", full)
        refused(tmp_path, "imagenet", folder, "no space left", "what is unpacked stays")
    assert not (tmp_path / "storage/imagenet").exists()
    assert not [p for p in (tmp_path / "storage").rglob("*") if p.is_file()]
    assert take(tmp_path, "imagenet", folder)["counts"]["train"] == 80


def test_nothing_given(tmp_path: Path) -> None:
    params = with_data(tmp_path, "coco", tmp_path)
    with pytest.raises(DataError, match=r"data.imagenet is null: set it"):
        places.locate(params, "imagenet")
    none = params.model_copy(update={"data": params.data.model_copy(update={"coco": None})})
    with pytest.raises(DataError, match=r"data.imagenet, data.coco and data.ade20k are null"):
        prepare.check(none)
