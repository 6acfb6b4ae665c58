"""The full-size configs through the stage's own code, with a small model on small images."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import (
    DATA_SAMPLERS,
    MODELS,
    PARAM_SCHEDULERS,
    DefaultScope,
    init_default_scope,
)
from safetensors.torch import load_file

from pipelines.mm.checkpoint import HISTORY
from pipelines.mm.config import build_config
from pipelines.mm.float32 import KINDS, heads_in
from pipelines.mm.hooks import WEIGHTS
from pipelines.mm.train import train
from pipelines.train.reporter import LocalReporter

from .full_size import CPU, MICRO, SHORT, SMALL, VARIANTS, build_model, small_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("stage", "group", "recipe", "model"),
    [
        (*VARIANTS[0], "elsa_swin_tiny", MICRO),
        (*VARIANTS[1], "elsa_swin_small", MICRO),
        (
            *("detect", "faster-rcnn_finetune"),
            "swin_tiny",
            {"embed_dim": 24, "depths": [1, 1, 1, 2], "num_heads": [1, 2, 3, 4]},
        ),
    ],
)
def test_trains_and_evaluates_at_small_size(
    stage, group, recipe, model, make_job, small_heads, tmp_path
):
    job = make_job(
        stage,
        recipe,
        group,
        model,
        with_cp=True,
        **SMALL[stage] | SHORT,
    )
    if group.startswith("faster"):
        place = without_masks(Path(job.dataset.place), tmp_path / "coco")
        job = replace(job, dataset=replace(job.dataset, place=str(place)))
    DefaultScope._instance_dict.clear()
    train(job, CPU, LocalReporter(tmp_path / "run", quiet=True))
    [row] = json.loads((tmp_path / "run" / HISTORY).read_text())
    assert row["loss"] > 0
    assert "bbox_mAP" in row
    assert ("segm_mAP" in row) == ("mask" in group)
    untrained = build_model(job, tmp_path).state_dict()
    assert load_file(tmp_path / "run" / WEIGHTS).keys() == untrained.keys()


def without_masks(place, copy):
    """The same COCO data as boxes alone."""
    shutil.copytree(place, copy)
    for file in (copy / "annotations").iterdir():
        content = json.loads(file.read_text())
        for annotation in content["annotations"]:
            del annotation["segmentation"]
        file.write_text(json.dumps(content))
    return copy


class StoppedError(Exception):
    pass


class StoppingReporter(LocalReporter):
    """Dies after the first epoch was saved."""

    def save(self, metrics, epoch, folder):
        super().save(metrics, epoch, folder)
        raise StoppedError


@pytest.fixture
def free_kernels():
    """Afterwards torch may choose its kernels again."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def test_training_by_steps_resumes_exactly(make_job, small_heads, tmp_path, free_kernels):
    options = SMALL["segment"] | SHORT | {"epochs": 2, "epoch_iters": 3, "deterministic": True}
    job = make_job("segment", **options)
    DefaultScope._instance_dict.clear()
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(job, CPU, LocalReporter(straight, quiet=True))
    with pytest.raises(StoppedError):
        train(job, CPU, StoppingReporter(resumed, quiet=True))
    train(job, CPU, LocalReporter(resumed, quiet=True))
    expected, found = load_file(straight / WEIGHTS), load_file(resumed / WEIGHTS)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    rows = json.loads((resumed / HISTORY).read_text())
    assert [row["epoch"] for row in rows] == [1, 2]
    assert {"mIoU", "mIoU_ms_flip"} <= rows[-1].keys()
    assert torch.are_deterministic_algorithms_enabled()


def test_epochs_of_steps_are_the_stream_of_mmengines_infinite_sampler():
    from itertools import islice

    data = range(7)
    stream = DATA_SAMPLERS.build({"type": "InfiniteSampler", "dataset": data, "seed": 3})
    sampler = DATA_SAMPLERS.build(
        {"type": "StepSampler", "dataset": data, "seed": 3, "batch_size": 5, "steps": 1}
    )
    found = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        found += list(sampler)
    assert found == list(islice(iter(stream), 20))
    assert len(sampler) == 5


SHIPPED = {
    "1x": "mmdet::_base_/schedules/schedule_1x.py",
    "3x": "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py",
    "160k": "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py",
}


