"""A data set that is not whole or right is rejected, with what is wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.data.checks import check_dataset
from pipelines.data.demo import draw as demo
from pipelines.data.errors import DataError
from pipelines.data.files import write_json
from pipelines.data.manifest import data_digest, file_entry

from .conftest import PARAMS
from .test_demo import NUM_CLASSES, read


@pytest.mark.parametrize("kind", demo.DATASETS)
def test_whole_data_passes(demo_data: Path, kind: str) -> None:
    size = PARAMS.image_size if kind == "imagenet" else PARAMS.scene_size
    summary = check_dataset(demo_data / kind, kind, NUM_CLASSES[kind], size)
    assert summary["checked"] == "content"
    assert summary["digest"] == read(demo_data / kind / "manifest.json")["digest"]
    assert set(summary["counts"]) == {"train", "val"}


def fails(root: Path, kind: str, *words: str, **options: Any) -> None:
    with pytest.raises(DataError) as caught:
        check_dataset(root, kind, options.pop("num_classes", NUM_CLASSES[kind]), **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def remake(root: Path) -> None:
    """Bring the manifest in line with changed files, as a user's own data set would be."""
    manifest = read(root / "manifest.json")
    names = [p.relative_to(root).as_posix() for p in root.rglob("*.*")]
    files = {n: file_entry(root / n) for n in names if n != "manifest.json"}
    manifest |= {"files": files, "digest": data_digest(files, manifest["classes"])}
    write_json(root / "manifest.json", manifest)


def test_missing_folder(tmp_path: Path) -> None:
    fails(tmp_path / "coco", "coco", str(tmp_path / "coco"), "dvc repro prepare")


def test_half_prepared(copy_demo: Callable[[str], Path]) -> None:
    root = copy_demo("imagenet")
    (root / "manifest.json").unlink()
    fails(root, "imagenet", "half prepared", "manifest.json")


def test_broken_manifest(copy_demo: Callable[[str], Path]) -> None:
    root = copy_demo("imagenet")
    (root / "manifest.json").write_text('{"dataset": "imagenet", ')
    fails(root, "imagenet", "manifest.json", "not valid JSON")
    (root / "manifest.json").write_text('{"dataset": "imagenet", "classes": []}')
    fails(root, "imagenet", "manifest.json", "'counts'")


def test_another_kind(demo_data: Path) -> None:
    fails(demo_data / "coco", "ade20k", "'coco'", "'ade20k'")
    with pytest.raises(ValueError, match="allowed: imagenet"):
        check_dataset(demo_data / "coco", "voc", 10)


def test_class_count_differs(demo_data: Path) -> None:
    fails(demo_data / "imagenet", "imagenet", "10 classes", "num_classes is 7", num_classes=7)


def test_image_size_differs(demo_data: Path) -> None:
    fails(demo_data / "coco", "coco", "96x96", "160x160", image_size=160)


def test_missing_files(copy_demo: Callable[[str], Path]) -> None:
    root = copy_demo("ade20k")
    names = sorted((root / "images/training").iterdir())[:4]
    for path in names:
        path.unlink()
    fails(root, "ade20k", "4 file(s) are missing", f"images/training/{names[0].name}")
    shutil.rmtree(root / "images/training")
    fails(root, "ade20k", "no folder images/training")


def test_file_that_nobody_made(copy_demo: Callable[[str], Path]) -> None:
    root = copy_demo("imagenet")
    source = next((root / "train/digit_0").iterdir())
    shutil.copy(source, root / "train/digit_1/extra.JPEG")
    fails(root, "imagenet", "train/digit_1/extra.JPEG", "not in manifest.json")


@pytest.mark.parametrize("kind", demo.DATASETS)
def test_truncated_image(copy_demo: Callable[[str], Path], kind: str) -> None:
    root = copy_demo(kind)
    path = next(p for p in sorted(root.rglob("*.*")) if p.suffix.lower() in (".jpg", ".jpeg"))
    path.write_bytes(path.read_bytes()[:300])
    fails(root, kind, path.name, "cannot be decoded", "300 bytes")


def test_replaced_image(copy_demo: Callable[[str], Path]) -> None:
    root = copy_demo("imagenet")
    one, other = sorted((root / "val/digit_2").iterdir())[:2]
    shutil.copy(one, other)
    fails(root, "imagenet", "1 file(s) differs", other.name)


def test_edited_digest(copy_demo: Callable[[str], Path]) -> None:
    root = copy_demo("imagenet")
    write_json(root / "manifest.json", read(root / "manifest.json") | {"digest": "0" * 64})
    fails(root, "imagenet", "its own digest")


def test_class_folder_missing(copy_demo: Callable[[str], Path]) -> None:
    root = copy_demo("imagenet")
    shutil.rmtree(root / "val/digit_4")
    remake(root)
    fails(root, "imagenet", "digit_4", "9 class folders")


def _set(key: str, value: Any, part: str = "annotations") -> Callable[[Any], None]:
    def edit(content: Any) -> None:
        content[part][1][key] = value

    return edit


