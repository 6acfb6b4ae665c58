"""Mask R-CNN and UPerNet on one device by the project's own loop, without Ray, MLflow and DVC.

    python -m pipelines.benchmarks.gpu_dense --device cuda

Some steps of each with ELSA-Swin-T on random images, twice from one seed: images per second,
memory, and the largest difference of a weight between the two runs; detection once more with
deterministic kernels. It needs mmcv with kernels for the device. On a CPU a small model takes its
place: a rehearsal, whose speeds say nothing.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import ops
from pipelines.benchmarks.figures import Figures
from pipelines.data.files import write_json
from pipelines.data.layout import LAYOUTS
from pipelines.data.store import Dataset
from pipelines.errors import PipelineError
from pipelines.mm.hooks import WEIGHTS
from pipelines.mm.train import train
from pipelines.params import Params, compose, override
from pipelines.train.job import Job
from pipelines.train.reporter import LocalReporter

CLASSES = ("round", "square", "other")
SHOWN = ("loss", "images_per_second", "mfu", "energy_wh", "max_memory_gib")


class Recorder(LocalReporter):
    """Keeps the metrics of the last epoch."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, quiet=True)
        self.last: Mapping[str, float] = {}

    def save(self, metrics: Mapping[str, float], epoch: int, folder: Path | None) -> None:
        super().save(metrics, epoch, folder)
        self.last = metrics


def random_scenes(root: Path, size: int, train_images: int) -> dict[str, Dataset]:
    """Noise with boxes in it, in COCO's and ADE20K's layouts."""
    random = np.random.default_rng(0)
    for split, count in (("train", train_images), ("val", 2)):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(1, count + 1):
            pixels = random.integers(0, 90, (size, size, 3))
            labels = np.full((size, size), len(CLASSES))
            for _ in range(4):
                x, y = (int(v) for v in random.integers(0, size * 3 // 4, 2))
                side, label = size // 5, int(random.integers(0, 2))
                pixels[y : y + side, x : x + side] += 120
                labels[y : y + side, x : x + side] = label + 1
                corners = [x, y, x + side, y, x + side, y + side, x, y + side]
                annotations.append(
                    {
                        **{"id": len(annotations) + 1, "image_id": number, "iscrowd": 0},
                        **{"category_id": label + 1, "bbox": [x, y, side, side]},
                        **{"area": side * side, "segmentation": [corners]},
                    }
                )
            picture = Image.fromarray(pixels.astype(np.uint8))
            for kind in ("coco", "ade20k"):
                folder = root / kind / LAYOUTS[kind].images[split]
                folder.mkdir(parents=True, exist_ok=True)
                picture.save(folder / f"{number}.jpg")
            maps = root / "ade20k" / LAYOUTS["ade20k"].annotations[split]
            maps.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels.astype(np.uint8)).save(maps / f"{number}.png")
            images.append(
                {"id": number, "file_name": f"{number}.jpg", "width": size, "height": size}
            )
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        write_json(root / "coco" / LAYOUTS["coco"].annotations[split], content)
    return {
        stage: Dataset(kind, str(root / kind), CLASSES, {}, "")
        for stage, kind in (("detect", "coco"), ("segment", "ade20k"))
    }


def params_of(cuda: bool, stage: str, changes: Mapping[str, Any]) -> Params:
    """The published recipe of ELSA-Swin-T for one epoch of random scenes; smaller on a CPU."""
    values: dict[str, Any] = {
        "scaling.num_workers": 1,
        "scaling.use_gpu": cuda,
        "loader.data_workers": 4 if cuda else 0,
        f"{stage}.num_classes": len(CLASSES),
        f"{stage}.batch_size": 8 if cuda else 2,
        f"{stage}.shares": 1,
        f"{stage}.epochs": 1,
        f"{stage}.warmup_iters": 2,
        "segment.epoch_iters": 50 if cuda else 2,
    }
    if not cuda:
        small = {"img_size": 64} | ({"crop_size": 64} if stage == "segment" else {})
        values |= {f"{stage}.{key}": value for key, value in small.items()}
        values |= {"model.name": "elsa_swin_micro", "model.depths": [1, 1, 1, 1]}
    groups = [] if cuda else ["detect=mask-rcnn_finetune", "segment=upernet_finetune"]
    base = compose(["recipe=elsa_swin_tiny", "precision=bfloat16", *groups])
    return override(base, values | dict(changes), "random scenes")


def run(job: Job, device: torch.device, folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """What one training reports, and its weights."""
    from mmengine.registry import DefaultScope

    DefaultScope._instance_dict.clear()  # the other task's, in one process
    recorder = Recorder(folder)
    train(job, device, recorder)
    shown = {key: float(recorder.last[key]) for key in SHOWN if key in recorder.last}
    return shown, load_file(folder / WEIGHTS)


def measure(device: torch.device, note: Callable[[str, Any], None]) -> bool:
    """Run everything, and note each figure; returns whether all of it ran."""
    cuda, whole = device.type == "cuda", True
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        data = random_scenes(root, 800 if cuda else 96, 400 if cuda else 4)
        # Deterministic kernels last, for they stay chosen in this process.
        for stage, deterministic in (("detect", False), ("segment", False), ("detect", True)):
            name = f"{stage}, deterministic kernels" if deterministic else stage
            changes = {"detect.deterministic": deterministic}
            job = Job(stage, params_of(cuda, stage, changes), data[stage])
            try:
                shown, first = run(job, device, root / f"{name} 1")
                _, second = run(job, device, root / f"{name} 2")
            except (PipelineError, RuntimeError) as error:
                whole = False
                note(name, f"failed: {error}")
                continue
            differences = [float((first[k] - second[k]).abs().max()) for k in first]
            note(name, shown | {"two runs differ by": max(differences)})
    return whole


def main() -> int:
    """Print each figure and write them to a file; returns the exit status."""
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.benchmarks.gpu_dense", description=description
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU", file=sys.stderr)
        return 2
    ops.set_backend("compiled")
    return 0 if measure(torch.device(arguments.device), Figures(arguments.json)) else 1


if __name__ == "__main__":
    sys.exit(main())
