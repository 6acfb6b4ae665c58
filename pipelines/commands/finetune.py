"""Compose params.yaml for data of one's own, by what the data and the device suggest."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from pipelines.commands.compose import write_params
from pipelines.data.errors import DataError
from pipelines.data.layout import LAYOUTS
from pipelines.data.public.chunks import Chunk, chunks, class_names, files_of
from pipelines.data.weights import weights_file
from pipelines.errors import PipelineError
from pipelines.params import compose
from pipelines.paths import ROOT
from pipelines.tasks import TASKS

SAMPLED = 60
"""Images whose size, and label maps whose classes, stand for all."""
PASSES = {"classify": 20_000, "detect": 6_000, "segment": 6_000}
"""Images that a training on CPU cores sees: some minutes. A GPU sees ten times as many."""
EPOCHS = (4, 100)
LARGEST = {"classify": (96, 224), "detect": (320, 800), "segment": (256, 512)}
"""Largest short side on CPU cores and on GPUs."""
HEADS = {"detect": "roi_head.", "segment": "decode_head."}
"""How the names of weights begin that more than a backbone has."""
SMALL_MODEL, MODEL = "elsa_swin_micro", "elsa_swin_tiny"


@dataclass(frozen=True)
class Device:
    """What there is to train on."""

    gpus: int
    cores: int

    @property
    def workers(self) -> int:
        return self.gpus or min(2, self.cores)


@dataclass(frozen=True)
class Seen:
    """What a folder holds."""

    task: str
    place: Path
    classes: Sequence[str]
    train: int
    """Training images."""
    side: int
    """Median of their short sides, of a sample."""
    masks: bool = True
    """Of COCO's layout: every annotation has one."""


@dataclass(frozen=True)
class Choice:
    """A parameter and why it has its value."""

    key: str
    value: object
    why: str

    @property
    def word(self) -> str:
        """As Hydra takes it."""
        return f"{self.key}={json.dumps(self.value) if self.value is not None else 'null'}"


