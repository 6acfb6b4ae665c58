"""Scores from saved predictions, with those of each class and what is taken for what.

The definitions are those of timm, pycocotools and mmseg; a test holds the numbers to theirs.
"""

import contextlib
import csv
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.train.scores import scores_of

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
    """Scores of `pipelines.train.evaluation.predict`'s arrays."""
    target, found = predictions["target"], predictions["classes"]
    right = found == target[:, None]
    count = np.bincount(target, minlength=len(classes))
    hits = np.bincount(target[right[:, 0]], minlength=len(classes))
    within = np.bincount(target[right.any(1)], minlength=len(classes))
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
    return Scores(scores_of(predictions), rows, _confusions(matrix, classes))


def detection(annotations: Path, folder: Path) -> Scores:
    """Scores of the COCO results in `folder`: `coco.bbox.json`, and `coco.segm.json` if there.

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
        for kind in result_kinds(folder):
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


def result_kinds(folder: Path) -> tuple[str, ...]:
    """The kinds of COCO results that a detector left: `bbox`, and `segm` if it predicts masks."""
    return tuple(kind for kind in ("bbox", "segm") if (folder / f"coco.{kind}.json").is_file())


def segmentation(truth: Path, masks: Path, classes: Sequence[str]) -> Scores:
    """Scores of the label images in `masks` against those in `truth`, both from 1; 0 is ignored."""
    files = sorted(truth.glob("*.png"))
    matrix = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for file in files:
        matrix += _confusion(file, masks / file.name, len(classes))
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


def calibration(
    confidence: np.ndarray, right: np.ndarray, bins: int = 15
) -> tuple[list[dict[str, float]], float]:
    """How often a classifier is right when it is so sure.

    Args:
        confidence: (N), probability of the first class, 0 to 1.
        right: (N), whether it was right.

    Returns:
        a row per bin that has images: mean `confidence` and `accuracy` (0 to 1), `images`; and the
        expected calibration error in percent (arXiv 1706.04599, equation 3).
    """
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    rows, error = [], 0.0
    for index in np.unique(place):
        inside = place == index
        row = {
            "confidence": float(confidence[inside].mean()),
            "accuracy": float(right[inside].mean()),
            "images": int(inside.sum()),
        }
        rows.append(row)
        error += row["images"] / len(confidence) * abs(row["accuracy"] - row["confidence"])
    return rows, 100 * error


def worst_detections(annotations: Path, folder: Path, threshold: float, count: int) -> list[int]:
    """Ids of the images with most errors per object: objects missed (no mask of their class with
    IoU 0.5, or no box where there are no masks), and predictions above `threshold` that match none.
    """
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
    predicted = defaultdict(list)
    kind = result_kinds(folder)[-1]
    for item in json.loads((folder / f"coco.{kind}.json").read_text()):
        if item["score"] >= threshold:
            predicted[item["image_id"]].append(item)
    errors = {}
    for image in truth.getImgIds():
        objects = truth.loadAnns(truth.getAnnIds(imgIds=image, iscrowd=False))
        items = sorted(predicted[image], key=lambda item: -item["score"])
        matched: set[int] = set()
        if objects and items:
            if kind == "segm":
                overlap = coco_mask.iou(
                    [item["segmentation"] for item in items],
                    [truth.annToRLE(o) for o in objects],
                    [0] * len(objects),
                )
            else:
                boxes = (np.array([o["bbox"] for o in them], float) for them in (items, objects))
                overlap = coco_mask.iou(*boxes, [0] * len(objects))
            for row, item in zip(overlap, items, strict=True):
                fitting = [
                    i
                    for i in np.argsort(-row)
                    if row[i] >= 0.5
                    and i not in matched
                    and objects[i]["category_id"] == item["category_id"]
                ]
                matched |= set(fitting[:1])
        wrong = len(objects) + len(items) - 2 * len(matched)
        errors[image] = wrong / max(len(objects), 1)
    return sorted(errors, key=lambda image: (-errors[image], image))[:count]


def worst_segmentations(truth: Path, masks: Path, classes: int, count: int) -> list[str]:
    """Names of the label images whose mean IoU over the classes in them is lowest."""
    found = {}
    for file in sorted(truth.glob("*.png")):
        matrix = _confusion(file, masks / file.name, classes)
        hits, actual = np.diag(matrix), matrix.sum(1)
        union = actual + matrix.sum(0) - hits
        if actual.any():
            found[file.name] = float((hits[actual > 0] / union[actual > 0]).mean())
    return sorted(found, key=lambda name: (found[name], name))[:count]


def _confusion(truth: Path, predicted: Path, classes: int) -> np.ndarray:
    """Pixels by (actual, predicted) class of one image; those with label 0 are left out."""
    actual = np.asarray(Image.open(truth)).astype(np.int64)
    found = np.asarray(Image.open(predicted)).astype(np.int64)
    known = actual > 0
    pairs = (actual[known] - 1) * classes + found[known] - 1
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def write_tables(folder: Path, scores: Scores) -> None:
    """`per_class.csv` and, if there is any, `confusions.csv`."""
    write_csv(folder / "per_class.csv", scores.per_class)
    if scores.confusions:
        write_csv(folder / "confusions.csv", scores.confusions)


def write_predictions(
    path: Path, predictions: Mapping[str, np.ndarray], classes: Sequence[str]
) -> None:
    """A CSV with a row per image: its class, and the likeliest ones with their probabilities."""
    keys = ("name", "target", "classes", "probabilities")
    rows = []
    for name, target, labels, probabilities in zip(*(predictions[k] for k in keys), strict=True):
        row = {"image": name, "class": classes[target]}
        for i, (label, probability) in enumerate(zip(labels, probabilities, strict=True), 1):
            row |= {f"predicted_{i}": classes[label], f"probability_{i}": f"{probability:.6f}"}
        rows.append(row)
    write_csv(path, rows)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


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
