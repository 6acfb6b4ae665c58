"""Cascade Mask R-CNN with 4conv1fc boxes, SyncBN and GIoU, 36 epochs: mmdet's heads for ConvNeXt.

The backbone, epochs, rates, classes, sizes and paths come from the parameters
(pipelines/mm/config.py); what stands here for them is that of ELSA-Swin-T.
"""

_base_ = (
    "mmdet::convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py"
)
custom_imports = dict(imports=["elsa.mm"], allow_failed_imports=False)

model = dict(
    backbone=dict(_delete_=True, type="ELSASwin", arch="tiny", drop_path_rate=0.2),
)

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # The backbone's LayerNorms; those of the heads are named `bn`.
    paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
