"""Pictures of predictions. Each function gives a matplotlib figure and reads only stage outputs."""

import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from pipelines.data.layout import IMAGES, LAYOUTS
from pipelines.results.plots import COLORS
from pipelines.results.scores import (
    calibration,
    result_kinds,
    worst_detections,
    worst_segmentations,
)

COCO_LAYOUT, ADE20K_LAYOUT = LAYOUTS["coco"], LAYOUTS["ade20k"]
SHOWN_SCORE = 0.5
"""Detections below are not drawn."""


def confusion(path: Path) -> Figure:
    """Confusion matrix from a CSV of (actual, predicted) pairs, in percent of each row."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    with path.open() as file:
        for row in csv.DictReader(file):
            counts[row["actual"], row["predicted"]] += 1
    names = sorted({name for pair in counts for name in pair})
    matrix = np.array([[counts[a, p] for p in names] for a in names], dtype=float)
    share = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = max(4.0, 0.5 * len(names))
    figure, axis = plt.subplots(figsize=(side, side))
    axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axis.grid(False)
    axis.set_xticks(range(len(names)), names, rotation=90)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="predicted", ylabel="actual")
    if len(names) <= 20:
        for y, x in np.argwhere(matrix > 0):
            color = "white" if share[y, x] > 50 else "black"
            axis.text(
                x, y, f"{matrix[y, x]:.0f}", ha="center", va="center", color=color, fontsize=7
            )
    return figure


def detections(data: Path, results: Path, count: int, worst: bool = False) -> Figure:
    """Validation images: truth in the upper row, predictions in the lower.

    Spread over the set, or the `worst` of it.
    """
    from pycocotools.coco import COCO

    truth_file = data / COCO_LAYOUT.annotations["val"]
    truth = COCO(str(truth_file))
    predicted = defaultdict(list)
    kind = result_kinds(results)[-1]
    for item in json.loads((results / f"coco.{kind}.json").read_text()):
        if item["score"] >= SHOWN_SCORE:
            predicted[item["image_id"]].append(item)
    boxes = defaultdict(list)
    for item in json.loads((results / "coco.bbox.json").read_text()):
        boxes[item["image_id"], item["category_id"], round(item["score"], 4)].append(item["bbox"])
    chosen = (
        worst_detections(truth_file, results, SHOWN_SCORE, count)
        if worst
        else _spread(sorted(truth.getImgIds()), count)
    )
    images = truth.loadImgs(chosen)
    figure, axes = plt.subplots(2, len(images), figsize=(2.2 * len(images), 4.7), squeeze=False)
    for column, image in enumerate(images):
        pixels = np.asarray(
            Image.open(data / COCO_LAYOUT.images["val"] / image["file_name"]).convert("RGB")
        )
        annotations = truth.loadAnns(truth.getAnnIds(imgIds=image["id"]))
        for axis, items in (
            (axes[0][column], annotations),
            (axes[1][column], predicted[image["id"]]),
        ):
            _plain(axis, pixels)
            for item in items:
                crowd = item.get("iscrowd", 0)
                color = (1.0, 1.0, 1.0) if crowd else COLORS[item["category_id"] % len(COLORS)]
                corners = item.get("bbox")
                if kind == "segm":
                    mask = truth.annToMask(item | {"image_id": image["id"]}).astype(bool)
                    if not mask.any():
                        continue
                    _overlay(axis, mask, color)
                    corners = corners or _box(mask)
                x, y, w, h = corners
                key = (image["id"], item["category_id"], round(item.get("score", -1), 4))
                if boxes.get(key):
                    x, y, w, h = boxes[key][0]
                axis.add_patch(Rectangle((x, y), w, h, fill=False, color=color, linewidth=1.2))
                name = "crowd" if crowd else truth.cats[item["category_id"]]["name"]
                label = name + (f" {item['score']:.2f}" if "score" in item else "")
                box = {"facecolor": color, "alpha": 0.9, "pad": 0.8, "linewidth": 0}
                axis.text(
                    x, y - 2, label, fontsize=5.5, color="white" if not crowd else "black", bbox=box
                )
    axes[0][0].set_ylabel("truth")
    axes[1][0].set_ylabel(f"predicted, score ≥ {SHOWN_SCORE}")
    figure.tight_layout()
    return figure


def segmentations(
    data: Path, results: Path, classes: Sequence[str], count: int, worst: bool = False
) -> Figure:
    """Validation images in the first row, their truth and the predicted labels below.

    Spread over the set, or the `worst` of it.
    """
    palette = [(0.0, 0.0, 0.0), *COLORS[: len(classes)]]
    if len(palette) <= len(classes):
        palette += [plt.get_cmap("hsv")(i / len(classes))[:3] for i in range(len(classes))]
    if "background" in classes:
        palette[classes.index("background") + 1] = (0.93, 0.93, 0.93)
    colors = ListedColormap(palette[: len(classes) + 1])
    folder, photographs = data / "annotations/validation", data / ADE20K_LAYOUT.images["val"]
    images = {file.stem: file for file in photographs.iterdir()}
    if worst:
        names = worst_segmentations(folder, results, len(classes), count)
        chosen = [folder / name for name in names]
    else:
        chosen = _spread(sorted(folder.glob("*.png")), count)
    figure, axes = plt.subplots(3, len(chosen), figsize=(2.2 * len(chosen), 6.8), squeeze=False)
    for column, file in enumerate(chosen):
        image = Image.open(images[file.stem]).convert("RGB")
        _plain(axes[0][column], np.asarray(image))
        predicted = np.asarray(Image.open(results / file.name))
        for axis, labels in (
            (axes[1][column], np.asarray(Image.open(file))),
            (axes[2][column], predicted),
        ):
            _plain(
                axis,
                labels,
                cmap=colors,
                vmin=-0.5,
                vmax=len(classes) + 0.5,
                interpolation="nearest",
            )
    for row, label in enumerate(("image", "truth", "predicted")):
        axes[row][0].set_ylabel(label)
    if len(classes) <= 20:
        handles = [Patch(color=colors(i + 1), label=name) for i, name in enumerate(classes)]
        figure.legend(handles=handles, loc="lower center", ncols=11, frameon=False, fontsize=7)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure


def mistakes(images: Any, predictions: Path, count: int) -> Figure:
    """The surest wrong answers of a classifier: the image, what it is and what it was taken for.

    Args:
        images: the validation images without a transform, in the order of `predictions`.
        predictions: `predictions.csv`, see `scores.write_predictions`.
    """
    with predictions.open() as file:
        rows = list(csv.DictReader(file))
    wrong = [i for i, row in enumerate(rows) if row["class"] != row["predicted_1"]]
    wrong = sorted(wrong, key=lambda i: -float(rows[i]["probability_1"]))[:count]
    columns = max(1, min(len(wrong), 8))
    lines = max(1, -(-len(wrong) // columns))
    figure, axes = plt.subplots(lines, columns, figsize=(1.7 * columns, 2 * lines), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, index in zip(axes.flat, wrong, strict=False):
        row = rows[index]
        axis.imshow(np.asarray(images[index][0]))
        sure = f"({100 * float(row['probability_1']):.0f}%)"
        axis.set_title(f"{row['class']}, taken for\n{row['predicted_1']} {sure}", fontsize=7)
    if not wrong:
        figure.suptitle("no image is classified wrongly")
    figure.tight_layout()
    return figure


def reliability(predictions: Path) -> Figure:
    """How often the classifier is right when it is so sure, over how many images are so."""
    with predictions.open() as file:
        rows = list(csv.DictReader(file))
    confidence = np.array([float(row["probability_1"]) for row in rows])
    right = np.array([row["class"] == row["predicted_1"] for row in rows])
    bins, error = calibration(confidence, right)
    sure = [100 * row["confidence"] for row in bins]
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(4.5, 4.8), sharex=True, height_ratios=(3, 1)
    )
    above.plot([0, 100], [0, 100], "--", color="0.6", label="as sure as right")
    above.plot(sure, [100 * row["accuracy"] for row in bins], "o-", label="this classifier")
    above.set(ylabel="right, %", title=f"expected calibration error {error:.1f}%")
    above.legend(frameon=False, fontsize=8)
    below.bar(sure, [row["images"] for row in bins], width=5)
    below.set(xlabel="confidence, %", ylabel="images", xlim=(0, 100))
    figure.tight_layout()
    return figure


def attention(weights: Path, data: Path, count: int = 3) -> Figure | None:
    """What the first ELSA layer of the pretrained model looks at, on detection scenes.

    The first column marks three query points, the others show the attention over each point's
    window, averaged over heads and scaled to its largest value. None for a model without ELSA.
    """
    import torch
    from torchvision.transforms.functional import normalize, to_tensor

    from elsa import ELSA
    from pipelines.train.models import load_classifier

    model = load_classifier(weights).eval()
    found = next(((n, m) for n, m in model.named_modules() if isinstance(m, ELSA)), None)
    if found is None:
        return None
    name, layer = found
    seen: list[torch.Tensor] = []
    handle = layer.attn_drop.register_forward_hook(lambda _, __, output: seen.append(output))
    every = (data / COCO_LAYOUT.images["val"]).iterdir()
    files = _spread(sorted(f for f in every if f.suffix.lower() in IMAGES), count)
    figure, axes = plt.subplots(count, 4, figsize=(9, 2.3 * count), squeeze=False)
    config: Any = model.pretrained_cfg
    for row, file in enumerate(files):
        image = Image.open(file).convert("RGB")
        pixels = np.asarray(image)
        with torch.inference_mode():
            model(normalize(to_tensor(image), config["mean"], config["std"])[None])
        maps = seen.pop()[0].mean(0).float()  # (k*k, H, W)
        height, width = maps.shape[1:]
        scale = pixels.shape[0] / height
        edges = _edges(pixels, height, width)
        _plain(axes[row][0], pixels)
        for column, (y, x) in enumerate(_queries(edges), start=1):
            kernel, reach = layer.kernel_size, layer.kernel_size // 2 * layer.dilation
            window = maps[:, y, x].reshape(kernel, kernel)
            heat = np.zeros((height + 2 * reach, width + 2 * reach))
            heat[y : y + 2 * reach + 1 : layer.dilation, x : x + 2 * reach + 1 : layer.dilation] = (
                window
            )
            heat = heat[reach : reach + height, reach : reach + width]
            _plain(axes[row][column], pixels)
            shown = np.kron(heat / max(heat.max(), 1e-9), np.ones((int(scale), int(scale))))
            axes[row][column].imshow(shown, cmap="magma", alpha=0.75 * (shown > 0))
            color = COLORS[column]
            for axis in (axes[row][0], axes[row][column]):
                axis.plot(
                    (x + 0.5) * scale, (y + 0.5) * scale, "o", ms=6, mfc="none", mec=color, mew=2
                )
    handle.remove()
    for column, title in enumerate(("queries", "query 1", "query 2", "query 3")):
        axes[0][column].set_title(title)
    figure.suptitle(
        f"{name}: kernel {layer.kernel_size}, {layer.num_heads} heads", y=1.0, fontsize=9
    )
    figure.tight_layout()
    return figure


def _edges(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Gradient magnitude of the image at the size of the feature map."""
    grey = np.asarray(Image.fromarray(pixels).convert("L").resize((width, height)), dtype=float)
    return np.hypot(*np.gradient(grey))


def _queries(edges: np.ndarray) -> list[tuple[int, int]]:
    """The three strongest edges that are well apart."""
    points: list[tuple[int, int]] = []
    left = edges.copy()
    left[:2], left[-2:], left[:, :2], left[:, -2:] = -1, -1, -1, -1
    apart = max(2, min(edges.shape) // 5)
    for _ in range(3):
        y, x = np.unravel_index(int(left.argmax()), left.shape)
        points.append((int(y), int(x)))
        left[max(0, y - apart) : y + apart + 1, max(0, x - apart) : x + apart + 1] = -1
    return points


def _spread(items: list[Any], count: int) -> list[Any]:
    """`count` items, evenly over the list."""
    count = min(count, len(items))
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    ys, xs = np.where(mask)
    return xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1


def _overlay(axis: Any, mask: np.ndarray, color: Any) -> None:
    pixels = np.zeros((*mask.shape, 4))
    pixels[mask] = (*to_rgb(color), 0.55)
    axis.imshow(pixels)


def _plain(axis: Any, pixels: np.ndarray, **options: Any) -> None:
    axis.imshow(pixels, **options)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