@pytest.mark.parametrize(("stage", "group"), [*VARIANTS, ("detect", "mask-rcnn_3x")])
def test_schedules_are_those_of_mmdet_and_mmseg(stage, group, make_job, tmp_path):
    schedule = group.rpartition("_")[2]
    (tmp_path / "shipped.py").write_text(f'_base_ = "{SHIPPED[schedule]}"')
    shipped = Config.fromfile(tmp_path / "shipped.py", import_custom_modules=False)
    job = make_job(stage, group=group)
    config = build_config(job, tmp_path)

    def plain(schedulers):
        return [{k: v for k, v in s.items() if k != "_scope_"} for s in schedulers]

    expected = plain(shipped.param_scheduler)
    if schedule == "3x":
        expected[0]["end"] = 500  # the paper's; mmdet warms up for 1000
    if stage == "segment":
        expected[1]["begin"] = 0  # the paper's decays under the warm-up too
    assert plain(config.param_scheduler) == expected
    cut = 12 if schedule == "1x" else 36
    assert config.train_cfg.max_epochs == (40 if stage == "segment" else cut)


def rates(config, passes):
    """The learning rate of each pass, by mmengine's schedulers."""
    optimizer = torch.optim.SGD(
        [torch.nn.Parameter(torch.zeros(1))], config.optim_wrapper.optimizer.lr
    )
    built = [
        PARAM_SCHEDULERS.build({**s, "optimizer": optimizer, "_scope_": "mmengine"})
        for s in config.param_scheduler
    ]
    found = []
    for _ in range(passes):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in built:
            scheduler.step()
    return found


def test_shares_keep_the_rate_of_each_step_and_the_batch_scales_it(make_job, tmp_path):
    short = {"epochs": 2, "epoch_iters": 50, "warmup_iters": 20}
    plain = build_config(make_job("segment", shares=1, **short), tmp_path)
    split = build_config(make_job("segment", shares=4, **short), tmp_path)
    half = build_config(make_job("segment", batch_size=8, shares=1, **short), tmp_path)
    steps = torch.tensor(rates(plain, 100))
    # As mmcv 1, which the paper used: polynomial from step 0, times the warm-up. mmengine ends
    # both with the last of their steps, mmcv with the one after.
    at = torch.arange(100)
    warm = 1 - (1 - at / 19).clamp(min=0) * (1 - 1e-6)
    torch.testing.assert_close(steps, 6e-5 * (1 - at / 99) * warm, rtol=1e-4, atol=1e-12)
    assert rates(split, 100) == rates(plain, 100)
    torch.testing.assert_close(torch.tensor(rates(half, 100)), steps / 2)
    batches = [c.train_dataloader.batch_size for c in (plain, split, half)]
    assert batches == [16, 4, 8]
    samplers = [c.train_dataloader.sampler for c in (plain, split, half)]
    assert [(s.steps, s.batch_size) for s in samplers] == [(50, 16), (50, 16), (50, 8)]


def test_segmentation_of_other_classes_builds_and_weighs_them(make_job, tmp_path):
    weights = [0.5 + 0.1 * i for i in range(11)]
    job = make_job("segment", group="upernet_finetune", num_classes=11, class_weights=weights)
    config = build_config(job, tmp_path)
    model = build_model(job, tmp_path)
    for head in (model.decode_head, model.auxiliary_head):
        assert head.loss_decode.class_weight == weights
        assert head.conv_seg.out_channels == 11
    assert config.train_dataloader.dataset.dataset.pipeline[3].crop_size == (256, 256)
    plain = make_job("segment", group="upernet_finetune", num_classes=7)
    assert build_model(plain, tmp_path).decode_head.loss_decode.class_weight is None


