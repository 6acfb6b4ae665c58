"""Published and own checkpoints: conversion, strictness, safety (issue 4)."""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import elsa
from tests.mutations import mutated

from .published import TOY, VARIANTS, random_weights, shapes, stage4_block

KERNEL = 3


def toy(**kwargs) -> torch.nn.Module:
    """A model of the layout of `TOY`."""
    torch.manual_seed(1)
    settings = {
        "embed_dim": TOY["dim"],
        "depths": TOY["depths"],
        "num_heads": TOY["heads"],
        "group_width": TOY["width"],
        "kernel_size": KERNEL,
        "patch_size": 4,
        "window_size": 7,
        "num_classes": 5,
    }
    return timm.create_model("elsa_swin_micro", **(settings | kwargs)).eval()


def toy_weights() -> dict[str, torch.Tensor]:
    return random_weights(TOY, kernel=KERNEL, classes=5)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 70, 90, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def saved(tmp_path):
    """Save an object and give the path."""

    def save(content, name="file.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("name", VARIANTS)
def test_published_keys_fit_exactly(name):
    published = shapes(VARIANTS[name])
    learned = {n: s for n, s in published.items() if not n.endswith("relative_id")}
    with torch.device("meta"):
        model = timm.create_model(f"elsa_swin_{name}")
        weights = {n: torch.empty(s) for n, s in published.items()}
        converted = elsa.checkpoint_filter_fn(weights, model)
    assert sum(map(math.prod, learned.values())) == sum(p.numel() for p in model.parameters())
    assert {n: v.shape for n, v in converted.items()} == {
        n: v.shape for n, v in model.state_dict().items()
    }
    model.load_state_dict(converted, strict=True, assign=True)


@pytest.mark.parametrize(
    ("size", "shifted"), [((7, 7), False), ((5, 6), False), ((14, 14), True), ((8, 11), True)]
)
def test_stage4_matches_the_description(saved, size, shifted):
    weights = random_weights(TOY, kernel=KERNEL, classes=5)
    model = toy()
    elsa.load_checkpoint(model, saved(weights))
    x = torch.randn(2, *size, 8 * TOY["dim"])
    with torch.no_grad():
        for i, block in enumerate(model.layers[3].blocks):
            expected = stage4_block(
                weights, f"layers.3.blocks.{i}", x, shift=3 if shifted and i == 1 else 0
            )
            torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"state_dict": w, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda w: {"state_dict": {k: v + 1 for k, v in w.items()}, "state_dict_ema": w},
        lambda w: {"state_dict": {f"module.{k}": v for k, v in w.items()}},
        lambda w: {"model": {f"_orig_mod.module.{k}": v for k, v in w.items()}},
    ],
    ids=["plain", "timm", "ema", "module", "compiled"],
)
def test_classification_containers(saved, wrap, x):
    reference = toy()
    reference.load_state_dict(elsa.checkpoint_filter_fn(toy_weights(), reference))
    model = toy()
    report = elsa.load_checkpoint(model, saved(wrap(toy_weights())))
    assert report.kept == []
    assert report.dropped == [f"layers.3.blocks.{i}.attn.relative_id" for i in range(2)]
    torch.testing.assert_close(model(x), reference(x), rtol=0, atol=0)


def test_ema_is_a_choice(saved):
    path = saved({"state_dict": toy_weights(), "state_dict_ema": {"a": torch.ones(1)}})
    assert len(elsa.read_state_dict(path)) == 1
    assert len(elsa.read_state_dict(path, use_ema=False)) == len(toy_weights())


def test_own_checkpoints_round_trip(tmp_path, saved, x):
    source = toy()
    save_file(source.state_dict(), tmp_path / "file.safetensors")
    for path in (tmp_path / "file.safetensors", saved({"state_dict": source.state_dict()})):
        model = toy()
        torch.nn.init.zeros_(model.head.fc.weight)
        assert elsa.load_checkpoint(model, path) == elsa.LoadReport()
        torch.testing.assert_close(model(x), source(x), rtol=0, atol=0)
    dense = toy(features_only=True, out_norm=True)
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    other = toy(features_only=True, out_norm=True)
    assert elsa.load_checkpoint(other, tmp_path / "dense.safetensors") == elsa.LoadReport()


def test_timm_pretrained_file(saved, x):
    path = saved({"state_dict": toy_weights(), "args": argparse.Namespace(lr=0.1)})
    reference = toy()
    elsa.load_checkpoint(reference, path)
    cfg = {"file": str(path), "num_classes": 5}
    model = toy(pretrained=True, pretrained_cfg_overlay=cfg)
    torch.testing.assert_close(model(x), reference(x), rtol=0, atol=0)
    grey = toy(pretrained=True, pretrained_cfg_overlay=cfg, in_chans=1, num_classes=3)
    summed = reference.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(grey.patch_embed.proj.weight, summed)
    features = toy(pretrained=True, pretrained_cfg_overlay=cfg, features_only=True)
    expected = reference.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(features(x), expected, rtol=0, atol=0)


def test_classifier_left_out_on_demand(saved):
    path = saved(toy_weights())
    model = toy(num_classes=3)
    with pytest.raises(elsa.CheckpointError, match=r'(?s)head\.fc\.weight.*head="drop"'):
        elsa.load_checkpoint(model, path)
    before = model.head.fc.weight.clone()
    report = elsa.load_checkpoint(model, path, head="drop")
    assert report.kept == ["head.fc.bias", "head.fc.weight"]
    assert {"head.fc.bias", "head.fc.weight"} <= set(report.dropped)
    torch.testing.assert_close(model.head.fc.weight, before, rtol=0, atol=0)
    assert elsa.load_checkpoint(toy(num_classes=0), path).kept == []
    with pytest.raises(ValueError, match="head must be"):
        elsa.load_checkpoint(model, path, head="maybe")


