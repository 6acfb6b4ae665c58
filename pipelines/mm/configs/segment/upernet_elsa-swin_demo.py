"""UPerNet small enough for minutes on CPU cores: digits and background in 160 px scenes.

Sizes, epochs, rates, classes and paths come from the parameters (pipelines/mm/config.py).
"""

_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/default_runtime.py",
]
custom_imports = dict(imports=["elsa.mm"], allow_failed_imports=False)

# Group norm: batches are small, and synchronised batch norm has no CPU kernel.
norm = dict(type="GN", num_groups=8)
# The ten digits, then the background that fills most of the pixels.
weights = [1.0] * 10 + [0.3]
# At a stride of 16 px a stroke's shape is lost, but which digit it is part of is not: the
# auxiliary head learns that alone.
digit_weights = [1.0] * 10 + [0.0]

model = dict(
    backbone=dict(_delete_=True, type="ELSASwin", arch="micro", drop_path_rate=0.0),
    decode_head=dict(
        in_channels=[32, 64, 128, 256],
        channels=48,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=norm,
        loss_decode=dict(class_weight=weights),
    ),
    auxiliary_head=dict(
        in_channels=128,
        channels=48,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=norm,
        loss_decode=dict(class_weight=digit_weights, loss_weight=1.0),
    ),
)

# No flips: a mirrored digit is no digit.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(160, 160), ratio_range=(0.75, 1.25), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(128, 128)),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(160, 160), keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [
                dict(type="Resize", scale_factor=ratio, keep_ratio=True)
                for ratio in (0.75, 1.0, 1.25)
            ],
            [
                dict(type="RandomFlip", prob=0.0, direction="horizontal"),
                dict(type="RandomFlip", prob=1.0, direction="horizontal"),
            ],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
tta_model = dict(type="SegTTAModel")
dataset = dict(type="LabelMapDataset")
train_dataloader = dict(
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(**dataset, pipeline=train_pipeline),
)
val_dataloader = dict(batch_size=8, dataset=dict(**dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", fused=True, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys={"relative_position_bias_table": dict(decay_mult=0.0)},
    ),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type="PolyLR",
        begin=0,
        end=6,
        power=1.0,
        eta_min=0.0,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=6, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
