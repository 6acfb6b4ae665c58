"""Semantic segmentation on ADE20K's layout: mmseg's UPerNet."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.data.layout import LAYOUTS
from pipelines.params import Params
from pipelines.tasks.dense import DenseTask, dense_loop, tensors
from pipelines.tasks.task import Forward, Loop, Picture, Prediction, Scene

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from pipelines.results.scores import Scores


class Segment(DenseTask):
    """mmseg's segmentor."""

    name: ClassVar[str] = "segment"
    stage: ClassVar[str] = "segment"
    loop: ClassVar[Loop] = dense_loop("mmseg")
    dataset: ClassVar[str] = "ade20k"
    title: ClassVar[str] = "segmentation (ADE20K layout)"
    metric: ClassVar[str] = "mIoU"
    reported: ClassVar[tuple[str, ...]] = ("mIoU", "mIoU_ms_flip", "aAcc")
    headline: ClassVar[tuple[str, ...]] = ("mIoU", "mIoU_ms_flip", "aAcc", "mAcc")
    class_score: ClassVar[str] = "IoU"
    sections: ClassVar[tuple[str, ...]] = ("segment", "scaling")
    artifacts: ClassVar[tuple[str, ...]] = ("results/segment/config.py", "plots/segment")
    has_ms_flip: ClassVar[bool] = True

    def step_model(self, params: Params) -> "tuple[nn.Module, Forward]":
        import torch

        self.require_known_method(params)
        size = params.segment.crop_size

        def forward(net: Any, count: int, device: "torch.device") -> "list[Tensor]":
            features = net.extract_feat(torch.empty(count, 3, size, size, device=device))
            outputs = [net.decode_head(features)]
            if net.with_auxiliary_head:
                outputs.append(net.auxiliary_head(features))
            return tensors(outputs)

        return self.build(params), forward

    def score(self, what: Prediction, folder: Path) -> "Scores":
        from pipelines.results import scores

        masks = folder / "masks"
        masks.mkdir()
        for file in folder.glob("*.png"):
            file.replace(masks / file.name)
        truth = Path(what.dataset.place) / LAYOUTS[self.dataset].annotations["val"]
        return scores.segmentation(truth, masks, what.classes)

    def draw_samples(self, what: Prediction, folder: Path) -> "Figure":
        from pipelines.results import pictures

        place, count = Path(what.dataset.place), what.params.report.samples
        return pictures.segmentations(place, folder / "masks", what.classes, count)


def _segmentations(scene: Scene, worst: bool = False) -> "Figure":
    from pipelines.results import pictures

    data, masks = scene.datasets["ade20k"], scene.root / "results/segment"
    return pictures.segmentations(Path(data.place), masks, data.classes, scene.samples, worst)


def _worst(scene: Scene) -> "Figure":
    return _segmentations(scene, worst=True)


Segment.pictures = (
    Picture(
        "segmentations",
        "Segmentations",
        "Validation images, spread evenly over the set: image, truth, prediction.",
        _segmentations,
    ),
    Picture(
        "worst_segmentations",
        "Failures: segmentation",
        "The validation images with the lowest IoU over their own classes: image, truth,"
        " prediction.",
        _worst,
    ),
)
