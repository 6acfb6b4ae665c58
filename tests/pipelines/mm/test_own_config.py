"""A config file of the user's own: its model over the project's backbone, data and schedule."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.registry import MODELS

from pipelines.data.store import Dataset
from pipelines.errors import PipelineError
from pipelines.mm.checkpoint import HISTORY
from pipelines.mm.checks import check_model
from pipelines.mm.config import build_config
from pipelines.mm.tree import dicts_in
from pipelines.params import compose, flatten, override
from pipelines.tasks import TASKS
from pipelines.tasks.dense import require_a_share_of_each_worker
from pipelines.train.job import Job

DATASETS = {"detect": "coco", "segment": "ade20k"}
MASK2FORMER = "mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py"
SMALLER = """
head = dict(
    num_queries=20,
    pixel_decoder=dict(encoder=dict(num_layers=1)),
    transformer_decoder=dict(num_layers=1),
)
model = dict(panoptic_head=head, train_cfg=dict(num_points=256))
"""
FEWER = "model = dict(num_queries=20, test_cfg=dict(max_per_img=50))"  # than there are positions
CONFIGS = {
    "mask2former": ("detect", MASK2FORMER, SMALLER),
    "retinanet": ("detect", "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", ""),
    "dino": ("detect", "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py", FEWER),
    "rtmdet": ("detect", "mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py", ""),
    "segformer": ("segment", "mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py", ""),
    "pspnet": ("segment", "mmseg::pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py", ""),
    "ocrnet": ("segment", "mmseg::ocrnet/ocrnet_hr18s_4xb4-80k_ade20k-512x512.py", ""),
}


@pytest.fixture
def job(tiny_data: Path, tmp_path: Path) -> Any:
    """A job for a config with these lines."""

    def make(stage: str, text: str, **values: Any) -> Job:
        (tmp_path / "own.py").write_text(text)
        words = [f"{stage}=config_finetune", f"{stage}.config={tmp_path / 'own.py'}"]
        params = compose(["recipe=finetune", *words])
        place = tiny_data / DATASETS[stage]
        classes = tuple(json.loads((place / "manifest.json").read_text())["classes"])
        small = {"batch_size": 2, "epochs": 1, "img_size": 96, "warmup_iters": 1}
        if stage == "segment":
            small["crop_size"] = 64
        values = small | {"num_classes": len(classes), "pretrained": False} | values
        params = override(params, flatten({stage: values}), "test")
        return Job(stage, params, Dataset(DATASETS[stage], str(place), classes, {}, ""))

    return make


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_the_libraries_gets_our_backbone_and_classes(name, job, capsys):
    stage, base, text = CONFIGS[name]
    made = job(stage, f'_base_ = "{base}"\n{text}')
    check_model(made)  # it builds the model
    told = capsys.readouterr().out
    assert "own.py: taken are model" in told
    assert "param_scheduler" in told.partition("not taken are")[2]
    config = build_config(made, Path("unused"))
    assert config.model.backbone.type == "ELSASwin"
    found = {p.num_classes for p in dicts_in(config.model) if "num_classes" in p}
    found |= {p.num_things_classes for p in dicts_in(config.model) if "num_things_classes" in p}
    assert found == {len(made.dataset.classes)}
    assert "80" not in str([p for p in dicts_in(config.model) if "class_weight" in p])
    masks = name in ("mask2former", "rtmdet")
    if stage == "detect":
        assert config.val_evaluator[0]["metric"] == (["bbox", "segm"] if masks else ["bbox"])


@pytest.mark.parametrize("name", ["mask2former", "dino", "segformer"])
def test_it_trains_and_is_evaluated(name, job, tmp_path):
    from pipelines.mm.train import train
    from pipelines.train.reporter import LocalReporter

    stage, base, text = CONFIGS[name]
    made = job(stage, f'_base_ = "{base}"\n{text}')
    train(made, torch.device("cpu"), LocalReporter(tmp_path / "run", quiet=True))
    [row] = json.loads((tmp_path / "run" / HISTORY).read_text())
    assert TASKS[stage].metric in row
    assert row["loss"] > 0


def test_a_config_whose_bases_are_imported_is_the_same(job, tmp_path):
    """mmengine's newer style, with classes in place of names."""
    (tmp_path / "base.py").write_text(
        "from torch import nn\n"
        "from mmdet.models.data_preprocessors import DetDataPreprocessor\n"
        "from mmdet.models import FPN, RetinaHead, RetinaNet\n"
        "from mmdet.models.backbones import ResNet\n"
        "from mmdet.models.losses import FocalLoss\n"
        "from mmdet.datasets.transforms import LoadAnnotations\n"
        "data_preprocessor = dict(type=DetDataPreprocessor, pad_size_divisor=32)\n"
        "loss = dict(type=FocalLoss, use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0)\n"
        "head = dict(type=RetinaHead, num_classes=80, in_channels=256, loss_cls=loss)\n"
        "neck = dict(type=FPN, in_channels=[256, 512, 1024, 2048], out_channels=128, num_outs=5,\n"
        "    act_cfg=dict(type=nn.ReLU))\n"
        "model = dict(type=RetinaNet, data_preprocessor=data_preprocessor, neck=neck,\n"
        "    backbone=dict(type=ResNet, depth=50), bbox_head=head)\n"
        "train_dataloader = dict(dataset=dict(pipeline=[dict(type=LoadAnnotations)]))\n"
    )
    made = job(
        "detect",
        "from mmengine.config import read_base\nwith read_base():\n    from .base import *\n"
        "model.update(neck=dict(out_channels=256), bbox_head=dict(num_classes=3))\n",
    )
    check_model(made)
    found = build_config(made, Path("unused")).model
    assert (found.type, found.neck.type, found.neck.out_channels) == ("RetinaNet", "FPN", 256)
    assert found.backbone.type == "ELSASwin"
    assert found.bbox_head.num_classes == len(made.dataset.classes)


