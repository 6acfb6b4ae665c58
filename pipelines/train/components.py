"""The parts of a classifier's training that the parameters decide: model, loss, loaders."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from timm.data import FastCollateMixup, Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import model_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from pipelines.data.images import Images, images_of
from pipelines.errors import PipelineError
from pipelines.params import Pretrain
from pipelines.train.job import Job
from pipelines.train.loading import (
    Batch,
    MicroBatchSampler,
    Part,
    evaluation_loader,
    make_loader,
    split_holdout,
)
from pipelines.train.models import build_model, load_weights
from pipelines.train.schedule import scaled_lr

if TYPE_CHECKING:
    from pipelines.train.reporter import Reporter

FUSED = ("adam", "adamw", "sgd")
"""Optimizers of torch that update all parameters in one call, far faster on a CPU."""


@dataclass(frozen=True)
class Loaders:
    """The images of one rank."""

    train: Any
    sampler: MicroBatchSampler
    """Decides the images of `train`; its `epoch`, `start` and `own` are set before each epoch."""
    choice: Any
    """Images that choose the best epoch: those held out, or those of `val`."""
    val: Any


@dataclass(frozen=True)
class Mixing:
    """How labels become targets."""

    mixup: Mixup | None
    """Mixes a batch in the training process; None where nothing is mixed, or the loader mixes."""
    collate: Any
    """Mixes a batch as it is collated, as timm's script does where batches are prefetched."""
    loss: nn.Module


class MixingCollate(FastCollateMixup):
    """timm's, which knows from the batch whether its epoch mixes: processes of the loader last."""

    def __init__(self, off_epoch: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.off_epoch = off_epoch

    def __call__(self, batch: Batch, _: Any = None) -> Any:
        switch_mixing(self, batch.epoch, self.off_epoch)
        return super().__call__(batch)


def switch_mixing(mixup: Mixup | None, epoch: int, off_epoch: int) -> None:
    """On before epoch `off_epoch` (from 0), and off from there; 0: always on."""
    if mixup:
        mixup.mixup_enabled = not off_epoch or epoch < off_epoch


def make_model(job: Job, device: torch.device) -> nn.Module:
    """The model with its initial weights.

    Raises:
        PipelineError: it can't be built, or does not support what the parameters ask for.
    """
    p = job.params.pretrain
    model = build_model(job.params.model, p.num_classes, p.drop_path_rate).to(device)
    if p.weights:
        load_weights(model, p)
    if p.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if p.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:
            name = job.params.model.name
            raise PipelineError(
                f"pretrain.grad_checkpointing: {name} does not support it", "Set it to false"
            ) from error
    return model


def make_optimizer(model: nn.Module, p: Pretrain) -> torch.optim.Optimizer:
    """timm's optimizer for the model.

    Raises:
        PipelineError: it takes no such arguments.
    """
    further: dict[str, Any] = {"fused": True} if p.opt in FUSED else {}
    if p.layer_decay < 1:
        further["layer_decay"] = p.layer_decay
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model,
            opt=p.opt,
            lr=scaled_lr(p),
            weight_decay=p.weight_decay,
            **further,
            **p.opt_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise PipelineError(
            f"pretrain.opt={p.opt} can't be made with pretrain.opt_kwargs={p.opt_kwargs}: {error}",
            "Give arguments that this optimizer of timm takes",
        ) from error
    return optimizer


def make_erasing(p: Pretrain, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Random erasing of a batch on a GPU; on a CPU each image's transform has it."""
    if device.type != "cuda" or not p.reprob:
        return lambda images: images
    return RandomErasing(p.reprob, mode="pixel", device=device)


def clip_gradients(model: nn.Module, p: Pretrain) -> None:
    """Clip them by `p.clip_mode`, as timm's script does: AGC leaves the classifier alone."""
    parameters = model_parameters(model, exclude_head=p.clip_mode == "agc")
    dispatch_clip_grad(parameters, p.clip_grad, p.clip_mode)


def make_scheduler(optimizer: torch.optim.Optimizer, p: Pretrain, steps: int) -> tuple[Any, int]:
    """timm's schedule for epochs of `steps`, and the epochs with those of the cooldown."""
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched=p.sched,
        num_epochs=max(p.epochs, 1),
        warmup_epochs=p.warmup_epochs,
        warmup_lr=p.warmup_lr,
        min_lr=p.min_lr,
        cooldown_epochs=p.cooldown_epochs,
        step_on_epochs=not p.sched_on_updates,
        updates_per_epoch=steps,
    )
    return scheduler, epochs


def make_mixing(p: Pretrain, prefetch: bool) -> Mixing:
    """Mixup, CutMix, label smoothing and the loss that goes with them."""
    mixes = p.mixup > 0 or p.cutmix > 0
    loss: nn.Module = SoftTargetCrossEntropy() if mixes else LabelSmoothingCrossEntropy(p.smoothing)
    if p.bce_loss:
        loss = BinaryCrossEntropy(p.smoothing, p.bce_target_thresh)
    if not mixes:
        return Mixing(None, None, loss)
    arguments = {
        "mixup_alpha": p.mixup,
        "cutmix_alpha": p.cutmix,
        "prob": p.mixup_prob,
        "switch_prob": p.mixup_switch_prob,
        "mode": p.mixup_mode,
        "label_smoothing": p.smoothing,
        "num_classes": p.num_classes,
    }
    if prefetch:
        return Mixing(None, MixingCollate(p.mixup_off_epoch, **arguments), loss)
    return Mixing(Mixup(**arguments), None, loss)


def make_loaders(job: Job, device: torch.device, collate: Any, reporter: "Reporter") -> Loaders:
    """The loaders of one rank.

    Args:
        collate: of the training batches; None takes timm's.

    Raises:
        PipelineError: fewer training images than a batch.
    """
    p, loader = job.params.pretrain, job.params.loader
    train, val_images = images_of(job.dataset, "train"), images_of(job.dataset, "val")
    kept, held = split_holdout(len(train), p.holdout, p.seed)
    train.transform = create_transform(
        p.img_size,
        is_training=True,
        scale=(p.scale_min, 1.0),
        train_crop_mode=p.train_crop_mode,
        hflip=p.hflip,
        vflip=p.vflip,
        color_jitter=p.color_jitter,
        grayscale_prob=p.grayscale_prob,
        gaussian_blur_prob=p.gaussian_blur_prob,
        auto_augment=p.aa or None,
        interpolation=p.train_interpolation,
        re_prob=p.reprob,
        re_mode="pixel",
        use_prefetcher=device.type == "cuda",
    )
    part = Part(train, kept, p.seed)
    sampler = MicroBatchSampler(len(part), p)
    if not sampler.steps:
        raise PipelineError(
            f"pretrain.batch_size={p.batch_size} is larger than the {len(part)} images to train on",
            "Lower it",
        )
    train_loader = make_loader(
        loader,
        part,
        device,
        batch_sampler=sampler,
        persistent_workers=loader.persistent_workers and loader.data_workers > 0,
        collate_fn=collate,
    )

    def evaluation(images: Images, indices: list[int]) -> Any:
        return evaluation_loader(job, images, indices, device, reporter.rank, reporter.world_size)

    val = evaluation(val_images, list(range(len(val_images))))
    # A data set of its own: it has another transform than the training images.
    choice = evaluation(images_of(job.dataset, "train"), held) if held else val
    return Loaders(train_loader, sampler, choice, val)
