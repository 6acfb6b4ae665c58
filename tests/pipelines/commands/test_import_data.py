"""`elsa import`: the demo's scenes, written in other formats by supervision, come back the same."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
from PIL import Image
from pycocotools.coco import COCO

from pipelines.commands.finetune import look
from pipelines.commands.import_data import Options, import_data
from pipelines.data.errors import DataError
from pipelines.data.layout import LAYOUTS

SPLITS = ("train", "val")
LAYOUT = LAYOUTS["coco"]


@pytest.fixture(scope="module")
def scenes(tiny_data: Path) -> dict[str, sv.DetectionDataset]:
    """The objects whose masks are in one piece: VOC and YOLO make an object of each piece."""
    place, found = tiny_data / "coco", {}
    for split in SPLITS:
        images, notes = place / LAYOUT.images[split], place / LAYOUT.annotations[split]
        found[split] = sv.DetectionDataset.from_coco(str(images), str(notes), True)
        for name, one in found[split].annotations.items():
            whole = [len(sv.mask_to_polygons(mask)) == 1 for mask in one.mask]
            found[split].annotations[name] = one[np.array(whole)]
    return found


def expected(dataset: sv.DetectionDataset) -> dict[str, list[tuple]]:
    """As `objects`."""
    found = {}
    for name, one in dataset.annotations.items():
        boxes = one.xyxy - np.pad(one.xyxy[:, :2], ((0, 0), (2, 0)))
        rows = zip(one.class_id, boxes, one.mask, strict=True)
        values = [(dataset.classes[c], *map(float, box), int(mask.sum())) for c, box, mask in rows]
        if values:
            found[Path(name).stem] = sorted(values)
    return found


def objects(place: Path, split: str) -> dict[str, list[tuple]]:
    """Class, box and area of the mask of all objects, by the stem of their image."""
    truth, found = COCO(str(place / LAYOUT.annotations[split])), defaultdict(list)
    for one in truth.loadAnns(truth.getAnnIds()):
        name = Path(truth.imgs[one["image_id"]]["file_name"]).stem
        mask = int(truth.annToMask(one).sum()) if one.get("segmentation") else 0
        found[name].append((truth.cats[one["category_id"]]["name"], *one["bbox"], mask))
    return {name: sorted(values) for name, values in found.items()}


def written(kind: str, scenes: dict[str, sv.DetectionDataset], folder: Path) -> tuple[Path, str]:
    """The source in the format, and what `--val` is."""
    for split, dataset in scenes.items():
        if kind == "yolo":
            place, yaml = folder / split, str(folder / f"{split}.yaml")
            dataset.as_yolo(str(place / "images"), str(place / "labels"), yaml)
        elif kind == "voc":
            place = folder / split
            dataset.as_pascal_voc(str(place / "JPEGImages"), str(place / "Annotations"))
        else:
            dataset.as_labelme(str(folder / split), str(folder / split))
    if kind != "yolo":
        return folder / "train", str(folder / "val")
    names = json.dumps(scenes["train"].classes)
    text = f"train: train/images\nval: val/images\nnames: {names}\n"
    (folder / "data.yaml").write_text(text)
    return folder / "data.yaml", "0.2"


@pytest.mark.parametrize("kind", ["voc", "yolo", "labelme"])
def test_what_was_exported_comes_back(kind, scenes, tmp_path, capsys) -> None:
    source, val = written(kind, scenes, tmp_path / "source")
    target = tmp_path / "target"
    for _ in range(2):  # what was imported earlier is replaced
        import_data(kind, source, target, Options(val, 0, 0))
    assert f"Next: elsa finetune --detect {target}" in capsys.readouterr().out
    for split in SPLITS:
        before, after = expected(scenes[split]), objects(target, split)
        assert before.keys() == after.keys()
        for name in before:
            assert [one[0] for one in before[name]] == [one[0] for one in after[name]]
            boxes = [np.array([one[1:5] for one in found[name]]) for found in (before, after)]
            np.testing.assert_allclose(*boxes, atol=3)  # polygons of pixels are not the pixels
            for one, other in zip(before[name], after[name], strict=True):
                assert 0.9 * one[5] < other[5] <= one[3] * one[4] + 60  # holes are filled
        images = {f.stem for f in (target / LAYOUT.images[split]).iterdir()}
        assert images >= before.keys()
    seen = look("detect", target)
    there = {one[0] for scene in scenes.values() for v in expected(scene).values() for one in v}
    assert seen.masks
    assert seen.classes == (scenes["train"].classes if kind == "yolo" else sorted(there))


def test_what_labelme_calls_ignored_is_no_class(scenes, tmp_path) -> None:
    source, _ = written("labelme", scenes, tmp_path / "source")
    file = next(file for file in sorted(source.glob("*.json")))
    content = json.loads(file.read_text())
    content["shapes"][0]["label"] = "__ignore__"
    file.write_text(json.dumps(content))
    import_data("labelme", source, tmp_path / "target", Options("0.2", 0, 0))
    seen = look("detect", tmp_path / "target")
    assert "__ignore__" not in seen.classes
    every = [len(v) for split in SPLITS for v in objects(tmp_path / "target", split).values()]
    assert sum(every) == sum(len(v) for v in expected(scenes["train"]).values()) - 1


def test_a_share_is_split_the_same_each_time_and_tiles_keep_the_objects(scenes, tmp_path) -> None:
    source, _ = written("voc", scenes, tmp_path / "source")
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        import_data("voc", source, tmp_path / name, Options("0.25", seed, 0))
        found.append({f.name for f in (tmp_path / name / "val2017").iterdir()})
    assert found[0] == found[1] != found[2]
    count = len(found[0]) + len(list((tmp_path / "a/train2017").iterdir()))
    assert len(found[0]) == round(0.25 * count)
    record = json.loads((tmp_path / "a/import.json").read_text())
    assert (record["format"], record["val"], record["seed"]) == ("voc", "0.25", 0)

    import_data("voc", source, tmp_path / "tiled", Options("0.25", 0, 60))
    sizes = {Image.open(f).size for f in (tmp_path / "tiled/val2017").iterdir()}
    assert max(max(size) for size in sizes) <= 60
    truth = COCO(str(tmp_path / "tiled" / LAYOUT.annotations["val"]))
    for one in truth.loadAnns(truth.getAnnIds()):
        image, (x, y, w, h) = truth.imgs[one["image_id"]], one["bbox"]
        assert min(x, y) >= 0
        assert x + w <= image["width"] + 0.01
        assert y + h <= image["height"] + 0.01
        assert truth.annToMask(one).any()
    counts = json.loads((tmp_path / "tiled/import.json").read_text())["counts"]
    whole = record["counts"]["validation_objects"]
    assert counts["validation_objects"] + counts.get("validation_objects_left_out", 0) >= whole


def test_folders_of_classes_get_a_validation_set(tmp_path: Path) -> None:
    for name, count in (("cat", 10), ("dog", 5)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(count):  # the pipeline reads no TIFF
            kind = "tif" if i == 3 else "JPG"
            Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / f"{i}.{kind}")
    import_data("folders", tmp_path / "photos", tmp_path / "target", Options("0.2", 0, 0))
    for name, train, val in (("cat", 8, 2), ("dog", 4, 1)):
        parts = [{f.name for f in (tmp_path / "target" / s / name).iterdir()} for s in SPLITS]
        assert [len(part) for part in parts] == [train, val]
        assert not parts[0] & parts[1]
        assert "3.png" in parts[0] | parts[1]
    assert look("classify", tmp_path / "target").train == 12


@pytest.mark.parametrize(
    ("kind", "files", "val", "message"),
    [
        ("voc", {}, "0.2", "can't be split"),
        ("voc", {"a.xml": "<annotation", "a.png": None}, "0.2", "can't be read as voc"),
        ("yolo", {"data.yaml": "train: nowhere\nnames: [a]"}, "0.2", "there is no folder nowhere"),
        ("yolo", {"data.yaml": "train: [a, b]\nnames: [a]"}, "0.2", "Give one folder of images"),
        ("yolo", {"data.yaml": "[1"}, "0.2", "is no data.yaml"),
        ("yolo", {"data.yaml": "names: [a]"}, "0.2", "names no folder for train"),
        ("labelme", {"a.json": "{", "a.png": None}, "0.2", "can't be read as labelme"),
        ("folders", {}, "0.2", "has no folders, which would be the classes"),
        ("folders", {"cat/a.png": None}, "0.2", "class cat: 1 images can't be split"),
        ("folders", {"cat/a.png": None}, "2", "a share is between 0 and 1"),
        ("folders", {"cat/a.png": None}, "not there", "there is no such folder, and it is no"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_written(kind, files, val, message, tmp_path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, text in files.items():
        (source / name).parent.mkdir(exist_ok=True)
        if text is None:
            Image.new("RGB", (8, 8)).save(source / name)
        else:
            (source / name).write_text(text)
    place = source / "data.yaml" if kind == "yolo" else source
    with pytest.raises(DataError, match=message):
        import_data(kind, place, tmp_path / "target", Options(val, 0, 0))
    assert not (tmp_path / "target").exists()
    (tmp_path / "target").mkdir()
    with pytest.raises(DataError, match="exists and was not imported"):
        import_data(kind, place, tmp_path / "target", Options(val, 0, 0))


def test_a_source_that_is_not_there_is_told(tmp_path: Path) -> None:
    for kind in ("voc", "labelme", "folders"):
        with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
            import_data(kind, tmp_path / "nowhere", tmp_path / "target", Options("0.2", 0, 0))