RETINANET = '_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = dict(", "can't be read"),
        ('_base_ = "./not_there.py"', "can't be read"),
        (
            "from mmengine.config import read_base\nwith read_base():\n    from .x import *",
            "can't be read",
        ),
        ('_base_ = "mmseg::_base_/models/fcn_r50-d8.py"\ndefault_scope = "mmseg"', "of mmseg"),
        ('model = dict(type="X", detector=dict())', "no model.backbone to replace: its model is X"),
        ('model = dict(type="X", backbone=dict(type="Y"))', "no neck or head with in_channels"),
        (RETINANET + "model = dict(bbox_head=dict(scales=3))", "no model can be built.*scales"),
        (
            f'_base_ = "{MASK2FORMER}"\n'
            "loss = dict(class_weight=[1.0, 2.0] * 40 + [0.1])\n"
            "model = dict(panoptic_head=dict(loss_cls=loss))",
            "weighs the classes of another data set",
        ),
    ],
)
def test_a_config_that_can_not_be_used_is_told(text, message, job):
    with pytest.raises(PipelineError, match=rf"(?s){message}"):
        check_model(job("detect", text))


@pytest.mark.parametrize("background", [0.1, 1.0, None])
def test_weights_of_classes_fit_the_data(background, job):
    """With one for what is no class, equal to the others or not, or without."""
    rest = [] if background is None else [background]
    loss = f"dict(class_weight={[1.0] * 80 + rest})"
    text = f'_base_ = "{MASK2FORMER}"\nmodel = dict(panoptic_head=dict(loss_cls={loss}))'
    made = job("detect", text)
    model = build_config(made, Path("unused")).model
    assert model.panoptic_head.loss_cls.class_weight == [1.0] * len(made.dataset.classes) + rest


