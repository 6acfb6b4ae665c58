"""What a training step minimises: the labels' loss, and a teacher's where there is one."""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.task import LogitDistillationTask
from torch import Tensor, nn

from pipelines.errors import PipelineError
from pipelines.params import Pretrain
from pipelines.paths import ROOT


def make_objective(
    model: nn.Module,
    loss: nn.Module,
    p: Pretrain,
    device: torch.device,
    classes: Sequence[str] = (),
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of images (B, 3, H, W) and targets that runs `model`, and gives the loss.

    Args:
        model: as it is trained.
        loss: of logits and targets.
        classes: names of the data's classes; empty if they are not known.

    Raises:
        PipelineError: the teacher does not exist, or is of other classes or image sizes.
    """
    if not p.teacher:
        return lambda images, targets: loss(model(images), targets)
    task = LogitDistillationTask(
        model,
        load_teacher(p, classes).to(device),
        loss,
        distill_loss_weight=p.distill_loss_weight,
        task_loss_weight=p.task_loss_weight,
        temperature=p.kd_temperature,
        device=device,
        verbose=False,
    )
    # What the images are normalised with here, whatever the student's own config says.
    for name, values in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
        task.get_buffer(f"student_{name}").copy_(torch.tensor(values).view(1, -1, 1, 1))

    def objective(images: Tensor, targets: Tensor) -> Tensor:
        total: Tensor = task(images, targets)["loss"]
        return total

    return objective


def load_teacher(p: Pretrain, classes: Sequence[str] = ()) -> nn.Module:
    """The classifier that `p.teacher` names, in evaluation mode; its weights are not trained.

    Raises:
        PipelineError: it does not exist, or is of other classes or image sizes.
    """
    assert p.teacher
    folder = ROOT / p.teacher
    name = f"local-dir:{folder}" if folder.is_dir() else p.teacher
    try:
        teacher: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:  # of timm, its hub, the network, the file
        raise PipelineError(
            f"pretrain.teacher={p.teacher} can't be loaded: {error}",
            "Give a folder such as weights/pretrain of another run, or a model that timm has"
            " pretrained weights of",
        ) from error
    teacher.requires_grad_(False).eval()
    if teacher.num_classes != p.num_classes:
        raise PipelineError(
            f"pretrain.teacher={p.teacher} tells {teacher.num_classes} classes apart, but"
            f" pretrain.num_classes is {p.num_classes}",
            "Choose a teacher that was trained with the classes of the data",
        )
    config: Any = teacher.pretrained_cfg
    # timm's own models name none: theirs are ImageNet's, in its order.
    names = list(map(str, config.get("label_names") or ()))
    if names and classes and names != list(classes):
        there, here = next(pair for pair in zip_longest(names, classes) if pair[0] != pair[1])
        raise PipelineError(
            f"pretrain.teacher={p.teacher} was trained with other classes, or in another order:"
            f" one that it calls {there} is {here} in the data",
            "Choose a teacher that was trained with the classes of the data",
        )
    try:
        with torch.no_grad():
            teacher(torch.zeros(1, 3, p.img_size, p.img_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise PipelineError(
            f"pretrain.teacher={p.teacher} does not take images of pretrain.img_size={p.img_size}:"
            f" {error}",
            "Choose a teacher of this size, or one that takes any",
        ) from error
    return teacher
