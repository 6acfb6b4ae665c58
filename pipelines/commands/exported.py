"""A file that `elsa export` wrote, where a command takes weights."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from elsa.predict import Classes, Labels, Objects, Predictor
from elsa.run_exported import Exported
from pipelines.errors import PipelineError

SUFFIXES = (".onnx", ".pt2")


def is_export(weights: str) -> bool:
    return Path(weights).suffix in SUFFIXES


def load(weights: str, task: str | None = None) -> Exported:
    """The exported model of a file.

    Args:
        task: that it must be for; None takes any.

    Raises:
        PipelineError: it can't be read, or is for another task.
    """
    try:
        exported = Exported(Path(weights).expanduser())
    except (OSError, ValueError, ImportError) as error:
        raise PipelineError(f"--weights {weights}: {error}") from error
    if task and exported.task != task:
        raise PipelineError(f"{weights} is for --task {exported.task}, not {task}")
    return exported


class ExportedPredictor(Predictor):
    """An export that answers as the weights do."""

    def __init__(self, exported: Exported) -> None:
        self.exported, self.task = exported, exported.task
        self.classes = tuple(exported.classes)

    def __call__(self, image: NDArray[np.uint8]) -> Classes | Objects | Labels:
        picture = Image.fromarray(image)
        if self.task == "detect":
            found = self.exported.find(picture)
            return Objects(found.boxes, found.labels, found.scores, found.masks)
        if self.task == "segment":
            return Labels(self.exported.labels(picture))
        logits: Any = self.exported(picture)
        exponents = np.exp(logits - logits.max())
        order = np.argsort(-exponents, kind="stable")
        return Classes(order, exponents[order] / exponents.sum())
