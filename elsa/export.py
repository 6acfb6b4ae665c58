"""Models as graphs that run without this project.

`elsa.export_onnx` and `elsa.export_pt2` write them as files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .predict import Classifier, Predictor, Segmentor

__all__ = ["ExportError", "Graph", "any_batch", "example", "image_graph"]


class ExportError(RuntimeError):
    """A model or a machine that can't export, with the reason."""


@dataclass(frozen=True)
class Graph:
    """A part of a model that becomes one file."""

    name: str
    """`model`; of a detector also `boxes` and `masks`."""
    module: nn.Module
    """In float32 on the CPU, in evaluation mode."""
    arguments: tuple[Tensor, ...]
    """Examples of what it takes."""
    dynamic: tuple[Any, ...]
    """The free dimensions of these, as `torch.export` has them."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def trace(self) -> torch.export.ExportedProgram:
        """Its operations, for any size of the free dimensions.

        Raises:
            ExportError: torch can't trace it.
        """
        try:
            with torch.no_grad():
                return torch.export.export(self.module, self.arguments, dynamic_shapes=self.dynamic)
        except Exception as error:  # of whatever the model does that has no graph
            raise ExportError(f"torch can't trace the model: {error}") from error


class _Normalised(nn.Module):
    """A model of images as they are: it takes RGB from 0 to 255.

    Shape: (B, 3, H, W) float32 to (B, classes) of a classifier, (B, classes, H, W) of a segmentor;
    both logits.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model((images - self.mean) / self.std)
        return logits


class _Segmentor(nn.Module):
    """mmseg's model from normalised images to logits of their size."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.corners: bool = model.align_corners

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model._forward(images)
        size = images.shape[2:]
        return nn.functional.interpolate(logits, size, None, "bilinear", self.corners)


def image_graph(
    predictor: Predictor, size: tuple[int, int] | None
) -> tuple[list[Graph], dict[str, Any]]:
    """The only graph of a classifier or segmentor, and what a reader of the file must know.

    Args:
        size: (H, W) of the images; None takes that of the model's evaluation.

    Returns:
        The graph; and `task`, `classes`, `size` (H, W), `resize` (the side to scale to before a
        centre crop of `size`: the short one or, with `squash`, both; 0 scales to `size`),
        `interpolation`.

    Raises:
        ExportError: a classifier of images that are no squares, or another kind of model.
    """
    if isinstance(predictor, Classifier):
        config: Any = predictor.model.pretrained_cfg
        height, width = size or config["input_size"][1:]
        mode = config.get("crop_mode") or "center"
        if height != width or mode not in ("center", "squash"):
            raise ExportError(f"a classifier of {height} x {width} images by crop_mode={mode}")
        model = _Normalised(
            predictor.model, [255 * v for v in config["mean"]], [255 * v for v in config["std"]]
        )
        how: dict[str, Any] = {
            "resize": math.floor(height / config["crop_pct"]),
            "squash": mode == "squash",
            "interpolation": config["interpolation"],
        }
    elif isinstance(predictor, Segmentor):
        given = predictor.model.data_preprocessor
        model = _Normalised(_Segmentor(predictor.model), given.mean.flatten(), given.std.flatten())
        height, width = size or _evaluated_size(predictor)
        how = {"resize": 0, "squash": True, "interpolation": "bilinear"}
    else:
        raise ExportError(f"a model for {predictor.task} has no single graph")
    described = {"task": predictor.task, "classes": list(predictor.classes), **how}
    images = (example((height, width)),)
    graph = Graph("model", model.eval(), images, any_batch(), ("images",), ("logits",))
    return [graph], {**described, "size": [int(height), int(width)]}


def _evaluated_size(predictor: Segmentor) -> tuple[int, int]:
    """Height and width of the evaluated images; their short side, where these have any shape."""
    steps = predictor.config.test_pipeline
    scale = next(step["scale"] for step in steps if str(step["type"]).endswith("Resize"))
    side = min(scale)
    return side, side


def example(size: Sequence[int], batch: int = 2) -> Tensor:
    """Images (batch, 3, H, W) float32, RGB from 0 to 255, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return 255 * torch.rand(batch, 3, *size, generator=generator)


def any_batch() -> tuple[dict[int, Any]]:
    """The first dimension of the only argument is free."""
    return ({0: torch.export.Dim("batch", min=1)},)