def test_a_missing_file_and_a_method_that_does_not_go_with_it_are_told(job, tmp_path):
    made = job("detect", RETINANET)
    (tmp_path / "own.py").unlink()
    with pytest.raises(PipelineError, match=r"own\.py: there is no such file"):
        check_model(made)
    for change in ("detect.config=own.py", "detect=config_finetune"):
        with pytest.raises(PipelineError, match="method=config goes with the path"):
            compose(["recipe=finetune", change])


def test_the_first_stage_reads_it(tmp_path):
    from pipelines import prepare

    (tmp_path / "own.py").write_text("model = dict(")
    words = ["detect=config_finetune", f"detect.config={tmp_path / 'own.py'}"]
    params = compose(["recipe=finetune", *words, "prepare.source=demo"])
    with pytest.raises(PipelineError, match="can't be read"):
        prepare.STAGE.check(params)


@pytest.mark.parametrize("stage", ["detect", "segment"])
@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_any_timm_model_with_a_pyramid_is_a_backbone(stage, name, make_job, tmp_path):
    """Models that begin with a map at half the size too: heads get strides 4 to 32."""
    group = {"detect": "mask-rcnn_finetune", "segment": "upernet_finetune"}[stage]
    made = make_job(stage, recipe="finetune", group=group, model={"name": name})
    config = build_config(made, tmp_path)
    backbone = MODELS.build(config.model.backbone)
    assert backbone.out_strides == [4, 8, 16, 32]
    first = config.model.neck if stage == "detect" else config.model.decode_head
    assert first.in_channels == backbone.out_channels
    maps = backbone(torch.rand(1, 3, 64, 64))
    assert [y.shape[-1] for y in maps] == [16, 8, 4, 2]


def test_a_backbone_without_a_pyramid_is_told(make_job, tmp_path):
    made = make_job("detect", group="mask-rcnn_1x", model={"name": "vit_tiny_patch16_224"})
    with pytest.raises(PipelineError, match="vit_tiny_patch16_224 has maps with strides 16, 16"):
        build_config(made, tmp_path)


@pytest.mark.parametrize("stage", ["detect", "segment"])
def test_what_its_steps_cost_is_not_known_and_told(stage, job):
    made = job(stage, "model = dict()")
    with pytest.raises(PipelineError, match=r"own\.py computes is not known, so that neither"):
        TASKS[stage].step_model(made.params)


def test_several_workers_take_one_share_each_of_a_model_of_ones_own(make_job: Any) -> None:
    """Losses such as DINO's wait for all workers in each pass."""

    def check(workers: int, shares: int, **values: Any) -> None:
        scaling = {"num_workers": workers, "use_gpu": False}
        require_a_share_of_each_worker(
            make_job("detect", scaling=scaling, batch_size=4, shares=shares, **values)
        )

    own = {"method": "config", "config": "dino.py"}
    check(2, 2, **own)
    check(1, 2, **own)
    check(2, 4)
    with pytest.raises(PipelineError, match=r"shares=4 and scaling\.num_workers=2 must be equal"):
        check(2, 4, **own)
    check(2, 4, cfg_options={"model.rpn_head.anchor_generator.scales": [4]})
    head = {"model.rpn_head.loss_cls": {"type": "FocalLoss"}}
    with pytest.raises(PipelineError, match=r"detect\.cfg_options\.model.rpn_head.loss_cls.type: "):
        check(2, 4, cfg_options=head)


def test_a_quote_counts_the_images_of_the_last_evaluation_as_large_as_they_are() -> None:
    params = compose(["recipe=demo"])
    dataset = Dataset("ade20k", "x", tuple(map(str, range(11))), {"val": 100}, "")
    each, whole = TASKS["segment"].evaluated_images(params, dataset)
    evaluations = -(-params.segment.epochs // params.segment.val_interval)
    # Three sizes, each mirrored too.
    assert (each, whole) == (100, 100 * (evaluations + 2 * (0.75**2 + 1 + 1.25**2)))
