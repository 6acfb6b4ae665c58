"""RoI features in mixed precision. Apart from `pipelines.mm`, for it imports mmdet."""

from collections.abc import Sequence

from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmengine.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class Float32RoIExtractor(SingleRoIExtractor):
    """mmdet's extractor in float32, whatever precision the features have.

    RoIAlign has no bfloat16 kernel, and mmdet would round the boxes to the features' precision.
    """

    def forward(
        self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None
    ) -> Tensor:
        """Features (B, C, H_i, W_i), boxes (n, 5) -> (n, C, h, w)."""
        return super().forward(tuple(x.float() for x in feats), rois.float(), roi_scale_factor)
