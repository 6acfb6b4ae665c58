"""Scores from saved predictions, with those of each class and what is taken for what.

The definitions are those of timm, pycocotools and mmseg; a test holds the numbers to theirs.
"""

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COCO_NAMES = (
    *("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l"),
    *("AR_1", "AR_10", "AR_100", "AR_s", "AR_m", "AR_l"),
)
"""COCO's table in its order, as mmdet names it; AR by the number of detections or object size."""


@dataclass(frozen=True)
class Scores:
    """Scores of one task, in percent."""

    metrics: dict[str, float]
    per_class: list[dict[str, Any]] = field(default_factory=list)
    """A row per class: `class`, its scores and how much of it there is."""
    confusions: list[dict[str, Any]] = field(default_factory=list)
    """What is taken for what, most often first: `actual`, `predicted`, `count`, `percent`."""


def classification(predictions: Mapping[str, np.ndarray], classes: Sequence[str]) -> Scores:
    """Scores of `pipelines.train.evaluation.predict`'s arrays; `loss` is in nats."""
    target, found = predictions["target"], predictions["classes"]
    right = found == target[:, None]
    count = np.bincount(target, minlength=len(classes))
    hits = np.bincount(target[right[:, 0]], minlength=len(classes))
    within = np.bincount(target[right.any(1)], minlength=len(classes))
    metrics = {
        "top1": 100 * float(right[:, 0].mean()),
        "top5": 100 * float(right.any(1).mean()),
        "loss": float(predictions["loss"].astype(np.float64).mean()),
    }
    rows = [
        {
            "class": name,
            "images": int(count[i]),
            "top1": _percent(hits[i], count[i]),
            "top5": _percent(within[i], count[i]),
        }
        for i, name in enumerate(classes)
    ]
    matrix = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(matrix, (target, found[:, 0]), 1)
    return Scores(metrics, rows, _confusions(matrix, classes))


def detection(annotations: Path, folder: Path) -> Scores:
    """Scores of the COCO results `coco.bbox.json` and `coco.segm.json` in `folder`.

    Where no object has a size, its score is left out.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    metrics: dict[str, float] = {}
    rows: dict[int, dict[str, Any]] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        for category in truth.loadCats(truth.getCatIds()):
            objects = len(truth.getAnnIds(catIds=category["id"], iscrowd=False))
            rows[category["id"]] = {"class": category["name"], "objects": objects}
        for kind in ("bbox", "segm"):
            found = json.loads((folder / f"coco.{kind}.json").read_text())
            for one in found if kind == "segm" else ():
                one.pop("bbox", None)  # an object's size is then that of its mask
            if not found:
                metrics |= {f"{kind}_{name}": 0.0 for name in COCO_NAMES}
                continue
            judge = COCOeval(truth, truth.loadRes(found), kind)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            for name, value in zip(COCO_NAMES, judge.stats.tolist(), strict=True):
                if value >= 0:
                    metrics[f"{kind}_{name}"] = 100 * value
            # thresholds, recalls, categories, sizes (0: all), detections (-1: 100 an image)
            precision = judge.eval["precision"][:, :, :, 0, -1]
            for i, category in enumerate(judge.params.catIds):
                known = precision[:, :, i][precision[:, :, i] > -1]
                rows[category][f"{kind}_mAP"] = 100 * float(known.mean()) if known.size else None
    return Scores(metrics, list(rows.values()))


def segmentation(truth: Path, masks: Path, classes: Sequence[str]) -> Scores:
    """Scores of the label images in `masks` against those in `truth`, both from 1; 0 is ignored."""
    matrix = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for file in sorted(truth.glob("*.png")):
        actual = np.asarray(Image.open(file)).astype(np.int64)
        predicted = np.asarray(Image.open(masks / file.name)).astype(np.int64)
        known = actual > 0
        pairs = (actual[known] - 1) * len(classes) + predicted[known] - 1
        matrix += np.bincount(pairs, minlength=matrix.size).reshape(matrix.shape)
    hits, actual, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    rows = [
        {
            "class": name,
            "pixels": int(actual[i]),
            "IoU": _percent(hits[i], actual[i] + predicted[i] - hits[i]),
            "Acc": _percent(hits[i], actual[i]),
        }
        for i, name in enumerate(classes)
    ]
    means = {
        mean: float(np.mean([row[key] for row in rows if row[key] is not None]))
        for mean, key in (("mIoU", "IoU"), ("mAcc", "Acc"))
    }
    metrics = {**means, "aAcc": 100 * float(hits.sum() / actual.sum())}
    return Scores(metrics, rows, _confusions(matrix, classes))


def _percent(part: Any, whole: Any) -> float | None:
    """None where there is nothing to score."""
    return 100 * float(part) / float(whole) if whole else None


def _confusions(matrix: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The off-diagonal of a matrix of counts (actual, predicted), largest first."""
    actual = matrix.sum(1)
    pairs = [(int(matrix[a, p]), a, p) for a, p in np.argwhere(matrix) if a != p]
    return [
        {
            "actual": classes[a],
            "predicted": classes[p],
            "count": count,
            "percent": 100 * count / int(actual[a]),
        }
        for count, a, p in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2]))
    ]
