"""What a training stage leaves beside its weights, from the last checkpoint of its run."""

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.results import scores

LARGEST_CONFUSION = 100
"""With more classes than this there is no plot of the confusion matrix."""


@dataclass(frozen=True)
class Result:
    """What a run ended with."""

    metrics: Mapping[str, float]
    """Final ones; scores in percent."""
    history: Sequence[Mapping[str, float]]
    """A row of metrics per epoch."""


def classification_result(checkpoint: Path) -> Result:
    """The result in a classifier's last checkpoint."""
    found = json.loads((checkpoint / "result.json").read_text())
    history = found.pop("history")
    return Result(found, history)


def dense_result(checkpoint: Path) -> Result:
    """The result in a detector's or segmentor's last checkpoint."""
    history = json.loads((checkpoint / "history.json").read_text())
    left_out = ("epoch", "val_seconds")
    metrics = {key: value for key, value in history[-1].items() if key not in left_out}
    speeds = [row["images_per_second"] for row in history]
    # Epochs are of equal length, so the mean speed is the harmonic mean.
    metrics["images_per_second"] = len(speeds) / sum(1 / speed for speed in speeds)
    if "energy_wh" in metrics:
        metrics["energy_wh"] = sum(row["energy_wh"] for row in history)
    return Result({key: round(value, 4) for key, value in metrics.items()}, history)


def write_classification(
    checkpoint: Path, results: Path, plots: Path, classes: Sequence[str]
) -> None:
    """Predictions and scores of each class into `results`, curves and confusions into `plots`."""
    predictions = read_predictions(checkpoint)
    results.mkdir()
    write_curves(plots, classification_result(checkpoint).history)
    scores.write_tables(results, scores.classification(predictions, classes))
    scores.write_predictions(results / "predictions.csv", predictions, classes)
    if len(classes) <= LARGEST_CONFUSION:
        pairs = zip(predictions["target"], predictions["classes"][:, 0], strict=True)
        rows = [{"actual": classes[a], "predicted": classes[b]} for a, b in pairs]
        scores.write_csv(plots / "confusion.csv", rows)


def write_dense(checkpoint: Path, results: Path, plots: Path) -> None:
    """Predictions and mmengine's config into `results`, curves into `plots`."""
    shutil.copytree(checkpoint / "predictions", results)
    shutil.copy(checkpoint / "config.py", results)
    write_curves(plots, dense_result(checkpoint).history)


def write_curves(folder: Path, history: Sequence[Mapping[str, float]]) -> None:
    """`curves.csv`, one row per epoch, for DVC's plots and the report."""
    folder.mkdir(exist_ok=True)
    columns = list(dict.fromkeys(key for row in history for key in row))
    with (folder / "curves.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(history)


def read_predictions(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays that `pipelines.train.evaluation.predict` returned, in `predictions.npz`."""
    with np.load(folder / "predictions.npz", allow_pickle=False) as file:
        return dict(file)
