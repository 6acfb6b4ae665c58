"""Cascade Mask R-CNN, 12 epochs; otherwise as for 36."""

_base_ = "./cascade-mask-rcnn_elsa-swin_fpn_3x_coco.py"

train_cfg = dict(max_epochs=12)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
