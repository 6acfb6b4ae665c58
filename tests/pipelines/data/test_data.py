"""The demo data: repeatable, held out, readable by the public tools, and checked."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from pipelines.data.checks import check_dataset
from pipelines.data.errors import DataError
from pipelines.data.demo import draw as demo
from pipelines.data.demo.draw import sources
from pipelines.data.files import write_json
from pipelines.data.manifest import data_digest, file_entry

PARAMS = SimpleNamespace(
    seed=3,
    digits_per_class=10,
    image_size=32,
    train_variants=2,
    scene_size=96,
    train_scenes=14,
    val_scenes=8,
    max_digits=5,
)
NUM_CLASSES = {"imagenet": 10, "coco": 10, "ade20k": 11}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    demo.prepare(PARAMS, root)
    return root


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    def of(kind: str) -> Path:
        return Path(shutil.copytree(made / kind, tmp_path / kind))

    return of


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# ---- making --------------------------------------------------------------------------------


def test_same_bytes_however_the_work_is_split(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_SHARD", 5)
    shards = demo.shards(PARAMS)
    assert len(shards) > len(demo.DATASETS) * len(demo.SPLITS)
    records = [r for shard in reversed(shards) for r in demo.render_shard(shard, tmp_path)]
    demo.finish(PARAMS, tmp_path, records)
    first, second = tree(made), tree(tmp_path)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_another_seed_gives_other_images(made: Path, tmp_path: Path) -> None:
    changed = SimpleNamespace(**{**vars(PARAMS), "seed": 4})
    shard = next(s for s in demo.shards(changed) if s.dataset == "coco")
    record = demo.render_shard(shard, tmp_path)[0]
    assert (tmp_path / "coco" / record.image).read_bytes() != (
        made / "coco" / record.image
    ).read_bytes()


def test_finish_wants_every_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 records"):
        demo.finish(PARAMS, tmp_path, [])


def test_nothing_of_validation_is_in_training(made: Path) -> None:
    digits: dict[str, set[int]] = {"train": set(), "val": set()}
    photos: dict[str, set[str]] = {"train": set(), "val": set()}
    for kind in demo.DATASETS:
        found = read(made / kind / "sources.json")
        counts = read(made / kind / "manifest.json")["counts"]
        for split in demo.SPLITS:
            assert len(found[split]) == counts[split]
            for origin in found[split].values():
                digits[split].update(origin["digits"])
                photos[split].add(origin["photo"])
    assert all(digits.values())
    assert not digits["train"] & digits["val"]
    assert all(photos.values())
    assert not photos["train"] & photos["val"]
    # The indices stand for different pictures: no two digits are equal.
    images, _ = sources.load_digits()
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


def test_default_sizes_hold_out_a_fifth_of_the_digits_and_a_quarter_of_the_photographs() -> None:
    pools = {split: sources.digit_pool(0, 500, split) for split in demo.SPLITS}
    assert [len(pool) for pool in pools["train"]] == [400] * 10
    assert [len(pool) for pool in pools["val"]] == [100] * 10
    assert not {i for p in pools["train"] for i in p} & {i for p in pools["val"] for i in p}
    _, labels = sources.load_digits()
    assert all(labels[i] == c for c, pool in enumerate(pools["val"]) for i in pool)
    assert len(sources.photos("val")) * 4 == len(sources.PHOTOS)
    assert all(min(sources.load_photo(photo).shape[:2]) >= 300 for photo in sources.PHOTOS)


def test_manifest_and_cards(made: Path) -> None:
    for kind in demo.DATASETS:
        manifest = read(made / kind / "manifest.json")
        assert manifest["dataset"] == kind
        assert manifest["digest"] == data_digest(manifest["files"], manifest["classes"])
        on_disk = {p.relative_to(made / kind).as_posix() for p in (made / kind).rglob("*.*")}
        assert on_disk == {*manifest["files"], "manifest.json"}
        facts = read(made / "cards" / f"{kind}.json")
        assert facts["splits"]["train"]["images"] == manifest["counts"]["train"]
        assert (made / "cards" / f"{kind}.md").read_text().startswith("# ")
        with Image.open(made / "cards" / f"{kind}.png") as sheet:
            sheet.load()
    balance = read(made / "cards" / "imagenet.json")["splits"]["train"]["digits_per_class"]
    assert set(balance.values()) == {16}


# ---- layouts -------------------------------------------------------------------------------


def test_imagenet_read_by_torchvision(made: Path) -> None:
    from torchvision.datasets import ImageFolder

    for split, count in (("train", 160), ("val", 20)):
        folder = ImageFolder(str(made / "imagenet" / split))
        assert folder.classes == [f"digit_{i}" for i in range(10)]
        assert len(folder) == count
        image, label = folder[count - 1]
        assert (image.size, label) == ((32, 32), 9)


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_read_by_pycocotools(made: Path, split: str) -> None:
    folder = made / "coco"
    coco = COCO(str(folder / f"annotations/instances_{split}2017.json"))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(demo.DIGIT_CLASSES)
    crowds = 0
    for info in coco.loadImgs(coco.getImgIds()):
        assert len(Path(info["file_name"]).stem) == 12
        with Image.open(folder / f"{split}2017" / info["file_name"]) as image:
            assert image.size == (info["width"], info["height"]) == (96, 96)
        covered = np.zeros((96, 96), dtype=int)
        found = coco.loadAnns(coco.getAnnIds(imgIds=info["id"]))
        assert 3 <= sum(not a["iscrowd"] for a in found) <= PARAMS.max_digits
        for annotation in found:
            mask = coco.annToMask(annotation)
            covered += mask
            assert annotation["area"] == mask.sum() > 0
            rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            tight = [cols[0], rows[0], np.ptp(cols) + 1, np.ptp(rows) + 1]
            assert annotation["bbox"] == tight
            assert isinstance(
                annotation["segmentation"]["counts"], list if annotation["iscrowd"] else str
            )
            crowds += annotation["iscrowd"]
        assert covered.max() == 1, "visible masks of one image must not overlap"
    assert crowds >= 1


def test_digits_overlap_but_stay_visible_enough() -> None:
    shard = next(s for s in demo.shards(PARAMS) if s.dataset == "coco" and s.split == "train")
    shares = [
        instance.mask.sum() / instance.full.sum()
        for index in range(12)
        for instance in demo._scene(shard, index).instances
    ]
    assert min(shares) >= 0.5
    assert sum(share < 1 for share in shares) >= 3


@pytest.mark.parametrize("first", [True, False])
def test_run_lengths_are_those_of_coco(first: bool) -> None:
    mask = np.random.default_rng(0).random((9, 7)) < 0.4
    mask[0, 0], mask[-1, -1] = first, not first
    code = {"size": [9, 7], "counts": demo._run_lengths(mask)}
    assert (coco_mask.decode(coco_mask.frPyObjects(code, 9, 7)) == mask).all()


def test_coco_read_by_mmdet(made: Path) -> None:
    from mmdet.datasets import CocoDataset
    from mmdet.utils import register_all_modules

    register_all_modules()
    path = "annotations/instances_train2017.json"
    dataset = CocoDataset(
        data_root=str(made / "coco"),
        ann_file=path,
        data_prefix={"img": "train2017/"},
        metainfo={"classes": demo.DIGIT_CLASSES},
        pipeline=[
            {"type": "LoadImageFromFile"},
            {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
        ],
    )
    assert len(dataset) == PARAMS.train_scenes
    annotations = read(made / "coco" / path)["annotations"]
    for i in range(len(dataset)):
        item = dataset[i]
        mine = [a for a in annotations if a["image_id"] == item["img_id"]]
        assert len(mine) == len(item["instances"])
        areas = item["gt_masks"].masks.sum((1, 2))
        assert sorted(areas) == sorted(a["area"] for a in mine)
        assert item["gt_ignore_flags"].sum() == sum(a["iscrowd"] for a in mine)


def test_ade20k_read_by_mmseg(made: Path) -> None:
    from mmseg.datasets import BaseSegDataset
    from mmseg.utils import register_all_modules

    register_all_modules()
    seen: set[int] = set()
    for split, count in (("training", PARAMS.train_scenes), ("validation", PARAMS.val_scenes)):
        dataset = BaseSegDataset(
            data_root=str(made / "ade20k"),
            data_prefix={"img_path": f"images/{split}", "seg_map_path": f"annotations/{split}"},
            img_suffix=".jpg",
            seg_map_suffix=".png",
            reduce_zero_label=True,
            metainfo={"classes": demo.CLASSES["ade20k"]},
            pipeline=[{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}],
        )
        assert len(dataset) == count
        for i in range(count):
            item = dataset[i]
            assert item["img"].shape[:2] == item["gt_seg_map"].shape == (96, 96)
            seen.update(np.unique(item["gt_seg_map"]).tolist())
    assert seen == {*range(11), 255}


# ---- checks --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", demo.DATASETS)
def test_whole_data_passes(made: Path, kind: str) -> None:
    size = PARAMS.image_size if kind == "imagenet" else PARAMS.scene_size
    summary = check_dataset(made / kind, kind, NUM_CLASSES[kind], size)
    assert summary["checked"] == "content"
    assert summary["digest"] == read(made / kind / "manifest.json")["digest"]
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


def test_half_prepared(copy: Callable[[str], Path]) -> None:
    root = copy("imagenet")
    (root / "manifest.json").unlink()
    fails(root, "imagenet", "half prepared", "manifest.json")


def test_broken_manifest(copy: Callable[[str], Path]) -> None:
    root = copy("imagenet")
    (root / "manifest.json").write_text('{"dataset": "imagenet", ')
    fails(root, "imagenet", "manifest.json", "not valid JSON")
    (root / "manifest.json").write_text('{"dataset": "imagenet", "classes": []}')
    fails(root, "imagenet", "manifest.json", "'counts'")


def test_another_kind(made: Path) -> None:
    fails(made / "coco", "ade20k", "'coco'", "'ade20k'")
    with pytest.raises(ValueError, match="allowed: imagenet"):
        check_dataset(made / "coco", "voc", 10)


def test_class_count_differs(made: Path) -> None:
    fails(made / "imagenet", "imagenet", "10 classes", "num_classes is 7", num_classes=7)


def test_image_size_differs(made: Path) -> None:
    fails(made / "coco", "coco", "96x96", "160x160", image_size=160)


def test_missing_files(copy: Callable[[str], Path]) -> None:
    root = copy("ade20k")
    names = sorted((root / "images/training").iterdir())[:4]
    for path in names:
        path.unlink()
    fails(root, "ade20k", "4 file(s) are missing", f"images/training/{names[0].name}")
    shutil.rmtree(root / "images/training")
    fails(root, "ade20k", "no folder images/training")


def test_file_that_nobody_made(copy: Callable[[str], Path]) -> None:
    root = copy("imagenet")
    source = next((root / "train/digit_0").iterdir())
    shutil.copy(source, root / "train/digit_1/extra.JPEG")
    fails(root, "imagenet", "train/digit_1/extra.JPEG", "not in manifest.json")


@pytest.mark.parametrize("kind", demo.DATASETS)
def test_truncated_image(copy: Callable[[str], Path], kind: str) -> None:
    root = copy(kind)
    path = next(p for p in sorted(root.rglob("*.*")) if p.suffix.lower() in (".jpg", ".jpeg"))
    path.write_bytes(path.read_bytes()[:300])
    fails(root, kind, path.name, "cannot be decoded", "300 bytes")


def test_replaced_image(copy: Callable[[str], Path]) -> None:
    root = copy("imagenet")
    one, other = sorted((root / "val/digit_2").iterdir())[:2]
    shutil.copy(one, other)
    fails(root, "imagenet", "1 file(s) differs", other.name)


def test_edited_digest(copy: Callable[[str], Path]) -> None:
    root = copy("imagenet")
    write_json(root / "manifest.json", read(root / "manifest.json") | {"digest": "0" * 64})
    fails(root, "imagenet", "its own digest")


def test_class_folder_missing(copy: Callable[[str], Path]) -> None:
    root = copy("imagenet")
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
    copy: Callable[[str], Path], edit: Callable[[Any], Any], words: list[str]
) -> None:
    root = copy("coco")
    path = root / "annotations/instances_train2017.json"
    content = read(path)
    edit(content)
    write_json(path, content)
    fails(root, "coco", "instances_train2017.json", *words)
    remake(root)  # also when the manifest agrees with the faulty file
    fails(root, "coco", "instances_train2017.json", *words)


def test_coco_annotations_cut_short(copy: Callable[[str], Path]) -> None:
    root = copy("coco")
    path = root / "annotations/instances_val2017.json"
    path.write_text(path.read_text()[:1000])
    fails(root, "coco", "instances_val2017.json", "not valid JSON")
    path.unlink()
    fails(root, "coco", "are missing: annotations/instances_val2017.json")
    remake(root)
    fails(root, "coco", "no annotations/instances_val2017.json")


def test_coco_harmless_looking_edit_is_found_by_the_digest(copy: Callable[[str], Path]) -> None:
    root = copy("coco")
    path = root / "annotations/instances_train2017.json"
    content = read(path)
    content["annotations"][0]["category_id"] = content["annotations"][0]["category_id"] % 10 + 1
    write_json(path, content)
    fails(root, "coco", "differs from its manifest.json", "instances_train2017.json")


def test_ade20k_faults(copy: Callable[[str], Path]) -> None:
    root = copy("ade20k")
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
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.data.checks.FULL_CHECK_LIMIT", 10)
    root = copy("imagenet")
    path = next((root / "val/digit_2").iterdir())
    data = path.read_bytes()
    path.write_bytes(bytes(len(data)))
    assert check_dataset(root, "imagenet", 10)["checked"] == "sizes"
    path.write_bytes(data[:-1])
    fails(root, "imagenet", path.name, "differs")