def test_dense_backbone_from_classification(saved, x):
    path = saved(toy_weights())
    reference = toy()
    elsa.load_checkpoint(reference, path)
    model = toy(features_only=True, out_norm=True, out_indices=(1, 2))
    report = elsa.load_checkpoint(model, path)
    assert report.kept == ["norm1.bias", "norm1.weight", "norm2.bias", "norm2.weight"]
    assert {"norm.weight", "head.fc.weight", "layers.3.blocks.0.mlp.fc1.weight"} <= set(
        report.dropped
    )
    maps = reference.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
    for features, raw in zip(model(x), maps, strict=True):
        expected = torch.nn.functional.layer_norm(raw.permute(0, 2, 3, 1), raw.shape[1:2])
        torch.testing.assert_close(features, expected.permute(0, 3, 1, 2))


def test_dense_backbone_from_a_detector(saved):
    detector = {f"backbone.{k}": v for k, v in toy_weights().items() if "head." not in k}
    for name in ("backbone.norm.weight", "backbone.norm.bias"):
        del detector[name]
    for i in range(4):
        detector[f"backbone.norm{i}.weight"] = torch.full((16 * 2**i,), float(i))
        detector[f"backbone.norm{i}.bias"] = torch.zeros(16 * 2**i)
    detector["backbone.layers.3.blocks.1.attn.attn_mask"] = torch.zeros(4, 49, 49)
    detector["neck.lateral_convs.0.conv.weight"] = torch.zeros(1)
    path = saved({"meta": {"epoch": 12}, "state_dict": detector})

    model = toy(features_only=True, out_norm=True)
    report = elsa.load_checkpoint(model, path)
    assert report.kept == []
    assert "neck.lateral_convs.0.conv.weight" in report.dropped
    assert "layers.3.blocks.1.attn.attn_mask" in report.dropped
    assert model.model.norm3.weight.unique().item() == 3

    detector["surprise.weight"] = torch.zeros(1)
    with pytest.raises(elsa.CheckpointError, match=r"unknown key surprise\.weight"):
        elsa.load_checkpoint(model, saved({"state_dict": detector}))


def test_everything_unfit_is_named_at_once(saved):
    weights = toy_weights()
    del weights["norm.bias"]
    weights["norm.weight"] = torch.zeros(7)
    weights["layers.9.extra"] = torch.zeros(2, 3)
    model = toy()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(elsa.CheckpointError) as error:
        elsa.load_checkpoint(model, saved(weights))
    for part in (
        "missing key norm.bias (128,)",
        "norm.weight is (7,) in the file, (128,) in the model",
        "unknown key layers.9.extra (2, 3)",
    ):
        assert part in str(error.value)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_checkpoint_of_another_model(saved):
    other = torch.nn.Sequential(torch.nn.Linear(3, 4))
    with pytest.raises(elsa.CheckpointError, match=r"unknown key 0\.weight \(4, 3\)"):
        elsa.load_checkpoint(toy(), saved(other.state_dict()))
    with pytest.raises(TypeError, match="ELSASwin"):
        elsa.load_checkpoint(other, saved(other.state_dict()))


@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
def test_truncated_file(tmp_path, name):
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file(toy_weights(), path)
    else:
        torch.save(toy_weights(), path)
    for keep in (0, 100, path.stat().st_size // 2):
        part = tmp_path / f"part{keep}{path.suffix}"
        part.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(elsa.CheckpointError, match=f"{part.name} is truncated"):
            elsa.load_checkpoint(toy(), part)
    with pytest.raises(FileNotFoundError, match="absent"):
        elsa.load_checkpoint(toy(), tmp_path / "absent.pth")


class Payload:
    """Would run code when unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def test_pickles_are_not_executed(tmp_path, saved):
    marker = tmp_path / "executed"
    path = saved({"state_dict": toy_weights(), "payload": Payload(marker)})
    with pytest.raises(elsa.CheckpointError, match="not executed"):
        elsa.load_checkpoint(toy(), path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [[1, 2], {}, {"lr": 0.1}, {"state_dict": {"a": 1}}])
def test_files_without_a_state_dict(saved, content):
    with pytest.raises(elsa.CheckpointError, match="holds no state dict"):
        elsa.read_state_dict(saved(content))


@pytest.mark.parametrize("kind", ["safetensors", "torch", "old torch", "text"])
def test_a_damaged_file_is_told_in_one_way(kind: str, tmp_path: Path) -> None:
    """500 changes of each: the file is read, or it is a CheckpointError that names it."""
    state = {f"layer.{i}.weight": torch.randn(3, 2) for i in range(4)}
    file = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        save_file(state, file)
    elif kind == "text":
        file.write_text("version https://git-lfs.github.com/spec/v1\n" * 3)
    else:
        torch.save({"state_dict": state}, file, _use_new_zipfile_serialization=kind == "torch")
    content, rng = file.read_bytes(), random.Random(kind)
    failures = [fault(file, mutated(content, rng)) for _ in range(500)]
    told = [message for message in failures if message]
    assert len(told) > 100
    assert all(str(file) in message for message in told)


def fault(file: Path, content: bytes) -> str:
    """What is said of a file with this content; empty if it is read."""
    file.write_bytes(content)
    try:
        assert elsa.read_state_dict(file)
    except elsa.CheckpointError as error:
        return str(error)
    return ""
