"""Predict with the folder of a trained model, on any image: torch, timm and, for detectors and
segmentors, mmdet and mmseg. No pipeline is needed, and nothing in the folder is executed.

    predictor = load_predictor("weights/detect")
    objects = predictor(image)

Shapes: image (H, W, 3) uint8, RGB; n objects.
"""

import ast
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image

from .checkpoints import CheckpointError, read_state_dict

__all__ = ["Classes", "Labels", "Objects", "Predictor", "load_predictor"]

TENSORS, TIMM_CONFIG, MM_CONFIG = "model.safetensors", "config.json", "config.py"


@dataclass(frozen=True)
class Classes:
    """What an image shows, the likeliest class first."""

    labels: NDArray[np.int64]
    """(classes)"""
    probabilities: NDArray[np.float32]
    """(classes)"""


@dataclass(frozen=True)
class Objects:
    """What is found in an image, the surest first."""

    boxes: NDArray[np.float32]
    """(n, 4): left, top, right, bottom, in pixels of the image."""
    labels: NDArray[np.int64]
    """(n)"""
    scores: NDArray[np.float32]
    """(n)"""
    masks: NDArray[np.bool_] | None
    """(n, H, W); None of a model that finds boxes only."""


@dataclass(frozen=True)
class Labels:
    """What each pixel shows."""

    labels: NDArray[np.int64]
    """(H, W)"""


class Predictor(ABC):
    """A trained model that tells of one image at a time.

    Attributes:
        task: classify, detect or segment.
        classes: names, by label.
    """

    task: str
    classes: tuple[str, ...]

    @abstractmethod
    def __call__(self, image: NDArray[np.uint8]) -> Classes | Objects | Labels:
        """What the model says of an image (H, W, 3), RGB.

        Raises:
            ValueError: it is no such image.
        """


class Classifier(Predictor):
    """A timm model with its own preprocessing.

    Raises:
        CheckpointError: the folder is not whole, or its files don't fit.
    """

    task = "classify"

    def __init__(self, folder: Path, device: torch.device) -> None:
        try:
            model: Any = timm.create_model(f"local-dir:{folder}", pretrained=False)
            config = timm.data.resolve_model_data_config(model)
            transform = timm.data.create_transform(**config)
        except Exception as error:  # from whatever a damaged config makes of it
            raise CheckpointError(f"{folder / TIMM_CONFIG} makes no timm model: {error}") from error
        _load(model, folder)
        self.model: Any = model.to(device).eval()
        self.device, self.transform = device, transform
        names = (model.pretrained_cfg or {}).get("label_names") or range(model.num_classes)
        self.classes = tuple(map(str, names))
        if len(self.classes) != model.num_classes:
            raise CheckpointError(
                f"{folder / TIMM_CONFIG} names {len(self.classes)} classes of {model.num_classes}"
            )

    @torch.inference_mode()
    def __call__(self, image: NDArray[np.uint8]) -> Classes:
        _check(image)
        input = self.transform(Image.fromarray(image)).unsqueeze(0).to(self.device)
        found = self.model(input).float().softmax(-1)[0].sort(descending=True)
        return Classes(found.indices.cpu().numpy(), found.values.cpu().numpy())


class _MMPredictor(Predictor):
    """A model of mmdet or mmseg.

    Raises:
        CheckpointError: the folder is not whole, or its files don't fit.
    """

    scope: str

    def __init__(self, folder: Path, config: Mapping[str, Any], device: torch.device) -> None:
        from mmengine.config import Config
        from mmengine.registry import MODELS, DefaultScope

        import elsa.mm

        self.config = Config(dict(config))
        try:
            with DefaultScope.overwrite_default_scope(self.scope):
                model = MODELS.build(self.config.model)
        except Exception as error:  # from whatever a damaged config makes of it
            raise CheckpointError(f"{folder / MM_CONFIG} makes no model: {error}") from error
        _load(model, folder)
        meta = elsa.mm.load_checkpoint_file(str(folder / TENSORS))["meta"]
        self.classes = tuple(meta.get("dataset_meta", {}).get("classes", ()))
        if not self.classes:
            raise CheckpointError(f"the header of {folder / TENSORS} names no classes")
        model.cfg = self.config
        self.model: Any = model.to(device).eval()

    def _predicted(self, image: NDArray[np.uint8]) -> Any:
        from mmengine.registry import DefaultScope

        _check(image)
        with DefaultScope.overwrite_default_scope(self.scope):
            return self._infer(np.ascontiguousarray(image[..., ::-1]))

    def _infer(self, image: NDArray[np.uint8]) -> Any:
        """mm's own inference of an image (H, W, 3), BGR."""
        raise NotImplementedError


