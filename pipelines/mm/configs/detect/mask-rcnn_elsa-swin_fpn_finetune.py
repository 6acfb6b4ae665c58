"""Mask R-CNN for data of one's own, on CPU cores: objects of any shape and size.

The heads are as narrow as the demo's, with group norm (batches are small); anchors of two
sizes per level from 16 px on. Sizes, epochs, rates, classes and paths come from the parameters
(pipelines/mm/config.py).
"""

_base_ = "./mask-rcnn_elsa-swin_fpn_demo.py"

channels = 64
strides = [4, 8, 16, 32, 64]

model = dict(
    neck=dict(out_channels=channels, num_outs=5),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[4, 8], ratios=[0.5, 1.0, 2.0], strides=strides),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=channels,
            featmap_strides=[4, 8, 16, 32],
            finest_scale=56,
            roi_layer=dict(sampling_ratio=1),
        ),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, reg_class_agnostic=False),
        mask_roi_extractor=dict(
            out_channels=channels,
            featmap_strides=[4, 8, 16, 32],
            finest_scale=56,
            roi_layer=dict(output_size=14, sampling_ratio=1),
        ),
        mask_head=dict(in_channels=channels, conv_out_channels=channels),
    ),
    train_cfg=dict(
        rpn=dict(assigner=dict(pos_iou_thr=0.6), sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=64, pos_fraction=0.25), mask_size=28),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(score_thr=0.05, max_per_img=100),
    ),
)

# The short side is `detect.img_size`; crops are square.
scale = (1333, 800)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomResize", scale=scale, ratio_range=(0.75, 1.33), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(800, 800), allow_negative_crop=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    # An image without objects teaches what is none.
    dict(type="FilterAnnotations", min_gt_bbox_wh=(2, 2), by_mask=True, keep_empty=False),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(
    dataset=dict(filter_cfg=dict(filter_empty_gt=False, min_size=4), pipeline=train_pipeline)
)
val_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile", backend_args=None),
            dict(type="Resize", scale=scale, keep_ratio=True),
            dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
            dict(
                type="PackDetInputs",
                meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
            ),
        ]
    ),
)
test_dataloader = val_dataloader