@pytest.mark.parametrize("recipe", ["elsa_swin_tiny", "swin_tiny"])
@pytest.mark.parametrize(("stage", "group"), VARIANTS)
def test_only_the_backbones_norms_are_not_decayed(recipe, stage, group, make_job, tmp_path):
    """And Swin's position tables, as in its own runs; ELSA's runs decayed them."""
    from mmengine.optim import build_optim_wrapper

    model = {} if recipe == "swin_tiny" else MICRO
    on_gpus = {"num_workers": 8, "use_gpu": True}
    job = make_job(stage, recipe, group, model, on_gpus, amp="none")
    with torch.device("meta"):
        model = build_model(job, tmp_path)
    config = build_config(job, tmp_path)
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    decays = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    norms = [m for m in model.backbone.modules() if isinstance(m, torch.nn.LayerNorm)]
    free = {p for m in norms for p in m.parameters()}
    tables = {p for n, p in model.named_parameters() if n.endswith("relative_position_bias_table")}
    free |= tables if recipe == "swin_tiny" else set()
    assert tables
    assert len(free) > 20
    assert all(decays[p] == 0 for p in free)
    assert {decays[p] for p in model.parameters() if p not in free} == {job.section.weight_decay}
    synced = [m for m in model.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    assert bool(synced) == (group != "mask-rcnn_1x")  # decayed, as the rest of the heads


def test_what_the_paper_says_of_heads_and_augmentation(make_job, tmp_path):
    on_gpu = {"num_workers": 8, "use_gpu": True}
    cascade = make_job("detect", group="cascade-mask-rcnn_1x", scaling=on_gpu)
    config = build_config(cascade, tmp_path)
    for head in config.model.roi_head.bbox_head:
        assert (head.num_shared_convs, head.num_shared_fcs) == (4, 1)
        assert (head.loss_bbox.type, head.loss_bbox.loss_weight) == ("GIoULoss", 10.0)
        assert (head.norm_cfg.type, head.num_classes) == ("SyncBN", 80)
    flip, choice = config.train_dataloader.dataset.dataset.pipeline[2:4]
    assert (flip.type, flip.prob) == ("RandomFlip", 0.5)
    plain, cropped = choice.transforms
    assert plain[0].scales == [(side, 1333) for side in range(480, 801, 32)]
    assert [part.type for part in cropped] == [
        "RandomChoiceResize",
        "RandomCrop",
        "RandomChoiceResize",
    ]
    assert (cropped[0].scales, cropped[1].crop_size) == (
        [(400, 1333), (500, 1333), (600, 1333)],
        (384, 600),
    )
    assert config.train_dataloader.batch_size == 2
    assert (config.optim_wrapper.type, config.optim_wrapper.dtype) == ("AmpOptimWrapper", "float16")

    segment = build_config(make_job("segment", scaling=on_gpu), tmp_path)
    assert segment.optim_wrapper.type == "OptimWrapper"  # float32
    assert segment.model.auxiliary_head.loss_decode.loss_weight == 0.4
    assert segment.model.decode_head.norm_cfg.type == "SyncBN"
    resize, crop = segment.train_dataloader.dataset.dataset.pipeline[2:4]
    assert (resize.scale, resize.ratio_range) == ((2048, 512), (0.5, 2.0))
    assert crop.crop_size == (512, 512)
    assert segment.train_dataloader.dataset.dataset.pipeline[5].type == "PhotoMetricDistortion"
    ratios, flips = segment.tta_pipeline[1].transforms[:2]
    assert [r.scale for r in ratios] == [(2048 * k // 4, 512 * k // 4) for k in (2, 3, 4, 5, 6, 7)]
    assert [f.prob for f in flips] == [0.0, 1.0]

    small = build_config(make_job("detect", img_size=80), tmp_path)
    assert small.val_dataloader.dataset.pipeline[1].scale == (133, 80)
    assert small.train_dataloader.dataset.dataset.pipeline[3].transforms[1][1].crop_size == (38, 60)
    assert small.optim_wrapper.type == "OptimWrapper"  # on a CPU


@pytest.mark.parametrize(
    ("amp", "native", "dtype", "scale"),
    [
        ("auto", True, "bfloat16", {"enabled": False}),
        ("auto", False, "float16", "dynamic"),
        ("float16", True, "float16", "dynamic"),
        ("none", True, None, None),
    ],
)
def test_precision_follows_the_gpu(amp, native, dtype, scale, make_job, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    job = make_job("detect", amp=amp, scaling={"num_workers": 1, "use_gpu": True})
    wrapper = build_config(job, tmp_path).optim_wrapper
    assert (wrapper.get("dtype"), wrapper.get("loss_scale")) == (dtype, scale)


def test_mixed_precision_keeps_scores_boxes_and_losses_in_float32(make_job, tmp_path):
    """With features in bfloat16: what comes of a head's outputs is that of the same in float32."""
    job = make_job("detect", amp="bfloat16", scaling={"num_workers": 1, "use_gpu": True})
    torch.manual_seed(0)
    config = small_config(job, tmp_path)
    DefaultScope._instance_dict.clear()
    init_default_scope("mmdet")
    model = MODELS.build(config.model)
    assert type(model.rpn_head).__name__ == "Float32RPNHead"
    # Who reads the written config registers what it names.
    assert "pipelines.mm.float32" in config.custom_imports.imports
    for group in ("mask-rcnn_1x", "cascade-mask-rcnn_3x", "faster-rcnn_finetune"):
        plain = build_config(make_job("detect", group=group), tmp_path)
        assert {head.type for head in heads_in(plain.model)} <= set(KINDS)
    mixed = torch.autocast("cpu", torch.bfloat16)

    sizes = [16, 8, 4, 2, 1]
    outs = [[torch.randn(1, n, size, size).bfloat16() for size in sizes] for n in (3, 12)]
    meta = [{"img_shape": (64, 64), "pad_shape": (64, 64), "scale_factor": (1.0, 1.0)}]
    with mixed:
        [proposals] = model.rpn_head.predict_by_feat(*outs, batch_img_metas=meta)
    wide = [[t.float() for t in part] for part in outs]
    [expected] = model.rpn_head.predict_by_feat(*wide, batch_img_metas=meta)
    assert len(expected) > 4
    assert torch.equal(proposals.bboxes, expected.bboxes)  # in their order
    assert torch.equal(proposals.scores, expected.scores)

    from mmengine.structures import InstanceData

    truth = [InstanceData(bboxes=torch.tensor([[8.0, 8.0, 40.0, 44.0]]), labels=torch.tensor([3]))]
    torch.manual_seed(1)  # of the sampled anchors
    with mixed:
        ours = model.rpn_head.loss_by_feat(*outs, truth, meta)
    torch.manual_seed(1)
    theirs = model.rpn_head.loss_by_feat(*wide, truth, meta)
    for name, losses in theirs.items():
        assert all(torch.equal(a, b) for a, b in zip(ours[name], losses, strict=True)), name
    assert {t.dtype for losses in ours.values() for t in losses} == {torch.float32}

    head = model.roi_head.bbox_head
    scores, deltas = torch.randn(16, 81).bfloat16(), torch.randn(16, 320).bfloat16()
    corners = torch.rand(16, 2) * 20
    rois = torch.cat([torch.zeros(16, 1), corners, corners + 20], 1)
    arguments = {
        "batch_img_metas": meta,
        "rcnn_test_cfg": model.test_cfg.rcnn,
    }
    with mixed:
        [found] = head.predict_by_feat((rois,), (scores,), (deltas,), **arguments)
    [expected] = head.predict_by_feat((rois,), (scores.float(),), (deltas.float(),), **arguments)
    assert torch.equal(found.bboxes, expected.bboxes)
    assert torch.equal(found.scores, expected.scores)


def test_deterministic_boxes_are_pooled_by_torchvision(make_job, tmp_path):
    """Whose backward pass has deterministic kernels; the features are those of mmcv."""
    plain, deterministic = (
        build_config(make_job("detect", deterministic=wanted), tmp_path).model.roi_head
        for wanted in (False, True)
    )
    DefaultScope._instance_dict.clear()
    init_default_scope("mmdet")
    for part in ("bbox_roi_extractor", "mask_roi_extractor"):
        ours, theirs = MODELS.build(deterministic[part]), MODELS.build(plain[part])
        assert all(layer.use_torchvision for layer in ours.roi_layers)
        maps = [torch.rand(1, 256, size, size) for size in (32, 16, 8, 4)]
        boxes = torch.tensor([[0, 3.3, 4.7, 101.9, 120.1], [0, 8.0, 8.0, 24.0, 30.0]])
        torch.testing.assert_close(ours(maps, boxes), theirs(maps, boxes))


def test_boxes_are_pooled_in_float32_whatever_the_features():
    from pipelines.mm.float32 import Float32RoIExtractor

    extractor = Float32RoIExtractor(
        roi_layer={"type": "RoIAlign", "output_size": 7, "sampling_ratio": 0},
        out_channels=4,
        featmap_strides=[4, 8],
    )
    maps = [torch.rand(1, 4, 40, 40).bfloat16().requires_grad_() for _ in range(2)]
    boxes = torch.tensor([[0, 3.3, 4.7, 101.9, 120.1], [0, 8.0, 8.0, 24.0, 30.0]])
    pooled = extractor(maps, boxes)
    expected = extractor([m.float() for m in maps], boxes)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=0)
    pooled.sum().backward()
    assert maps[0].grad.dtype == torch.bfloat16
