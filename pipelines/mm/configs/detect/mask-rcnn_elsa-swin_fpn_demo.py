"""Mask R-CNN small enough for minutes on CPU cores: digits of 28 to 72 px in 160 px scenes.

Sizes, epochs, rates, classes and paths come from the parameters (pipelines/mm/config.py).
"""

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["elsa.mm"], allow_failed_imports=False)

norm = dict(type="GN", num_groups=8)
channels = 64

model = dict(
    backbone=dict(_delete_=True, type="ELSASwin", arch="micro", drop_path_rate=0.0),
    neck=dict(
        in_channels=[32, 64, 128, 256],
        out_channels=channels,
        num_outs=4,
        norm_cfg=norm,
    ),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        # Upright digits are higher than wide; from 24 px on, an octave per level.
        anchor_generator=dict(scales=[6], ratios=[1.2, 2.2], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=channels,
            featmap_strides=[4, 8],
            finest_scale=48,
            # A fixed number of samples: the adaptive one took half of the time on a CPU.
            roi_layer=dict(sampling_ratio=1),
        ),
        bbox_head=dict(
            in_channels=channels,
            fc_out_channels=256,
            reg_class_agnostic=True,
        ),
        mask_roi_extractor=dict(
            out_channels=channels,
            featmap_strides=[4, 8],
            finest_scale=48,
            roi_layer=dict(output_size=10, sampling_ratio=1),
        ),
        mask_head=dict(
            num_convs=2, in_channels=channels, conv_out_channels=channels, norm_cfg=norm
        ),
    ),
    train_cfg=dict(
        rpn=dict(assigner=dict(pos_iou_thr=0.6), sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=64, max_per_img=32),
        rcnn=dict(sampler=dict(num=24, pos_fraction=0.5), mask_size=20),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=100, max_per_img=32),
        rcnn=dict(score_thr=0.05, max_per_img=30),
    ),
)

# No flips: a mirrored digit is no digit.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomResize", scale=(160, 160), ratio_range=(0.85, 1.25), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(160, 160), allow_negative_crop=False),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(4, 4), by_mask=True),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(
    batch_sampler=None, dataset=dict(filter_cfg=dict(min_size=4), pipeline=train_pipeline)
)
val_dataloader = dict(
    batch_size=8,
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile", backend_args=None),
            dict(type="Resize", scale=(160, 160), keep_ratio=True),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
            dict(
                type="PackDetInputs",
                meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
            ),
        ]
    ),
)
test_dataloader = val_dataloader

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", fused=True, lr=5e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys={"relative_position_bias_table": dict(decay_mult=0.0)},
    ),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type="CosineAnnealingLR",
        begin=0,
        end=5,
        T_max=5,
        eta_min_ratio=0.01,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=5, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
