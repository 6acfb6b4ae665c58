"""Augmentation, schedule and optimizer of the published recipe, against timm's own objects."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import ImageDataset, Mixup, create_loader
from timm.data.distributed_sampler import RepeatAugSampler
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs

from pipelines.data.store import Dataset
from pipelines.errors import PipelineError
from pipelines.params import Params, compose
from pipelines.train.classify import Classifier
from pipelines.train.components import clip_gradients, make_mixing
from pipelines.train.job import Job
from pipelines.train.loading import MicroBatchSampler
from pipelines.train.reporter import LocalReporter

PUBLISHED = {
    "epochs": 300,
    "lr": 1e-3,
    "min_lr": 1e-5,
    "warmup_lr": 1e-6,
    "warmup_epochs": 20,
    "cooldown_epochs": 10,
    "weight_decay": 0.05,
    "clip_grad": 5.0,
    "smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "aa": "rand-m9-mstd0.5-inc1",
    "reprob": 0.25,
    "color_jitter": 0.4,
    "hflip": 0.5,
    "scale_min": 0.08,
    "train_interpolation": "random",
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "model_ema": True,
    "model_ema_decay": 0.99992,
}
"""ELSA's recipe on ImageNet, but for the size."""


def classifier(data: Path, reporter: LocalReporter, **pretrain: Any) -> Classifier:
    values = compose(["recipe=smoke"]).model_dump()
    values["scaling"]["num_workers"] = 1
    values["pretrain"] |= {**PUBLISHED, "batch_size": 8, "base_batch_size": 16, "amp": "none"}
    values["pretrain"] |= pretrain
    params = Params.model_validate(values)
    dataset = Dataset("imagenet", str(data), tuple("0123456789"), {}, "")
    return Classifier(Job("pretrain", params, dataset), torch.device("cpu"), reporter)


@pytest.fixture(scope="module")
def published(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    return classifier(data, LocalReporter(tmp_path_factory.mktemp("run")))


TIMM = argparse.Namespace(
    **{k: PUBLISHED[k] for k in ("epochs", "min_lr", "warmup_lr", "warmup_epochs")},
    cooldown_epochs=10,
    sched="cosine",
    sched_on_updates=True,
    opt="adamw",
    lr=1e-3 * 8 / 16,  # timm's --lr-base 1e-3 --lr-base-size 16 at a global batch of 8
    weight_decay=0.05,
    momentum=0.9,
)
"""The arguments of timm's train.py for the published recipe."""


def transform_of_timm(data: Path, split: str, **options: Any) -> Any:
    """The transform of the published recipe, with other options, as timm's loader has it."""
    loader = create_loader(
        ImageDataset(str(data / split)),
        input_size=(3, 32, 32),
        batch_size=8,
        is_training=split == "train",
        use_prefetcher=False,
        interpolation="random" if split == "train" else "bicubic",
        crop_pct=0.9,
        re_prob=0.25,
        re_mode="pixel",
        color_jitter=0.4,
        num_workers=0,
        **options,
    )
    return loader.dataset.transform


def test_transforms_are_those_of_timm(published: Classifier, data: Path) -> None:
    augment = {"auto_augment": "rand-m9-mstd0.5-inc1"}
    train, val = (transform_of_timm(data, split, **augment) for split in ("train", "val"))
    ours = published.loaders.train.dataset.transform
    assert "RandAugment" in repr(ours)
    assert "RandomErasing" in repr([type(t) for t in ours.transforms])
    assert repr(ours) == repr(train)
    assert repr(published.loaders.val.dataset.transform) == repr(val)


@pytest.mark.parametrize("on_updates", [True, False])
def test_learning_rates_are_those_of_timm(published: Classifier, data, on_updates: bool) -> None:
    arguments = argparse.Namespace(**vars(TIMM) | {"sched_on_updates": on_updates})
    optimizer = create_optimizer_v2(torch.nn.Linear(1, 1), **optimizer_kwargs(cfg=arguments))
    steps = published.steps
    theirs, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(arguments), updates_per_epoch=steps
    )
    ours = published
    if not on_updates:
        ours = classifier(data, published.reporter, sched_on_updates=False)
    assert ours.epochs == epochs == 310
    rates = []
    for epoch in range(epochs):
        for step in range(epoch * steps, (epoch + 1) * steps):
            assert ours.optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
            rates.append(optimizer.param_groups[0]["lr"])
            for scheduler in (ours.scheduler, theirs):
                scheduler.step_update(step + 1)
        for scheduler in (ours.scheduler, theirs):
            scheduler.step(epoch + 1)
    assert rates[0] == 1e-6
    assert max(rates) == pytest.approx(5e-4, rel=0.02)  # the cosine has begun under the warm-up
    assert set(rates[300 * steps :]) == {1e-5}


def test_parameter_groups_are_those_of_timm(published: Classifier) -> None:
    expected = create_optimizer_v2(published.model, **optimizer_kwargs(cfg=TIMM))
    groups = published.optimizer.param_groups
    for ours, theirs in zip(groups, expected.param_groups, strict=True):
        assert [id(p) for p in ours["params"]] == [id(p) for p in theirs["params"]]
        for key in ("weight_decay", "betas", "eps"):
            assert ours[key] == theirs[key]
        assert ours["initial_lr"] == theirs["lr"]
    kept = {id(p) for g in groups if not g["weight_decay"] for p in g["params"]}
    for name, parameter in published.model.named_parameters():
        # The ghost heads and the position tables are decayed, as in the published runs.
        assert (id(parameter) in kept) == (parameter.ndim <= 1), name


