"""The published table, and recipes and models held to it."""

import json

import pytest
import torch

from pipelines.commands.summary import RESULTS, result_rows
from pipelines.params import load_params
from pipelines.results.published import compare, load_published

DROP_PATH = {
    "tiny": {"mask-rcnn": (0.1, 0.2), "cascade-mask-rcnn": (0.0, 0.2)},
    "small": {"mask-rcnn": (0.2, 0.75), "cascade-mask-rcnn": (0.2, 0.75)},
}
LENGTH = {"1x": (12, (8, 11)), "3x": (36, (27, 33))}


@pytest.fixture
def params(tmp_path):
    """Parameters of a recipe with overrides, as `dvc exp run -S` sets them."""

    def load(recipe, **overrides):
        path = tmp_path / "params.yaml"
        path.write_text(json.dumps({"recipe": recipe, **overrides}))  # YAML takes JSON
        return load_params(path=path)

    return load


def test_ours_beside_published():
    assert len({(r.model, r.task, r.method, r.schedule, r.metric) for r in load_published()}) == 24
    assert len(load_published()) == 24
    box, mask = compare(
        {"bbox_mAP": 47.3, "segm_mAP": 43.0, "bbox_mAP_50": 70.0},
        model="elsa_swin_tiny",
        task="detect",
        method="mask-rcnn",
        schedule="3x",
    )
    assert (box.published.value, round(box.difference, 6), box.within) == (47.5, -0.2, True)
    assert (mask.published.value, round(mask.difference, 6), mask.within) == (42.7, 0.3, False)
    [top1] = compare({"top1": 82.6}, model="elsa_swin_tiny", task="classify")
    assert top1.within
    assert compare({"top1": 96.0}, model="elsa_swin_micro", task="classify") == []


def test_results_table_shows_the_published_number_where_there_is_one(params):
    metrics = {stage: dict.fromkeys(keys, 47.9) for stage, _, keys in RESULTS}

    def shown(recipe, **overrides):
        rows = result_rows(metrics, params(recipe, **overrides))
        return {row["metric"]: row["published"] for row in rows}

    full = shown("elsa_swin_tiny")
    assert full["bbox_mAP"] == "45.7 (+2.2, not within 0.2)"
    assert full["mIoU_ms_flip"] == "47.9 (+0.0, within 0.2)"
    assert full["mIoU"] == full["top5"] == ""
    # Another model, other classes: nothing to compare with.
    assert not any(shown("demo").values())
    assert not any(shown("elsa_swin_tiny", model={"kernel_size": 5}).values())
    assert shown("elsa_swin_tiny", detect={"num_classes": 20})["bbox_mAP"] == ""


@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize(
    ("task", "method", "schedule"),
    [
        ("detect", "mask-rcnn", "1x"),
        ("detect", "cascade-mask-rcnn", "3x"),
        ("segment", "upernet", "160k"),
    ],
)
def test_models_have_the_published_size(size, task, method, schedule, params, tmp_path):
    from mmengine.registry import MODELS, init_default_scope

    from pipelines.mm.train import Job, build_config

    chosen = params(f"elsa_swin_{size}", **{task: {"method": method, "schedule": schedule}})
    classes = tuple(map(str, range(getattr(chosen, task).num_classes)))
    config = build_config(Job(task, chosen, "", classes, None), tmp_path, 8)
    init_default_scope(config.default_scope)
    with torch.device("meta"):
        model = MODELS.build(config.model)
    [published] = {
        row.parameters
        for row in load_published()
        if (row.model, row.task, row.method) == (f"elsa_swin_{size}", task, method)
    }
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == published


@pytest.mark.parametrize("size", DROP_PATH)
@pytest.mark.parametrize("family", ["elsa_swin", "swin"])
def test_method_and_schedule_bring_their_values(family, size, params):
    for method, rates in DROP_PATH[size].items():
        for (schedule, (epochs, milestones)), rate in zip(LENGTH.items(), rates, strict=True):
            chosen = {"method": method, "schedule": schedule}
            section = params(f"{family}_{size}", detect=chosen).detect
            assert (section.method, section.schedule) == (method, schedule)
            assert (section.epochs, section.milestones) == (epochs, milestones)
            assert section.drop_path_rate == rate
            section = params(f"{family}_{size}", detect=chosen | {"drop_path_rate": 0.5}).detect
            assert (section.drop_path_rate, section.epochs) == (0.5, epochs)


@pytest.mark.parametrize("family", ["elsa_swin", "swin"])
@pytest.mark.parametrize(("size", "drop_path"), [("tiny", 0.1), ("small", 0.3), ("base", 0.5)])
def test_recipes_are_the_published_ones(family, size, drop_path):
    recipe = load_params(f"{family}_{size}")
    expected = {
        "pretrain": {
            "epochs": 300,
            "cooldown_epochs": 10,
            "batch_size": 1024,
            "opt": "adamw",
            "lr": 1e-3,
            "sched": "cosine",
            "min_lr": 1e-5,
            "warmup_epochs": 20,
            "warmup_lr": 1e-6,
            "weight_decay": 0.05,
            "clip_grad": 5.0,
            "aa": "rand-m9-mstd0.5-inc1",
            "mixup": 0.8,
            "cutmix": 1.0,
            "smoothing": 0.1,
            "reprob": 0.25,
            "color_jitter": 0.4,
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "img_size": 224,
            "drop_path_rate": drop_path,
            "model_ema": size == "base",
            "model_ema_decay": 0.99992,
        },
        "detect": {
            "batch_size": 16,
            "base_batch_size": 16,
            "lr": 1e-4,
            "weight_decay": 0.05,
            "warmup_iters": 500,
            "img_size": 800,
            "amp": "auto",
        },
        "segment": {
            "batch_size": 16,
            "base_batch_size": 16,
            "lr": 6e-5,
            "weight_decay": 0.01,
            "warmup_iters": 1500,
            "crop_size": 512,
            "drop_path_rate": 0.3,
        },
    }
    for name, values in expected.items():
        section = getattr(recipe, name).model_dump()
        assert {key: section[key] for key in values} == values
    assert recipe.segment.epochs * recipe.segment.epoch_iters == 160_000
    assert recipe.segment.val_interval * recipe.segment.epoch_iters == 16_000