def _same_ids(part: str) -> Callable[[Any], None]:
    def edit(content: Any) -> None:
        content[part][1]["id"] = content[part][0]["id"]

    return edit


COCO_FAULTS: list[tuple[str, Callable[[Any], Any], list[str]]] = [
    ("image id", _set("image_id", 777), ["annotation 102", "image_id 777"]),
    ("category", _set("category_id", 99), ["annotation 102", "category_id 99"]),
    ("outside", _set("bbox", [90, 5, 20, 10]), ["annotation 102", "[90, 5, 20, 10]", "96x96"]),
    ("negative", _set("bbox", [-3, 5, 20, 10]), ["annotation 102", "[-3, 5, 20, 10]"]),
    ("empty", _set("bbox", [3, 5, 0, 10]), ["annotation 102", "[3, 5, 0, 10]"]),
    ("no box", _set("bbox", None), ["annotation 102", "bbox"]),
    ("text box", _set("bbox", ["3", 5, 6, 10]), ["annotation 102", "bbox"]),
    ("crowd flag", _set("iscrowd", 2), ["annotation 102", "iscrowd 2"]),
    ("mask size", _set("segmentation", {"size": [9, 9], "counts": "x"}), ["mask of size [9, 9]"]),
    ("no mask", _set("segmentation", []), ["annotation 102", "no segmentation"]),
    ("same annotation", _same_ids("annotations"), ["annotations has id 101 more than once"]),
    ("same image", _same_ids("images"), ["images has id 1 more than once"]),
    ("no id", _set("id", None), ["annotations", "id"]),
    ("no file", _set("file_name", "000000000999.jpg", "images"), ["image 2", "000000000999.jpg"]),
    ("wrong size", _set("width", 40, "images"), ["image 2", "40x96", "96x96"]),
    ("name", _set("name", "cat", "categories"), ["categories", "classes"]),
    ("no images", lambda content: content.pop("images"), ["'images'"]),
    ("unlisted", lambda content: content["images"].pop(), ["000000000014.jpg", "no entry"]),
]


@pytest.mark.parametrize(("edit", "words"), [pytest.param(*f[1:], id=f[0]) for f in COCO_FAULTS])
def test_coco_faults(
    copy_demo: Callable[[str], Path], edit: Callable[[Any], Any], words: list[str]
) -> None:
    root = copy_demo("coco")
    path = root / "annotations/instances_train2017.json"
    content = read(path)
    edit(content)
    write_json(path, content)
    fails(root, "coco", "instances_train2017.json", *words)
    remake(root)  # also when the manifest agrees with the faulty file
    fails(root, "coco", "instances_train2017.json", *words)


def test_coco_annotations_cut_short(copy_demo: Callable[[str], Path]) -> None:
    root = copy_demo("coco")
    path = root / "annotations/instances_val2017.json"
    path.write_text(path.read_text()[:1000])
    fails(root, "coco", "instances_val2017.json", "not valid JSON")
    path.unlink()
    fails(root, "coco", "are missing: annotations/instances_val2017.json")
    remake(root)
    fails(root, "coco", "no annotations/instances_val2017.json")


def test_coco_harmless_looking_edit_is_found_by_the_digest(
    copy_demo: Callable[[str], Path],
) -> None:
    root = copy_demo("coco")
    path = root / "annotations/instances_train2017.json"
    content = read(path)
    content["annotations"][0]["category_id"] = content["annotations"][0]["category_id"] % 10 + 1
    write_json(path, content)
    fails(root, "coco", "differs from its manifest.json", "instances_train2017.json")


def test_ade20k_faults(copy_demo: Callable[[str], Path]) -> None:
    root = copy_demo("ade20k")
    path = root / "annotations/validation/ADE_val_00000002.png"
    good = np.asarray(Image.open(path))

    bad = good.copy()
    bad[3, 4] = 12
    Image.fromarray(bad).save(path)
    fails(root, "ade20k", path.name, "label 12", "11")

    Image.fromarray(good[:50]).save(path)
    fails(root, "ade20k", path.name, "96x50", "96x96")

    Image.fromarray(good).convert("RGB").save(path)
    fails(root, "ade20k", path.name, "RGB")

    path.unlink()
    remake(root)
    fails(root, "ade20k", "ADE_val_00000002", "no label map")

    Image.fromarray(good).save(path)
    (root / "images/validation/ADE_val_00000002.jpg").unlink()
    remake(root)
    fails(root, "ade20k", "ADE_val_00000002", "no image")


def test_large_data_sets_are_checked_by_size_only(
    copy_demo: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.data.checks.FULL_CHECK_LIMIT", 10)
    root = copy_demo("imagenet")
    path = next((root / "val/digit_2").iterdir())
    data = path.read_bytes()
    path.write_bytes(bytes(len(data)))
    assert check_dataset(root, "imagenet", 10)["checked"] == "sizes"
    path.write_bytes(data[:-1])
    fails(root, "imagenet", path.name, "differs")
