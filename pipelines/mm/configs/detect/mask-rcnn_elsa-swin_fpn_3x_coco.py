"""Mask R-CNN, 36 epochs with large-scale jitter and crops: mmdet's recipe for Swin.

The backbone, epochs, rates, classes, sizes and paths come from the parameters
(pipelines/mm/config.py); what stands here for them is that of ELSA-Swin-T.
"""

_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py"
custom_imports = dict(imports=["elsa.mm"], allow_failed_imports=False)

model = dict(
    backbone=dict(_delete_=True, type="ELSASwin", arch="tiny", drop_path_rate=0.2),
)

# The backbone's LayerNorms alone are not decayed.
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True, custom_keys={"norm": dict(decay_mult=0.0)}))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
