"""The project's own training loop on one device, without Ray, MLflow and DVC.

    python -m pipelines.benchmarks.gpu_training --device cuda

An epoch of the demo's classification (on `data/imagenet` where it is prepared, else on random
images), then `elsa_swin_tiny` at 224 px on random images: bfloat16 with mixup and EMA, the same
once more and the same left and resumed, with and without deterministic kernels, and float16 with
its scaler. On a CPU a small model takes its place: a rehearsal, whose speeds say nothing.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# For the deterministic runs, which come last: cuBLAS reads it once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import torch
from PIL import Image

import ops
from pipelines.benchmarks.figures import Figures
from pipelines.data.store import Dataset
from pipelines.errors import PipelineError
from pipelines.params import Params, load_params, override
from pipelines.paths import ROOT
from pipelines.train.classify import Classifier
from pipelines.train.job import Job
from pipelines.train.reporter import LocalReporter

SHOWN = ("train_loss", "images_per_second", "mfu", "energy_wh", "max_memory_gib", "skipped_steps")


class Recorder(LocalReporter):
    """Keeps the metrics of each epoch; asks the run to stop in the epoch `leave_in`."""

    def __init__(self, folder: Path, leave_in: int = -1) -> None:
        super().__init__(folder / "checkpoint", quiet=True)
        self.epochs: list[Mapping[str, float]] = []
        self.leave_in = leave_in

    def tell(self, line: str) -> None:
        print(f"  {line}", flush=True)

    def stopping(self) -> bool:
        return len(self.epochs) == self.leave_in

    def save(self, metrics: Mapping[str, float], epoch: int, folder: Path | None) -> None:
        super().save(metrics, epoch, folder)
        self.epochs.append(dict(metrics))


@dataclass
class Finished:
    """A training that has ended."""

    weights: dict[str, torch.Tensor]
    epochs: list[Mapping[str, float]] = field(default_factory=list)

    def last(self) -> dict[str, float]:
        """What the last epoch reported; the first ones warm up."""
        return {key: self.epochs[-1][key] for key in SHOWN if key in self.epochs[-1]}

    def differs_from(self, other: "Finished") -> float:
        """The largest difference of a weight; 0.0 if all have the same bits."""
        pairs = ((t, other.weights[name]) for name, t in self.weights.items())
        return max(
            0.0 if torch.equal(a, b) else float((a.double() - b.double()).abs().max())
            for a, b in pairs
        )


def random_images(root: Path, size: int, train: int, val: int) -> Dataset:
    """Ten classes of noisy colours in ImageNet's layout."""
    random = np.random.default_rng(0)
    colours = random.integers(0, 200, (10, 3))
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            label = index % 10
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = colours[label] + random.integers(0, 55, (size, size, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.JPEG")
    return Dataset("imagenet", str(root), tuple(f"class{label}" for label in range(10)), {}, "")


def prepared_or_random(params: Params, scratch: Path) -> Dataset:
    """The demo's classification images if they are there, else random ones; says which."""
    root = ROOT / "data/imagenet"
    if (root / "train").is_dir() and (root / "val").is_dir():
        print("the demo's images")
        classes = tuple(sorted(folder.name for folder in (root / "train").iterdir()))
        return Dataset("imagenet", str(root), classes, {}, "")
    print("random images: the demo's are not prepared here, so that its score says nothing")
    return random_images(scratch / "small", params.pretrain.img_size, 320, 100)


def train(params: Params, dataset: Dataset, device: torch.device, leave_in: int = -1) -> Finished:
    """A whole training; with `leave_in` one that is left in that epoch and resumed."""
    with tempfile.TemporaryDirectory() as scratch:
        job = Job("pretrain", params, dataset)
        epochs: list[Mapping[str, float]] = []
        for leave in ([leave_in] if leave_in >= 0 else []) + [-1]:
            recorder = Recorder(Path(scratch), leave)
            classifier = Classifier(job, device, recorder)
            classifier.fit()
            epochs += recorder.epochs
            if leave >= 0 and len(recorder.epochs) != leave:
                raise PipelineError(f"the run was to be left in epoch {leave + 1} and was not")
        weights = {k: v.detach().cpu().clone() for k, v in classifier.model.state_dict().items()}
    return Finished(weights, epochs)


def changes(device: torch.device, workers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Changes of the demo's parameters: for its own epoch, and for the large model's steps."""
    cuda = device.type == "cuda"
    common: dict[str, Any] = {
        "scaling.num_workers": 1,
        "scaling.use_gpu": cuda,
        "loader.data_workers": workers,
        "loader.persistent_workers": workers > 0,
    }
    demo = common | {"pretrain.amp": "bfloat16" if cuda else "none", "pretrain.epochs": 1}
    demo |= {"pretrain.warmup_epochs": 0, "model.name": "elsa_swin_micro"}
    large = common | {
        "model.name": "elsa_swin_tiny" if cuda else "elsa_swin_micro",
        "pretrain.img_size": 224 if cuda else 32,
        "pretrain.batch_size": 128 if cuda else 8,
        "pretrain.base_batch_size": 128 if cuda else 8,
        "pretrain.shares": 1,
        "pretrain.num_classes": 10,
        "pretrain.epochs": 4 if cuda else 3,
        "pretrain.warmup_epochs": 1,
        "pretrain.lr": 1e-4,
        "pretrain.drop_path_rate": 0.1,
        "pretrain.mixup": 0.8,
        "pretrain.cutmix": 1.0,
        "pretrain.clip_grad": 5.0,
        "pretrain.model_ema": True,
        "pretrain.holdout": 0.0,
        "pretrain.amp": "bfloat16",
    }
    if not cuda:
        large["model.depths"] = [1, 1, 1, 1]
    return demo, large


def measure(device: torch.device, workers: int, note: Callable[[str, Any], None]) -> bool:
    """Run everything; `note(name, value)` hears of each figure as soon as it is known.

    Returns:
        whether all of it ran: what fails is noted with its error, and the rest goes on.
    """
    base = load_params(ROOT / "params.yaml")
    first: Finished | None = None
    demo, large = changes(device, workers)
    whole = True

    def attempt(name: str, figure: Callable[[], Any]) -> None:
        nonlocal whole
        try:
            note(name, figure())
        except (PipelineError, RuntimeError) as error:
            whole = False
            note(name, f"failed: {error}")

    def demo_epoch() -> dict[str, float]:
        params = override(base, demo, "the demo's epoch")
        found = train(params, prepared_or_random(params, scratch), device)
        return found.last() | {k: v for k, v in found.epochs[-1].items() if k.endswith("top1")}

    def first_run() -> dict[str, float]:
        nonlocal first
        first = None
        first = train(params, data, device)
        return first.last()

    def repeated(leave_in: int = -1) -> float:
        """The same once more, as a whole or left and resumed: the largest difference."""
        if first is None:
            raise PipelineError("the run to compare with failed")
        return train(params, data, device, leave_in).differs_from(first)

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        attempt("demo, one epoch", demo_epoch)
        params = override(base, large, "the large model's steps")
        size = params.pretrain.batch_size
        steps = 25 if device.type == "cuda" else 4
        data = random_images(scratch / "large", params.pretrain.img_size, steps * size, size)
        print(f"{params.model.name}, {params.pretrain.img_size} px, batch {size}", flush=True)
        attempt("bfloat16, mixup, EMA", first_run)
        half = override(params, {"pretrain.amp": "float16"}, "float16")
        attempt("float16 with its scaler", lambda: train(half, data, device).last())
        attempt("two runs: largest difference of a weight", repeated)
        attempt("left and resumed: largest difference of a weight", lambda: repeated(leave_in=1))
        # Last, for they stay chosen in this process.
        params = override(params, {"pretrain.deterministic": True}, "deterministic kernels")
        attempt("deterministic kernels", first_run)
        attempt(
            "deterministic kernels, left and resumed: largest difference of a weight",
            lambda: repeated(leave_in=1),
        )
    return whole


def main() -> int:
    """Print each figure and write them to a file; returns the exit status."""
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.benchmarks.gpu_training", description=description
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument(
        "--workers",
        type=int,
        help="loader processes; default: 0 on a CPU, else the machine's cores less 2",
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU", file=sys.stderr)
        return 2
    device = torch.device(arguments.device)
    workers = arguments.workers
    if workers is None:
        workers = max((os.cpu_count() or 1) - 2, 1) if device.type == "cuda" else 0
    try:
        ops.set_backend("compiled")
        return 0 if measure(device, workers, Figures(arguments.json)) else 1
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
