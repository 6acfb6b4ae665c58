"""The demo data: repeatable, held out, readable by the public tools, and checked."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from pipelines.data.demo import draw as demo
from pipelines.data.demo import sources

from .conftest import PARAMS


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_same_bytes_however_the_work_is_split(
    demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_SHARD", 5)
    shards = demo.shards(PARAMS)
    assert len(shards) > len(demo.DATASETS) * len(demo.SPLITS)
    records = [r for shard in reversed(shards) for r in demo.render_shard(shard, tmp_path)]
    demo.finish(PARAMS, tmp_path, records)
    first, second = tree(demo_data), tree(tmp_path)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_another_seed_gives_other_images(demo_data: Path, tmp_path: Path) -> None:
    changed = SimpleNamespace(**{**vars(PARAMS), "seed": 4})
    shard = next(s for s in demo.shards(changed) if s.dataset == "coco")
    record = demo.render_shard(shard, tmp_path)[0]
    assert (tmp_path / "coco" / record.image).read_bytes() != (
        demo_data / "coco" / record.image
    ).read_bytes()


def test_finish_wants_every_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 records"):
        demo.finish(PARAMS, tmp_path, [])


def test_nothing_of_validation_is_in_training(demo_data: Path) -> None:
    digits: dict[str, set[int]] = {"train": set(), "val": set()}
    photos: dict[str, set[str]] = {"train": set(), "val": set()}
    for kind in demo.DATASETS:
        found = read(demo_data / kind / "sources.json")
        counts = read(demo_data / kind / "manifest.json")["counts"]
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


def test_manifest_and_cards(demo_data: Path) -> None:
    for kind in demo.DATASETS:
        manifest = read(demo_data / kind / "manifest.json")
        assert manifest["dataset"] == kind
        facts = read(demo_data / "cards" / f"{kind}.json")
        assert facts["splits"]["train"]["images"] == manifest["counts"]["train"]
        assert (demo_data / "cards" / f"{kind}.md").read_text().startswith("# ")
        with Image.open(demo_data / "cards" / f"{kind}.png") as sheet:
            sheet.load()
    balance = read(demo_data / "cards" / "imagenet.json")["splits"]["train"]["digits_per_class"]
    assert set(balance.values()) == {16}


def test_imagenet_read_by_torchvision(demo_data: Path) -> None:
    from torchvision.datasets import ImageFolder

    for split, count in (("train", 160), ("val", 20)):
        folder = ImageFolder(str(demo_data / "imagenet" / split))
        assert folder.classes == [f"digit_{i}" for i in range(10)]
        assert len(folder) == count
        image, label = folder[count - 1]
        assert (image.size, label) == ((32, 32), 9)


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_read_by_pycocotools(demo_data: Path, split: str) -> None:
    folder = demo_data / "coco"
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


def test_coco_read_by_mmdet(demo_data: Path) -> None:
    from mmdet.datasets import CocoDataset
    from mmdet.utils import register_all_modules

    register_all_modules()
    path = "annotations/instances_train2017.json"
    dataset = CocoDataset(
        data_root=str(demo_data / "coco"),
        ann_file=path,
        data_prefix={"img": "train2017/"},
        metainfo={"classes": demo.DIGIT_CLASSES},
        pipeline=[
            {"type": "LoadImageFromFile"},
            {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
        ],
    )
    assert len(dataset) == PARAMS.train_scenes
    annotations = read(demo_data / "coco" / path)["annotations"]
    for i in range(len(dataset)):
        item = dataset[i]
        mine = [a for a in annotations if a["image_id"] == item["img_id"]]
        assert len(mine) == len(item["instances"])
        areas = item["gt_masks"].masks.sum((1, 2))
        assert sorted(areas) == sorted(a["area"] for a in mine)
        assert item["gt_ignore_flags"].sum() == sum(a["iscrowd"] for a in mine)


def test_ade20k_read_by_mmseg(demo_data: Path) -> None:
    from mmseg.datasets import BaseSegDataset
    from mmseg.utils import register_all_modules

    register_all_modules()
    seen: set[int] = set()
    for split, count in (("training", PARAMS.train_scenes), ("validation", PARAMS.val_scenes)):
        dataset = BaseSegDataset(
            data_root=str(demo_data / "ade20k"),
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
