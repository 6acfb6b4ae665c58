"""Scores held to timm's, mmdet's and mmseg's own."""

import json
import shutil

import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmengine.structures import PixelData
from mmseg.evaluation import IoUMetric
from mmseg.structures import SegDataSample
from PIL import Image
from pycocotools import mask as coco_mask
from timm.utils import accuracy

from pipelines.results import scores


def test_classification_is_timms():
    random = torch.Generator().manual_seed(0)
    output = torch.randn(200, 12, generator=random)
    target = torch.randint(0, 11, (200,), generator=random)  # class 11 has no image
    top = output.softmax(1).topk(5)
    found = scores.classification(
        {
            "target": target.numpy(),
            "classes": top.indices.numpy(),
            "probabilities": top.values.numpy(),
            "loss": torch.nn.functional.cross_entropy(output, target, reduction="none").numpy(),
        },
        [f"c{i}" for i in range(12)],
    )
    top1, top5 = accuracy(output, target, topk=(1, 5))
    assert found.metrics["top1"] == pytest.approx(top1.item())
    assert found.metrics["top5"] == pytest.approx(top5.item())
    loss = torch.nn.functional.cross_entropy(output, target).item()
    assert found.metrics["loss"] == pytest.approx(loss)
    assert found.per_class[11] == {"class": "c11", "images": 0, "top1": None, "top5": None}
    of_3 = target == 3
    expected = accuracy(output[of_3], target[of_3])[0].item()
    assert found.per_class[3]["top1"] == pytest.approx(expected)
    wrong = int((output.argmax(1) != target).sum())
    assert sum(row["count"] for row in found.confusions) == wrong
    first = found.confusions[0]
    pair = (target == int(first["actual"][1:])) & (output.argmax(1) == int(first["predicted"][1:]))
    assert first["count"] == int(pair.sum()) == max(row["count"] for row in found.confusions)


def test_detection_is_mmdets(tiny_data, tmp_path):
    annotations = tiny_data / "coco/annotations/instances_val2017.json"
    content = json.loads(annotations.read_text())
    classes = [category["name"] for category in content["categories"]]
    labels = {category["id"]: i for i, category in enumerate(content["categories"])}
    metric = CocoMetric(
        str(annotations), metric=["bbox", "segm"], outfile_prefix=str(tmp_path / "coco")
    )
    metric.dataset_meta = {"classes": classes}
    random = np.random.default_rng(0)
    for image in content["images"]:
        found = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes = np.array([a["bbox"] for a in found], dtype=np.float32)
        boxes[:, 2:] += boxes[:, :2]
        boxes += random.normal(0, 3, boxes.shape)  # near the truth, some too far from it
        masks = np.zeros((len(found), image["height"], image["width"]), dtype=bool)
        for mask, box in zip(masks, boxes.clip(0).astype(int), strict=True):
            mask[box[1] : box[3], box[0] : box[2]] = True
        guessed = [labels[a["category_id"]] for a in found]
        guessed[0] = (guessed[0] + 1) % len(classes)
        prediction = {
            "bboxes": torch.tensor(boxes),
            "scores": torch.tensor(random.random(len(found))),
            "labels": torch.tensor(guessed),
            "masks": [coco_mask.encode(np.asfortranarray(mask)) for mask in masks],
        }
        size = (image["height"], image["width"])
        sample = {"img_id": image["id"], "ori_shape": size, "pred_instances": prediction}
        metric.process({}, [sample])
    theirs = metric.evaluate(len(content["images"]))
    ours = scores.detection(annotations, tmp_path)
    compared = {k: v for k, v in theirs.items() if v >= 0}
    assert 0.05 < compared["coco/bbox_mAP"] < 0.95
    assert len(compared) >= 6
    for name, value in compared.items():
        assert round(ours.metrics[name.removeprefix("coco/")] / 100, 3) == value, name
    per_class = [row["bbox_mAP"] for row in ours.per_class if row["bbox_mAP"] is not None]
    assert np.mean(per_class) == pytest.approx(ours.metrics["bbox_mAP"])


def test_a_detector_of_boxes_is_scored_and_drawn_by_boxes(tiny_data, tmp_path):
    """With truth that has no masks either; the worst image is the one without a detection."""
    from pipelines.results.pictures import detections

    shutil.copytree(tiny_data / "coco", tmp_path / "coco")
    annotations = tmp_path / "coco/annotations/instances_val2017.json"
    content = json.loads(annotations.read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    annotations.write_text(json.dumps(content))
    missed = content["images"][1]["id"]
    keys = ("image_id", "category_id", "bbox")
    found = [
        {key: a[key] for key in keys} | {"score": 0.9}
        for a in content["annotations"]
        if a["image_id"] != missed
    ]
    (tmp_path / "coco.bbox.json").write_text(json.dumps(found))
    metrics = scores.detection(annotations, tmp_path).metrics
    assert 0 < metrics["bbox_mAP"] < 100
    assert not any(name.startswith("segm") for name in metrics)
    assert scores.worst_detections(annotations, tmp_path, 0.5, 1) == [missed]
    figure = detections(tmp_path / "coco", tmp_path, 2)
    figure.savefig(tmp_path / "boxes.png")
    assert [len(axis.patches) > 0 for axis in figure.axes].count(True) >= 3


def test_segmentation_is_mmsegs(tmp_path):
    random, classes = np.random.default_rng(0), ["sky", "tree", "road", "nowhere", "unseen"]
    metric = IoUMetric(iou_metrics=["mIoU"])
    metric.dataset_meta = {"classes": classes}
    for part in ("truth", "found"):
        (tmp_path / part).mkdir()
    for image in range(3):
        truth = random.integers(0, 4, (20, 30))  # 0 is ignored; `nowhere` is only predicted
        found = np.where(
            random.random(truth.shape) < 0.7, truth, random.integers(1, 5, truth.shape)
        )
        found[found == 0] = 2
        for part, values in (("truth", truth), ("found", found)):
            Image.fromarray(values.astype(np.uint8)).save(tmp_path / part / f"{image}.png")
        sample = SegDataSample()
        reduced = np.where(truth == 0, 255, truth - 1)  # as mmseg reads it
        sample.gt_sem_seg = PixelData(data=torch.tensor(reduced)[None])
        sample.pred_sem_seg = PixelData(data=torch.tensor(found - 1)[None])
        metric.process({}, [sample.to_dict()])
    theirs = metric.evaluate(3)
    ours = scores.segmentation(tmp_path / "truth", tmp_path / "found", classes)
    for name in ("mIoU", "mAcc", "aAcc"):
        assert round(ours.metrics[name], 2) == theirs[name], name
    assert ours.per_class[3]["IoU"] == 0
    assert ours.per_class[3]["Acc"] is None
    assert ours.per_class[4]["IoU"] is None
