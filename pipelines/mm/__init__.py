"""mmdet and mmseg on the pipeline's models: `custom_imports = dict(imports=["pipelines.mm"])`.

Importing it registers the backbones, the hook and the metric with mmengine's root
registries, where mmdet and mmseg both look.
"""

from pipelines.mm.backbone import ELSASwin, TimmBackbone
from pipelines.mm.hooks import MaskImages, ReportHook, seed_workers_by_loader

__all__ = ["ELSASwin", "MaskImages", "ReportHook", "TimmBackbone", "seed_workers_by_loader"]