def test_mixing_and_averaging_are_those_of_timm(published: Classifier) -> None:
    theirs = Mixup(
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
        cutmix_minmax=None,
        prob=1.0,
        switch_prob=0.5,
        mode="batch",
        label_smoothing=0.1,
        num_classes=10,
    )
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8)
    for seed in range(4):  # both kinds of mixing
        np.random.seed(seed)
        expected = theirs(images.clone(), labels)
        np.random.seed(seed)
        actual = published.mixup(images.clone(), labels)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert (published.ema.decay, published.ema.use_warmup) == (0.99992, False)


OTHER = {
    "opt_kwargs": {"betas": [0.9, 0.98]},
    "layer_decay": 0.7,
    "clip_grad": 0.02,
    "clip_mode": "agc",
    "bce_loss": True,
    "bce_target_thresh": 0.2,
    "mixup_prob": 0.7,
    "mixup_switch_prob": 0.3,
    "mixup_mode": "elem",
    "aug_repeats": 3,
    "aa": "",
    "grayscale_prob": 0.1,
    "gaussian_blur_prob": 0.2,
    "vflip": 0.3,
    "train_crop_mode": "rkrc",
    "crop_mode": "squash",
}
"""What the published recipe leaves as timm has it."""


@pytest.fixture(scope="module")
def other(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    return classifier(data, LocalReporter(tmp_path_factory.mktemp("other"), quiet=True), **OTHER)


def test_other_transforms_are_those_of_timm(other: Classifier, data: Path) -> None:
    names = ("vflip", "grayscale_prob", "gaussian_blur_prob", "train_crop_mode", "crop_mode")
    options = {name: OTHER[name] for name in names} | {"scale": (0.08, 1.0)}
    for split, loader in (("train", other.loaders.train), ("val", other.loaders.val)):
        theirs = transform_of_timm(data, split, **options)
        assert repr(loader.dataset.transform) == repr(theirs)


def test_other_optimizers_are_those_of_timm(other: Classifier) -> None:
    expected = create_optimizer_v2(
        other.model, "adamw", 5e-4, weight_decay=0.05, layer_decay=0.7, betas=(0.9, 0.98)
    )
    scales = set()
    for ours, theirs in zip(other.optimizer.param_groups, expected.param_groups, strict=True):
        assert [id(p) for p in ours["params"]] == [id(p) for p in theirs["params"]]
        assert ours["lr_scale"] == theirs["lr_scale"]
        assert list(ours["betas"]) == [0.9, 0.98]
        scales.add(ours["lr_scale"])
    depth = sum(other.job.params.model.depths or ())
    assert len(scales) > depth  # each block has its own
    assert max(scales) == 1.0
    other.optimizer.step()
    other.scheduler.step_update(7)
    rates = {group["lr"] / group["lr_scale"] for group in other.optimizer.param_groups}
    assert max(rates) == pytest.approx(min(rates))


def test_other_losses_mixing_and_clipping_are_those_of_timm(other: Classifier) -> None:
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8)
    theirs = Mixup(0.8, 1.0, None, 0.7, 0.3, "elem", label_smoothing=0.1, num_classes=10)
    for seed in range(4):
        np.random.seed(seed)
        expected = theirs(images.clone(), labels)
        np.random.seed(seed)
        actual = other.mixup(images.clone(), labels)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    scores = torch.randn(8, 10)
    right = (actual[1] > 0.2).float()
    expected_loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, right)
    torch.testing.assert_close(
        make_mixing(other.params, False).loss(scores, actual[1]), expected_loss
    )

    parameters = list(other.model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in parameters]
    clip_gradients(other.model, other.params)
    changed = [not torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=True)]
    assert changed[-2:] == [False, False]  # the classifier's
    assert sum(changed) > len(parameters) / 2


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_repeated_augmentation_is_that_of_timm(other: Classifier, workers: int) -> None:
    """Which images each worker sees, in which order; and the copies of an image differ."""
    count = 512
    for rank in range(workers):
        theirs = RepeatAugSampler(range(count), workers, rank, num_repeats=3)
        ours = MicroBatchSampler(count, other.params.model_copy(update={"shares": workers}))
        ours.own = range(rank, rank + 1)
        theirs.epoch = ours.epoch = 5
        batches = list(ours)
        assert [index for batch in batches for _, index, _ in batch] == list(theirs)
        assert {copy for batch in batches for _, _, copy in batch} == {0, 1, 2}
    images = other.loaders.train.dataset
    first, again, copy = (images[5, 7, number][0] for number in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, copy)


def test_training_runs_with_the_other_options(data: Path, tmp_path: Path) -> None:
    reporter = LocalReporter(tmp_path / "run", quiet=True)
    classifier(data, reporter, **OTHER, epochs=1, warmup_epochs=0, cooldown_epochs=0).fit()
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert math.isfinite(result["history"][-1]["train_loss"])


def test_arguments_that_an_optimizer_does_not_take_are_told(data: Path, tmp_path: Path) -> None:
    reporter = LocalReporter(tmp_path, quiet=True)
    with pytest.raises(PipelineError, match=r"pretrain.opt=adamw can't be made .*momentun"):
        classifier(data, reporter, opt_kwargs={"momentun": 0.9})
