"""mmdet and mmseg on the pipeline's models: `custom_imports = dict(imports=["pipelines.mm"])`.

Importing it registers the backbones, the hook, the metric and the sampler with mmengine's
root registries, where mmdet and mmseg both look.
"""

from pipelines.mm.backbone import ELSASwin, TimmBackbone
from pipelines.mm.hooks import MaskImages, ReportHook, seed_workers_by_loader
from pipelines.mm.sampler import IntervalSampler

__all__ = [
    "ELSASwin",
    "IntervalSampler",
    "MaskImages",
    "ReportHook",
    "TimmBackbone",
    "seed_workers_by_loader",
]