class Detector(_MMPredictor):
    task, scope = "detect", "mmdet"

    def _infer(self, image: NDArray[np.uint8]) -> Any:
        from mmdet.apis import inference_detector

        return inference_detector(self.model, image).pred_instances.cpu().numpy()

    def __call__(self, image: NDArray[np.uint8]) -> Objects:
        found = self._predicted(image)
        order = np.argsort(-found.scores, kind="stable")
        masks = found.masks[order].astype(bool) if "masks" in found else None
        return Objects(found.bboxes[order], found.labels[order], found.scores[order], masks)


class Segmentor(_MMPredictor):
    task, scope = "segment", "mmseg"

    def _infer(self, image: NDArray[np.uint8]) -> Any:
        from mmseg.apis import inference_model

        return inference_model(self.model, image).pred_sem_seg.data

    def __call__(self, image: NDArray[np.uint8]) -> Labels:
        return Labels(self._predicted(image)[0].cpu().numpy().astype(np.int64))


def load_predictor(folder: str | Path, device: str | torch.device = "cpu") -> Predictor:
    """The model of a folder such as `weights/pretrain`, `weights/detect` or `weights/segment`.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks a file.
        CheckpointError: a file is damaged, or its tensors are of another model.
        ModuleNotFoundError: mmdet or mmseg is not installed.
    """
    folder, device = Path(folder), torch.device(device)
    if not (folder / TENSORS).is_file():
        raise FileNotFoundError(f"{folder} has no {TENSORS}")
    if (folder / MM_CONFIG).is_file():
        config = read_config(folder / MM_CONFIG)
        kinds = {kind.scope: kind for kind in (Detector, Segmentor)}
        scope = config.get("default_scope")
        if scope not in kinds or not isinstance(config.get("model"), dict):
            raise CheckpointError(f"{folder / MM_CONFIG} is no config of mmdet or mmseg")
        return kinds[scope](folder, config, device)
    if not (folder / TIMM_CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has neither {TIMM_CONFIG} (timm) nor {MM_CONFIG} (mm)")
    try:
        json.loads((folder / TIMM_CONFIG).read_text())
    except ValueError as error:
        raise CheckpointError(f"{folder / TIMM_CONFIG} is no JSON: {error}") from None
    return Classifier(folder, device)


def read_config(file: Path) -> dict[str, Any]:
    """The values of an mmengine config as it is dumped: literals and `dict(...)`, not executed.

    Raises:
        CheckpointError: it is something else.
    """
    try:
        found = {}
        for node in ast.parse(file.read_text()).body:
            if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
                raise ValueError(f"line {node.lineno} assigns nothing")
            found[node.targets[0].id] = _value(node.value)
        return found
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{file} is no config that mmengine dumped: {error}") from None


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        if ast.unparse(node.func) != "dict" or not all(isinstance(a, ast.Dict) for a in node.args):
            raise ValueError(f"line {node.lineno} calls {ast.unparse(node.func)}")
        found = {str(keyword.arg): _value(keyword.value) for keyword in node.keywords}
        for argument in node.args:  # with keys that are no names
            found |= _value(argument)
        return found
    if isinstance(node, ast.List):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_value(item) for item in node.elts)
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {_value(key): _value(value) for key, value in pairs if key is not None}
    return ast.literal_eval(node)


def _load(model: torch.nn.Module, folder: Path) -> None:
    state = read_state_dict(folder / TENSORS)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{folder / TENSORS} does not fit its config: {error}") from None


def _check(image: NDArray[np.uint8]) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"an image is (H, W, 3) uint8, got {image.shape} {image.dtype}")
