"""Two-stage detectors of mmdet as graphs, between which numpy decides what to look at.

    model   images -> the feature maps, and scores and shifts of the anchors
    boxes   feature maps and proposals -> scores and shifts of the boxes
    masks   feature maps and boxes -> logits of the masks, of a detector that has them

`elsa.run_exported` has what lies between: anchors, decoding, suppression, pasting.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .export import ExportError, Graph, any_batch, example
from .predict import Detector

__all__ = ["detector_graphs"]


class _Proposing(nn.Module):
    """Images (B, 3, H, W), RGB from 0 to 255, to the maps that the heads take and, for each level,
    scores (B, anchors, h, w) and shifts (B, 4 * anchors, h, w)."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, levels: int) -> None:
        super().__init__()
        self.model, self.levels = model, levels
        given = model.data_preprocessor
        self.divisor = given.pad_size_divisor
        for name in ("mean", "std"):
            self.register_buffer(name, getattr(given, name).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        images = (images - self.mean) / self.std
        right, bottom = (-side % self.divisor for side in (images.shape[3], images.shape[2]))
        maps = self.model.extract_feat(nn.functional.pad(images, (0, right, 0, bottom)))
        scores, shifts = self.model.rpn_head(maps)
        return (*maps[: self.levels], *(score.sigmoid() for score in scores), *shifts)


class _Looking(nn.Module):
    """Feature maps and, last, boxes (n, 5) with the image's number first, to what a head says of
    each box."""

    def __init__(self, extractor: Any, head: Any) -> None:
        super().__init__()
        self.extractor, self.head = extractor, head

    def forward(self, *arguments: Tensor) -> Any:
        from torchvision.ops import roi_align

        maps, boxes = arguments[:-1], arguments[-1]
        level = self.extractor.map_roi_levels(boxes, len(maps)).view(-1, 1, 1, 1)
        pooled = []
        for number, one in enumerate(maps):
            layer = self.extractor.roi_layers[number]
            side, ratio = layer.output_size, layer.sampling_ratio
            looked = roi_align(one, boxes, side, layer.spatial_scale, ratio, layer.aligned)
            pooled.append(torch.where(level == number, looked, torch.zeros_like(looked)))
        found = self.head(torch.stack(pooled).sum(0))
        return (found[0].softmax(-1), found[1]) if isinstance(found, tuple) else found


def detector_graphs(
    predictor: Detector, size: tuple[int, int] | None
) -> tuple[list[Graph], dict[str, Any]]:
    """The graphs of a detector, and what a reader of them must know.

    Args:
        size: (H, W) of the images, into which pictures are fitted; None takes that of the model's
            evaluation.

    Raises:
        ExportError: it is no Mask R-CNN or Faster R-CNN with one stage of boxes.
    """
    described = _described(predictor, size)
    roi, images = predictor.model.roi_head, example(described["size"])
    extractors = [roi.bbox_roi_extractor, *([roi.mask_roi_extractor] if roi.with_mask else [])]
    levels = max(len(extractor.roi_layers) for extractor in extractors)
    proposing = _Proposing(predictor.model, levels).eval()
    with torch.no_grad():
        outputs = proposing(images)
    maps = tuple(f"map{i}" for i in range(levels))
    count = len(described["strides"])
    found = [f"{kind}{i}" for kind in ("scores", "shifts") for i in range(count)]
    graphs = [Graph("model", proposing, (images,), any_batch(), ("images",), (*maps, *found))]

    boxes = torch.tensor([[0.0, 1, 2, 30, 20], [1, 4, 4, 25, 28], [1, 0, 0, 9, 9]])
    heads: list[tuple[str, Any, Any, tuple[str, ...]]] = [
        ("boxes", roi.bbox_roi_extractor, roi.bbox_head, ("scores", "shifts"))
    ]
    if described["masks"]:
        heads.append(("masks", roi.mask_roi_extractor, roi.mask_head, ("logits",)))
    for name, extractor, head, results in heads:
        batch, number = torch.export.Dim("batch", min=1), torch.export.Dim("boxes", min=1)
        used = maps[: len(extractor.roi_layers)]
        dynamic = ((*({0: batch} for _ in used), {0: number}),)
        arguments = (*outputs[: len(used)], boxes)
        module = _Looking(extractor, head).eval()
        graphs.append(Graph(name, module, arguments, dynamic, (*used, "boxes"), results))
    return graphs, described


def _described(predictor: Detector, size: tuple[int, int] | None) -> dict[str, Any]:
    model = predictor.model
    kind = type(model).__name__
    roi: Any = getattr(model, "roi_head", None)
    if kind not in ("FasterRCNN", "MaskRCNN") or type(roi).__name__ != "StandardRoIHead":
        raise ExportError(
            f"a {kind} with {type(roi).__name__} is not exported, only Mask R-CNN and Faster R-CNN"
        )
    rpn, boxes = model.rpn_head, roi.bbox_head
    if size is None:
        steps = predictor.config.test_pipeline
        scale = next(step["scale"] for step in steps if str(step["type"]).endswith("Resize"))
        size = min(scale), max(scale)
    anchors = rpn.prior_generator
    for limits in (model.test_cfg.rpn, model.test_cfg.rcnn):
        if limits.nms.get("type", "nms") != "nms":
            raise ExportError(f"a detector with {limits.nms.type} is not exported")
    return {
        "task": "detect",
        "classes": list(predictor.classes),
        "size": [int(side) for side in size],
        "pad": model.data_preprocessor.mean.flatten().tolist(),
        "masks": bool(roi.with_mask),
        "strides": [list(map(int, stride)) for stride in anchors.strides],
        "anchors": [one.tolist() for one in anchors.base_anchors],
        "rpn": _limits(model.test_cfg.rpn, rpn.bbox_coder),
        "rcnn": _limits(model.test_cfg.rcnn, boxes.bbox_coder),
    }


def _limits(test: Any, coder: Any) -> dict[str, Any]:
    """How many boxes are kept, and what their shifts are measured in."""
    if coder.add_ctr_clamp or not coder.clip_border:
        raise ExportError("a detector whose boxes may leave the image is not exported")
    return {
        "before": test.get("nms_pre", -1),
        "smallest": test.get("min_bbox_size", -1),
        "least": test.get("score_thr", 0.0),
        "overlap": test.nms.iou_threshold,
        "most": test.max_per_img,
        "mask": test.get("mask_thr_binary", 0.5),
        "means": list(coder.means),
        "stds": list(coder.stds),
    }