def look(task: str, place: Path) -> Seen:
    """What the folder holds for a task.

    Raises:
        DataError: it has not the layout of the task's data set.
    """
    kind = TASKS[task].dataset
    place = place.expanduser().resolve()
    chunks(place, kind, ())  # its faults come first
    classes = class_names(place, kind)
    parts = [part for part in chunks(place, kind, classes) if part.split == "train"]
    names = [name for part in parts for name in _pictures(place, part)]
    if not names:
        raise DataError(f"{place} has no training images")
    sample = names[:: max(1, len(names) // SAMPLED)]
    sides = []
    for name in sample:
        with Image.open(place / name) as image:
            sides.append(min(image.size))
    masks = True
    if kind == "coco":
        content = json.loads((place / LAYOUTS[kind].annotations["train"]).read_bytes())
        masks = all(a.get("segmentation") for a in content["annotations"])
    return Seen(task, place, classes, len(names), int(median(sides)), masks)


def _pictures(place: Path, part: Chunk) -> Iterator[str]:
    return (name for name in files_of(place, part) if not name.startswith("annotations/"))


def balanced(seen: Seen) -> list[float]:
    """Weights of the classes by the root of how rare their pixels are, of a sample; mean 1."""
    count = np.zeros(len(seen.classes) + 1)
    files = sorted((seen.place / LAYOUTS["ade20k"].annotations["train"]).glob("*.png"))
    for file in files[:: max(1, len(files) // SAMPLED)]:
        values = np.asarray(Image.open(file)).ravel()
        count += np.bincount(values, minlength=len(count))[: len(count)]
    weights = 1 / np.sqrt(np.maximum(count[1:], count[1:].sum() / 1e4))
    return [round(float(w), 3) for w in weights / weights.mean()]


def common(seen: Sequence[Seen], device: Device, weights: str | None, model: str) -> list[Choice]:
    """The choices that all tasks share."""
    machine = f"{device.gpus} GPUs" if device.gpus else f"{device.cores} cores, no GPU"
    found = [
        Choice("tasks", [one.task for one in seen], "what you gave data for"),
        Choice("scaling.use_gpu", device.gpus > 0, machine),
        Choice("scaling.num_workers", device.workers, machine),
        Choice(
            "scaling.cpus_per_worker",
            max(1, min(8, device.cores // device.workers)),
            f"{device.cores} cores",
        ),
        Choice("model.name", model, "--model, or small enough for the device"),
    ]
    if device.gpus:
        found.append(Choice("loader.data_workers", 4, "loader processes of each GPU"))
    if weights:
        # The other tasks start from the classifier that is trained first, where there is one.
        first = {"classify": "pretrain"} if seen[0].task == "classify" else {}
        stages = first.values() or [TASKS[one.task].stage for one in seen]
        found += [Choice(f"{stage}.weights", weights, "--weights") for stage in stages]
        found += [
            Choice(f"{stage}.init_from", "model", "--weights has heads for this task")
            for stage in stages
            if has_heads(weights, stage)
        ]
    return found


def has_heads(weights: str, stage: str) -> bool:
    """Whether a checkpoint has heads as the stage's own methods do."""
    import elsa

    try:
        names = elsa.read_state_dict(weights)
    except elsa.CheckpointError as error:
        raise PipelineError(f"--weights {weights}: {error}") from None
    return stage in HEADS and any(name.startswith(HEADS[stage]) for name in names)


def choices(seen: Seen, device: Device, model: str, pretrained: bool) -> list[Choice]:
    """What a task's data suggests."""
    stage, on_gpu = TASKS[seen.task].stage, device.gpus > 0
    side = min(-(-seen.side // 32) * 32, LARGEST[seen.task][on_gpu])
    budget = PASSES[seen.task] * (10 if on_gpu else 1)
    epochs = max(EPOCHS[0], min(EPOCHS[1], round(budget / seen.train)))
    batch = {"classify": 128 * max(1, device.gpus) if on_gpu else 32}.get(
        seen.task, 16 if on_gpu else 8
    )
    batch = min(batch, max(2, seen.train // 4))
    batch = max(1, round(batch / device.workers)) * device.workers
    images = f"{seen.train} training images"
    found = [
        Choice(f"data.{TASKS[seen.task].dataset}", str(seen.place), "yours"),
        Choice(f"{stage}.num_classes", len(seen.classes), ", ".join(seen.classes[:4])),
        Choice(f"{stage}.img_size", side, f"short sides are {seen.side} px in the middle"),
        Choice(f"{stage}.batch_size", batch, images),
        Choice(f"{stage}.shares", device.workers, "a pass of each worker in a step"),
        Choice(f"{stage}.epochs", epochs, f"{images}, about {budget} to be seen"),
    ]
    if seen.task == "classify":
        small = model == SMALL_MODEL and not pretrained
        why = "a small model from random weights" if small else "a larger or pretrained model"
        found.append(Choice("pretrain.lr", 2e-3 if small else 5e-4, why))
        return [*found, Choice("pretrain.base_batch_size", 64, "what the rate is for")]
    rate = 1e-3 if model == SMALL_MODEL else 1e-4
    steps = epochs * max(1, seen.train // batch)
    found += [
        Choice(f"{stage}.lr", rate, "for 16 images a step, with a model of this size"),
        Choice(f"{stage}.base_batch_size", 16, "what the rate is for"),
        Choice(f"{stage}.warmup_iters", min(500, max(1, steps // 10)), f"{steps} steps"),
        Choice(f"{stage}.val_interval", max(1, epochs // 4), "four evaluations"),
        Choice(f"{stage}.pretrained", pretrained, "weights to start from, or none"),
    ]
    if seen.task == "detect" and on_gpu:
        cuts = [max(1, epochs * 2 // 3), max(2, epochs * 11 // 12)]
        found.append(Choice("detect.milestones", cuts, "as in the published 12 epochs"))
        found.append(Choice("detect.amp", "auto", "bfloat16 where the GPU has it"))
    if seen.task == "segment":
        found.append(Choice("segment.crop_size", side, "as the images"))
    return found


def finetune(
    places: dict[str, Path],
    weights: str | None,
    model: str | None,
    balance: bool,
    changes: Sequence[str],
) -> None:
    """Write `params.yaml` for the folders, by task, and show what was chosen and why.

    Raises:
        PipelineError: a folder, the weights or a change does not fit.
    """
    from rich.console import Console
    from rich.table import Table

    if not places:
        raise PipelineError("no data", "Give --classify, --detect or --segment with a folder")
    if weights:
        file = weights_file(weights, Path.cwd()).resolve()
        if file.is_relative_to(ROOT / "weights"):
            raise PipelineError(
                f"--weights {weights}: DVC removes a stage's outputs before it runs the stage",
                "Copy the folder to another place, and name the copy",
            )
        weights = str(file)
    device = _device()
    name = model or (MODEL if device.gpus else SMALL_MODEL)
    seen = [look(task, place) for task, place in places.items()]
    pretrained = bool(weights) or "classify" in places
    chosen = common(seen, device, weights, name)
    groups = []
    for one in seen:
        chosen += choices(
            one, device, name, bool(weights) or (one.task != "classify" and pretrained)
        )
        given = any(change.startswith(f"{TASKS[one.task].stage}=") for change in changes)
        if one.task == "detect" and not given:
            method = "mask-rcnn" if one.masks else "faster-rcnn"
            groups.append(f"detect={method}_{'1x' if device.gpus else 'finetune'}")
        if one.task == "segment" and balance:
            chosen.append(Choice("segment.class_weights", balanced(one), "--balance"))
    words = ["recipe=finetune", *groups, *(choice.word for choice in chosen), *changes]
    compose(words)
    write_params(words)
    table = Table("parameter", "value", "because", title="params.yaml, beside recipe finetune")
    for group in groups:
        table.add_row(*group.split("="), "every object has a mask" if "mask" in group else "boxes")
    for choice in chosen:
        table.add_row(choice.key, choice.word.partition("=")[2], choice.why)
    for change in changes:
        key, _, value = change.partition("=")
        table.add_row(key, value, "-S")
    console = Console()
    console.print(table)
    console.print("Train with `dvc repro report`. Change a value with -S here, or in params.yaml.")


def _device() -> Device:
    import torch

    return Device(torch.cuda.device_count(), len(os.sched_getaffinity(0)))
