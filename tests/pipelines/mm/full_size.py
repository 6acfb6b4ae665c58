"""Jobs of the full-size recipes on tiny data, with models small enough for a CPU."""

import torch
from mmengine.registry import MODELS, DefaultScope, init_default_scope

from pipelines.mm.config import build_config

DATASETS = {"detect": "coco", "segment": "ade20k"}
VARIANTS = [
    ("detect", "mask-rcnn_1x"),
    ("detect", "cascade-mask-rcnn_3x"),
    ("segment", "upernet_160k"),
]
CPU = torch.device("cpu")
ON_CPU = {"num_workers": 1, "use_gpu": False}
MICRO = {"name": "elsa_swin_micro", "depths": [1, 1, 1, 1]}
SMALL = {
    "detect": {"num_classes": 10, "img_size": 64, "epochs": 1},
    "segment": {"num_classes": 11, "img_size": 64, "crop_size": 64, "epochs": 1, "epoch_iters": 2},
}
SHORT = {"batch_size": 4, "shares": 2, "warmup_iters": 1, "val_interval": 1}


def small_config(*args):
    """`build_config` with narrow heads and few boxes: the real ones take minutes on a CPU."""
    config = build_config(*args)
    model = config.model
    if "decode_head" in model:
        model.decode_head.channels = model.auxiliary_head.channels = 32
        return config
    heads, stages = model.roi_head.bbox_head, model.train_cfg.rcnn
    for head in heads if isinstance(heads, list) else [heads]:
        head.fc_out_channels = 16
        if "conv_out_channels" in head:
            head.conv_out_channels = 16
    for stage in stages if isinstance(stages, list) else [stages]:
        stage.sampler.num = 8
    model.train_cfg.rpn_proposal.max_per_img = model.test_cfg.rpn.max_per_img = 16
    return config


def build_model(job, tmp_path):
    config = small_config(job, tmp_path)
    DefaultScope._instance_dict.clear()
    init_default_scope(config.default_scope)
    return MODELS.build(config.model)
