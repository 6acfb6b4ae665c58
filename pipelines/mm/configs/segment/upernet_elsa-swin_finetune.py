"""UPerNet for data of one's own, on CPU cores or a GPU: any number of classes.

Heads of 64 channels with group norm (batches are small). Sizes, epochs,
rates, classes, their weights and paths come from the parameters (pipelines/mm/config.py).
"""

_base_ = "./upernet_elsa-swin_demo.py"

channels = 64

model = dict(
    decode_head=dict(channels=channels, dropout_ratio=0.1, loss_decode=dict(class_weight=None)),
    auxiliary_head=dict(
        channels=channels,
        dropout_ratio=0.1,
        loss_decode=dict(class_weight=None, loss_weight=0.4),
    ),
)

# The short side is `segment.img_size`; crops are square.
scale = (2048, 512)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=scale, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=1, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
