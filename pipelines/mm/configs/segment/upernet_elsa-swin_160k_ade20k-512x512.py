"""UPerNet, 160,000 steps at 512 px: mmseg's recipe for Swin.

The backbone, steps, rates, classes, sizes and paths come from the parameters
(pipelines/mm/config.py); what stands here for them is that of ELSA-Swin-T. The steps are run as
epochs of equal length (`segment.epoch_iters`), each with its checkpoint.
"""

_base_ = "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
custom_imports = dict(imports=["elsa.mm"], allow_failed_imports=False)

model = dict(backbone=dict(_delete_=True, type="ELSASwin", arch="tiny", drop_path_rate=0.3))

dataset = dict(type="LabelMapDataset")
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)

# The backbone's LayerNorms alone are not decayed; those of the heads are named `bn`.
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True, custom_keys={"norm": dict(decay_mult=0.0)}))
train_cfg = dict(_delete_=True, type="EpochBasedTrainLoop", max_epochs=40, val_interval=4)
