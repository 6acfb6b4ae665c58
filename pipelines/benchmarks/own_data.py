"""A detector for data of one's own: this project's fine-tuning against a stock detector of mmdet.

    elsa import voc pictures/ data-trees/ --val other-pictures/ --tile 160
    python -m pipelines.benchmarks.own_data data-trees/ --minutes 5 --weights weights/detect

Every row trains for the same minutes on the same images, on CPU cores in one process. An epoch is
timed first, and the number of epochs follows from it, so that each schedule runs to its end. What
`elsa finetune` chooses is used, but for the model; the stock detector takes the rate and the steps
too.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.commands.finetune import SMALL_MODEL, Device, choices, look
from pipelines.data.store import Dataset
from pipelines.mm.checkpoint import HISTORY
from pipelines.mm.train import train
from pipelines.params import Params, compose, override
from pipelines.train.job import Job
from pipelines.train.reporter import LocalReporter

STOCK = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
BACKBONE = "resnet18"
ANCHORS = {"model.rpn_head.anchor_generator.scales": [4]}
"""For objects from 16 px on, as this project's head has them; COCO's begin at 32."""


@dataclass(frozen=True)
class Row:
    """What is trained."""

    name: str
    words: tuple[str, ...]
    """Of Hydra, beside what the data suggest."""
    weights: str | None = None


def rows(weights: str | None, config: Path) -> list[Row]:
    """The detectors to compare; `config` becomes the stock one's file."""
    config.write_text(f'_base_ = "{STOCK}"\n')
    ours, other = f"model.name={SMALL_MODEL}", f"model.name={BACKBONE}"
    stock = ("detect=config_finetune", f"detect.config={config}", other)
    found = [
        Row(f"elsa finetune, {SMALL_MODEL}, random weights", (ours,)),
        Row(f"stock Faster R-CNN, {BACKBONE}, random weights", stock),
    ]
    if weights:
        found.insert(0, Row(f"elsa finetune, {SMALL_MODEL}, --weights", (ours,), weights))
    return found


def params_of(row: Row, place: Path, epochs: int) -> Params:
    """The parameters of a row with so many epochs; only the last is evaluated."""
    seen = look("detect", place)
    chosen = choices(seen, Device(0, 1), SMALL_MODEL, row.weights is not None)
    words = [choice.word for choice in chosen if choice.key != "detect.epochs"]
    params = compose(["recipe=finetune", *words, *row.words])
    changes: dict[str, Any] = {"detect.epochs": epochs, "detect.val_interval": epochs}
    if params.detect.method == "config":
        changes["detect.cfg_options"] = ANCHORS
    return override(params, changes, row.name)


def run(row: Row, place: Path, epochs: int) -> tuple[dict[str, float], float]:
    """The last metrics of a training, and the seconds of its steps and evaluation."""
    params = params_of(row, place, epochs)
    seen = look("detect", place)
    dataset = Dataset("coco", str(place.resolve()), tuple(seen.classes), {}, "")
    job = Job("detect", params, dataset, row.weights)
    with tempfile.TemporaryDirectory() as scratch:
        began = time.monotonic()
        train(job, torch.device("cpu"), LocalReporter(Path(scratch) / "run", quiet=True))
        seconds = time.monotonic() - began
        history = json.loads((Path(scratch) / "run" / HISTORY).read_text())
    return history[-1], seconds - history[-1]["val_seconds"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train each row for the minutes, and print the table."""
    from rich.console import Console
    from rich.table import Table

    about, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.benchmarks.own_data", description=about
    )
    parser.add_argument("data", type=Path, help="A folder in COCO's layout.")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--weights", help="To start one row from: a file or a stage's folder.")
    options = parser.parse_args(arguments)
    weights = options.weights
    if weights and Path(weights).is_dir():
        weights = str(Path(weights) / "model.safetensors")
    table = Table("detector", "epochs", "minutes", "box AP50", "box mAP", title=str(options.data))
    with tempfile.TemporaryDirectory() as scratch:
        for row in rows(weights, Path(scratch) / "stock.py"):
            found, seconds = run(row, options.data, 1)
            epochs = max(1, round(60 * options.minutes / seconds))
            if epochs > 1:
                found, seconds = run(row, options.data, epochs)
            shown = (f"{found[key]:.1f}" for key in ("bbox_mAP_50", "bbox_mAP"))
            table.add_row(row.name, str(epochs), f"{seconds / 60:.1f}", *shown)
            print(f"{row.name}: AP50 {found['bbox_mAP_50']:.1f}", flush=True)
    Console().print(table)


if __name__ == "__main__":
    main()
