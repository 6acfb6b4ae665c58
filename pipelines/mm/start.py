"""Neck and heads of a detector or segmentor that was trained before, where they fit."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor

import elsa
from elsa.mm import load_checkpoint_file
from pipelines.errors import PipelineError
from pipelines.mm.model import set_classes
from pipelines.train.job import Job


@dataclass(frozen=True)
class Start:
    """What is taken of a file's neck and heads."""

    tensors: Mapping[str, Tensor]
    new: tuple[str, ...]
    """Names of those that begin at random."""

    def __str__(self) -> str:
        parts = sorted({name.rpartition(".")[0] for name in self.new})
        rest = f"; new: {', '.join(parts)}" if parts else ""
        return f"{len(self.tensors)} tensors of its neck and heads are taken{rest}"


def find_start(job: Job, model: ConfigDict, scope: str) -> Start:
    """The tensors of `job.weights` that have a place in the model's neck and heads.

    Layers of other classes than the data's are not taken: those of another number, and those
    whose names, where the file has them, are others.

    Args:
        model: config of the whole model.
        scope: `mmdet` or `mmseg`, who builds it.

    Raises:
        PipelineError: nothing fits.
    """
    assert job.weights
    init_default_scope(scope)
    shapes = _shapes(model)
    more = deepcopy(model)
    set_classes(more, job.section.num_classes + 1)
    of_classes = {name for name, shape in _shapes(more).items() if shapes.get(name) != shape}
    given = f"{job.stage}.weights={job.weights}"
    try:
        file = Path(job.weights)
        state = elsa.read_state_dict(file)
        meta = load_checkpoint_file(job.weights)["meta"] if file.suffix == ".safetensors" else {}
    except elsa.CheckpointError as error:
        raise PipelineError(f"{given}: {error}") from None
    classes = meta.get("dataset_meta", {}).get("classes")
    others = of_classes if classes and tuple(classes) != tuple(job.dataset.classes) else set()
    found = {
        name: state[name]
        for name, shape in shapes.items()
        if name in state and state[name].shape == shape and name not in others
    }
    if not found:
        raise PipelineError(
            f"{given} has nothing that fits the neck and heads of this model, and"
            f" {job.stage}.init_from=model asks for them",
            f"Give a checkpoint of the same kind of model, or set {job.stage}.init_from=backbone",
        )
    new = (name for name in shapes if name not in found)
    return Start(found, tuple(name for name in new if not name.endswith("num_batches_tracked")))


def _shapes(model: ConfigDict) -> dict[str, torch.Size]:
    with torch.device("meta"):
        built = MODELS.build(model)
    return {k: v.shape for k, v in built.state_dict().items() if not k.startswith("backbone.")}


class StartHook(Hook):
    """Puts the tensors into the model, after mm has initialised it."""

    def __init__(self, start: Start) -> None:
        self.start = start

    def before_train(self, runner: Any) -> None:
        runner.model.load_state_dict(dict(self.start.tensors), strict=False)
