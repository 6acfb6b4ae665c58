"""Evaluate a file that `elsa export` wrote, by the runner that lies beside it, on a validation set.

It writes what the task's own prediction writes, so that both are scored by the same code.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from elsa.run_exported import Exported
from pipelines.data.layout import IMAGES, LAYOUTS
from pipelines.data.masks import run_lengths
from pipelines.data.store import Dataset
from pipelines.errors import PipelineError

BATCH = 16
TOP = 5


def check_classes(exported: Exported, dataset: Dataset) -> None:
    """Check that the labels of the model mean those of the data, as far as their names say.

    Raises:
        PipelineError: the names are the same in another order.
    """
    ours, theirs = dataset.classes, tuple(exported.classes)
    if ours != theirs and sorted(ours) == sorted(theirs):
        raise PipelineError(
            f"{dataset.place} has the classes of the export in another order",
            "Give the data that the model was trained on",
        )


def predict(exported: Exported, dataset: Dataset, folder: Path) -> None:
    """Write the predictions for all validation images to a new folder."""
    folder.mkdir()
    write: dict[str, Callable[[Exported, Dataset, Path], None]] = {
        "classify": _classify,
        "detect": _detect,
        "segment": _segment,
    }
    write[exported.task](exported, dataset, folder)


def _classify(exported: Exported, dataset: Dataset, folder: Path) -> None:
    from pipelines.data.images import images_of  # with timm, which takes seconds

    images = images_of(dataset, "val")
    images.transform = exported.prepare
    logits, targets = [], []
    for start in _progress(range(0, len(images), BATCH)):
        batch = images.__getitems__(range(start, min(start + BATCH, len(images))))
        logits.append(exported.logits(np.stack([image for image, _ in batch])))
        targets += [target for _, target in batch]
    found, target = np.concatenate(logits).astype(np.float64), np.array(targets)
    found -= found.max(1, keepdims=True)
    logs = found - np.log(np.exp(found).sum(1, keepdims=True))
    order = np.argsort(-logs, axis=1, kind="stable")[:, :TOP]
    np.savez(
        folder / "predictions.npz",
        name=np.array(images.filenames()),
        target=target,
        classes=order,
        probabilities=np.exp(np.take_along_axis(logs, order, 1)),
        loss=-logs[np.arange(len(target)), target],
    )


def _detect(exported: Exported, dataset: Dataset, folder: Path) -> None:
    place, layout = Path(dataset.place), LAYOUTS["coco"]
    truth = json.loads((place / layout.annotations["val"]).read_text())
    numbers = {one["name"]: one["id"] for one in truth["categories"]}
    ids = [numbers[name] for name in dataset.classes]
    results: dict[str, list[dict[str, Any]]] = {"bbox": []}
    for image in _progress(truth["images"]):
        objects = exported.find(_picture(place / layout.images["val"] / image["file_name"]))
        for i, (box, label) in enumerate(zip(objects.boxes, objects.labels, strict=True)):
            left, top, right, bottom = map(float, box)
            one = {
                "image_id": image["id"],
                "category_id": ids[label],
                "score": float(objects.scores[i]),
            }
            sides = [left, top, right - left, bottom - top]
            results["bbox"].append({**one, "bbox": sides})
            if objects.masks is not None:
                mask = run_lengths(objects.masks[i])
                results.setdefault("segm", []).append({**one, "bbox": sides, "segmentation": mask})
    for kind, found in results.items():
        (folder / f"coco.{kind}.json").write_text(json.dumps(found))


def _segment(exported: Exported, dataset: Dataset, folder: Path) -> None:
    images = Path(dataset.place) / LAYOUTS["ade20k"].images["val"]
    files = sorted(file for file in images.iterdir() if file.suffix.lower() in IMAGES)
    for file in _progress(files):
        labels = exported.labels(_picture(file)) + 1  # as in ADE20K's files, 0 is no class
        kind = np.uint8 if labels.max() <= 255 else np.uint16
        Image.fromarray(labels.astype(kind)).save(folder / f"{file.stem}.png")


def _picture(file: Path) -> Image.Image:
    """As mmcv reads it: upright."""
    with Image.open(file) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _progress[T](items: Iterable[T]) -> Iterator[T]:
    from rich.progress import track

    yield from track(list(items), description="evaluate", transient=True)
