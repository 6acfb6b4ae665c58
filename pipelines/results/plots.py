"""Plots of numbers: learning curves, and what a sweep's points score and cost."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLORS = [plt.get_cmap("tab10")(i)[:3] for i in range(10)] + [
    plt.get_cmap("Set2")(i)[:3] for i in range(8)
]
SCORES = (
    *("val_top1", "holdout_top1"),
    *("bbox_mAP", "bbox_mAP_50", "segm_mAP", "segm_mAP_50"),
    *("mIoU", "mIoU_ms_flip", "aAcc"),
)
"""What the lower row of the learning curves shows; DVC's and MLflow's plots have the rest."""
plt.rcParams.update(
    {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.dpi": 110,
        "font.size": 9,
        "grid.alpha": 0.3,
        "savefig.bbox": "tight",
    }
)


def read_curves(path: Path) -> dict[str, list[float]]:
    """Columns of a `curves.csv`; cells that are empty become NaN."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {key: [float(row[key] or "nan") for row in rows] for key in rows[0]} if rows else {}


def curves(stages: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Loss above, scores below, one column per stage, over epochs."""
    size = (3.6 * len(stages), 5)
    figure, axes = plt.subplots(2, len(stages), figsize=size, squeeze=False, sharex="col")
    for column, (stage, values) in enumerate(stages.items()):
        epochs = values["epoch"]
        losses = [k for k in values if k.endswith("loss") and "/" not in k]
        scores = [key for key in SCORES if key in values]
        for axis, keys, label in (
            (axes[0][column], losses, "loss"),
            (axes[1][column], scores, "%"),
        ):
            for key in keys:
                known = [(x, y) for x, y in zip(epochs, values[key], strict=True) if y == y]
                axis.plot(*zip(*known, strict=True), marker=".", label=key)
            axis.set(ylabel=label)
            if keys:
                axis.legend(fontsize=7, frameon=False)
        axes[0][column].set_title(stage)
        axes[1][column].set_xlabel("epoch")
        axes[1][column].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.tight_layout()
    return figure


COSTS = {
    "parameters": ("parameters, M", 1e-6),
    "gflops": ("GFLOPs per image, forward", 1.0),
    "images_per_second": ("training images/s", 1.0),
}
"""What a sweep's points cost: the name of the axis, and its scale."""


def tradeoff(rows: Sequence[Mapping[str, Any]], metric: str, cost: str) -> Figure:
    """A sweep's points: the metric with its 95% interval over one of `COSTS`."""
    name, scale = COSTS[cost]
    figure, axis = plt.subplots(figsize=(4.2, 3))
    for index, row in enumerate(rows):
        if row[cost] is not None:
            axis.errorbar(
                row[cost] * scale,
                row["mean"],
                row["ci95"] or 0,
                color=COLORS[index % len(COLORS)],
                marker="osD^vP*X"[index % 8],
                capsize=3,
                label=row["point"],
            )
    axis.set(xlabel=name, ylabel=f"{metric}, %")
    axis.locator_params(axis="x", nbins=5)
    if len(rows) <= 12:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=7, frameon=False)
    return figure


def factor(
    name: str, values: Sequence[Any], rows: Sequence[Mapping[str, Any]], metric: str
) -> Figure:
    """The metric with its 95% interval by the values of one parameter, and each seed's dot."""
    figure, axis = plt.subplots(figsize=(4.2, 3))
    measured = len(set(map(str, values))) > 6 and all(isinstance(v, int | float) for v in values)
    places = list(values) if measured else list(range(len(values)))
    for place, row in zip(places, rows, strict=True):
        axis.errorbar(place, row["mean"], row["ci95"] or 0, color=COLORS[0], marker="o", capsize=4)
        seeds = list(row["seeds"].values())
        axis.plot([place] * len(seeds), seeds, ".", color=COLORS[7], zorder=3)
    if not measured:
        shown = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in values]
        axis.set_xticks(places, ["\n".join(text.split(", ")) for text in shown])
        axis.set_xlim(-0.5, len(places) - 0.5)
    axis.set(xlabel=name, ylabel=f"{metric}, %")
    figure.tight_layout()
    return figure


def parallel(
    names: Sequence[str],
    points: Sequence[Mapping[str, Any]],
    scores: Sequence[float],
    metric: str,
) -> Figure:
    """Parallel coordinates: a line per point over one axis per parameter, and the metric last.

    Numbers are placed by value, anything else by its order; darker lines score higher.
    """
    figure, axis = plt.subplots(figsize=(1.5 + 1.7 * len(names), 3.6))
    columns: list[list[Any]] = [[point.get(name) for point in points] for name in names]
    heights: list[list[float]] = []
    for place, column in enumerate([*columns, list(scores)]):
        numbers = [v for v in column if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(numbers) == len(column) and len(set(numbers)) > 1:
            low, high = min(numbers), max(numbers)
            heights.append([(value - low) / (high - low) for value in numbers])
            ticks = {0.0: f"{low:.3g}", 1.0: f"{high:.3g}"}
        else:
            kinds = list(dict.fromkeys("none" if v is None else str(v) for v in column))
            at = {kind: i / max(len(kinds) - 1, 1) for i, kind in enumerate(kinds)}
            heights.append([at["none" if v is None else str(v)] for v in column])
            ticks = {height: kind for kind, height in at.items()}
        axis.axvline(place, color="#889", linewidth=0.8)
        for height, text in ticks.items():
            axis.text(place + 0.03, height, text, fontsize=7, va="bottom", zorder=4)
    shades = plt.get_cmap("viridis_r")
    for line, shade in zip(zip(*heights, strict=True), heights[-1], strict=True):
        axis.plot(range(len(heights)), line, color=shades(0.15 + 0.85 * shade), marker="o", ms=3)
    titles = [name.rsplit(".", 1)[-1] for name in names]
    axis.set_xticks(range(len(heights)), [*titles, f"{metric}, %"])
    axis.set(yticks=[], xlim=(-0.2, len(heights) - 0.6), ylim=(-0.08, 1.08))
    axis.spines[:].set_visible(False)
    figure.tight_layout()
    return figure
