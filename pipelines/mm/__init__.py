"""mmdet and mmseg on the pipeline's models: `custom_imports = dict(imports=["pipelines.mm"])`.

Importing it registers the backbones, the training loop, its data and the rest with mmengine's root
registries, where mmdet and mmseg both look.
"""

from elsa.mm import ELSASwin, TimmBackbone
from pipelines.mm.hooks import MaskImages, ReportHook
from pipelines.mm.loading import IntervalSampler, ResumableBatchSampler, TrainingDataset
from pipelines.mm.loop import ResumableTrainLoop

__all__ = [
    "ELSASwin",
    "IntervalSampler",
    "MaskImages",
    "ReportHook",
    "ResumableBatchSampler",
    "ResumableTrainLoop",
    "TimmBackbone",
    "TrainingDataset",
]
