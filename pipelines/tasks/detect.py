"""Detection on COCO's layout, with instance masks or without: mmdet's two-stage detectors."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.data.layout import LAYOUTS
from pipelines.errors import PipelineError
from pipelines.params import Params
from pipelines.tasks.dense import DenseTask, dense_loop, tensors
from pipelines.tasks.task import Forward, Loop, Picture, Prediction, Scene

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from pipelines.data.store import Dataset
    from pipelines.results.scores import Scores

BOXES = {"mask-rcnn": "faster-rcnn", "cascade-mask-rcnn": "cascade-rcnn"}
"""The same methods without masks."""
ROIS, MASK_ROIS = 512, 128
"""Regions per training image that mmdet's heads see: all, and those with a mask."""


class Detect(DenseTask):
    """mmdet's detector."""

    name: ClassVar[str] = "detect"
    stage: ClassVar[str] = "detect"
    loop: ClassVar[Loop] = dense_loop("mmdet")
    dataset: ClassVar[str] = "coco"
    title: ClassVar[str] = "detection (COCO layout)"
    metric: ClassVar[str] = "bbox_mAP"
    reported: ClassVar[tuple[str, ...]] = ("bbox_mAP", "bbox_mAP_50", "segm_mAP", "segm_mAP_50")
    headline: ClassVar[tuple[str, ...]] = reported
    class_score: ClassVar[str] = "bbox_mAP"
    sections: ClassVar[tuple[str, ...]] = ("detect", "scaling")
    artifacts: ClassVar[tuple[str, ...]] = ("results/detect/config.py", "plots/detect")

    def step_model(self, params: Params) -> "tuple[nn.Module, Forward]":
        import torch
        from torch import nn

        self.require_known_method(params)
        size = params.detect.img_size

        def forward(net: Any, count: int, device: "torch.device") -> "list[Tensor]":
            features = net.extract_feat(torch.empty(count, 3, size, size, device=device))
            outputs = list(net.rpn_head(features))
            parts = (("bbox", ROIS), ("mask", MASK_ROIS))
            for part, regions in parts if net.roi_head.with_mask else parts[:1]:
                head = getattr(net.roi_head, f"{part}_head")
                extractor = getattr(net.roi_head, f"{part}_roi_extractor")
                cascade = isinstance(head, nn.ModuleList)
                heads, extractors = (head, extractor) if cascade else ([head], [extractor])
                for one, regions_of in zip(heads, extractors, strict=True):
                    side = regions_of.roi_layers[0].output_size
                    shape = (count * regions, regions_of.out_channels, *side)
                    outputs.append(one(torch.empty(shape, device=device)))
            return tensors(outputs)

        return self.build(params), forward

    def find_dataset(self, params: Params) -> "Dataset":
        from pipelines.mm.config import learns_masks

        found = super().find_dataset(params)
        method = params.detect.method
        if found.without_mask and learns_masks(params.detect):
            raise PipelineError(
                f"{found.without_mask} annotations of {found.place} have no segmentation, and"
                f" detect.method={method} learns masks",
                f"Choose a method of boxes: detect.method={BOXES[method]}"
                if method in BOXES
                else "Choose a config that loads no masks",
            )
        return found

    def score(self, what: Prediction, folder: Path) -> "Scores":
        from pipelines.results import scores

        truth = Path(what.dataset.place) / LAYOUTS[self.dataset].annotations["val"]
        return scores.detection(truth, folder)

    def draw_samples(self, what: Prediction, folder: Path) -> "Figure":
        from pipelines.results import pictures

        return pictures.detections(Path(what.dataset.place), folder, what.params.report.samples)


def _detections(scene: Scene, worst: bool = False) -> "Figure":
    from pipelines.results import pictures

    place, found = Path(scene.datasets["coco"].place), scene.root / "results/detect"
    return pictures.detections(place, found, scene.samples, worst)


def _worst(scene: Scene) -> "Figure":
    return _detections(scene, worst=True)


Detect.pictures = (
    Picture(
        "detections",
        "Detections",
        "Validation images, spread evenly over the set: truth above, predictions below.",
        _detections,
    ),
    Picture(
        "worst_detections",
        "Failures: detection",
        "The validation images with most missed objects and false detections per object (at a"
        " score of 0.5 and an IoU of 0.5 of masks, or of boxes without masks): truth above,"
        " predictions below.",
        _worst,
    ),
)
