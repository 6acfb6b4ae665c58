"""What detection computes in float32 under mixed precision. Apart from `pipelines.mm`, for it
imports mmdet.

The published runs kept scores, decoding of boxes and losses in float32 (mmdet 2's `force_fp32`);
mmdet 3 has no such casts, and a score in bfloat16 ties and reorders proposals.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

import torch
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.registry import MODELS
from torch import Tensor

from pipelines.mm.tree import dicts_in

HEADS = ("rpn_head", "bbox_head", "mask_head")
"""Keys of heads in mmdet's configs."""
KINDS = ("RPNHead", "Shared2FCBBoxHead", "ConvFCBBoxHead", "FCNMaskHead")
"""Of our configs: registered with this module, so that a written config can be read elsewhere."""
METHODS = (
    "loss_by_feat",
    "predict_by_feat",
    "loss_and_target",
    "refine_bboxes",
    "regress_by_class",
)
"""Those of a head that take its outputs."""


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


def keep_float32(config: Any) -> None:
    """Change the config of a detector to heads and extractors that compute as above."""
    config.custom_imports.imports.append(__name__)
    for head in heads_in(config.model):
        head.type = float32_head(head.type)
    for part in dicts_in(config.model):
        if part.get("type") == "SingleRoIExtractor":
            part.type = "Float32RoIExtractor"


def float32_head(kind: str) -> str:
    """Registered name of mmdet's head `kind` with its scores, boxes and losses in float32."""
    name = f"Float32{kind}"
    if name not in MODELS:
        plain = MODELS.get(kind)
        methods = {m: _in_float32(getattr(plain, m)) for m in METHODS if hasattr(plain, m)}
        MODELS.register_module(name, module=type(name, (plain,), methods))
    return name


def _in_float32(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def cast(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        device = next(self.parameters()).device.type
        with torch.autocast(device, enabled=False):
            return method(self, *_widened(args), **_widened(kwargs))

    return cast


def _widened(value: Any) -> Any:
    """The halves in lists, tuples and dicts as float32."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if type(value) in (list, tuple):
        return type(value)(map(_widened, value))
    if type(value) is dict:
        return {key: _widened(item) for key, item in value.items()}
    return value


def heads_in(config: Any) -> Iterator[Any]:
    """The configs of the heads in a detector's config."""
    for part in dicts_in(config):
        for key in HEADS:
            found = part.get(key)
            for head in found if isinstance(found, list) else [found]:
                if isinstance(head, dict) and "type" in head:
                    yield head


for _kind in KINDS:
    float32_head(_kind)
