"""The model in MLflow's own form: code that MLflow keeps beside the weights and runs to load them.

It needs `elsa` and what `elsa` needs, no pipeline. Nothing is pickled.
"""

import base64
import binascii
import io
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from elsa.predict import Objects


class ServedModel(PythonModel):
    """Answers for each image, as JSON can hold it.

    classify: `classes` and `probabilities`, the likeliest first. detect: `boxes` (left, top, width,
    height), `classes`, `scores`, and `masks` (COCO's run lengths) where the model finds them.
    segment: `classes` and `labels`, a PNG in base64 whose values count the classes from 0.
    """

    def load_context(self, context: Any) -> None:
        # Here, for MLflow runs this file to log a model, and these take seconds.
        import torch

        from elsa.predict import load_predictor

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.predictor = load_predictor(context.artifacts["weights"], device)

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Predict images.

        Args:
            model_input: one column (MLflow makes it of a list): encoded images as bytes or
                base64, arrays (H, W, 3) uint8 in RGB, or, unless a server asks, paths.

        Raises:
            MlflowException: something else; names it.
        """
        if len(model_input.columns) != 1:
            names = list(model_input.columns)
            raise _rejected(f"a table with the columns {names}; give one, of images")
        return [self._answer(read_image(one)) for one in model_input.iloc[:, 0]]

    def _answer(self, image: "np.ndarray[Any, Any]") -> dict[str, Any]:
        found: Any = self.predictor(image)
        names = self.predictor.classes
        if self.predictor.task == "classify":
            order = [names[label] for label in found.labels]
            return {"classes": order, "probabilities": found.probabilities.tolist()}
        if self.predictor.task == "segment":
            png = io.BytesIO()
            Image.fromarray(found.labels.astype(np.uint16)).save(png, "PNG")
            labels = base64.b64encode(png.getvalue()).decode()
            return {"classes": list(names), "labels": labels}
        return _objects(found, names)


def _objects(found: "Objects", names: tuple[str, ...]) -> dict[str, Any]:
    boxes = found.boxes.copy()
    boxes[:, 2:] -= boxes[:, :2]
    answer: dict[str, Any] = {
        "boxes": boxes.tolist(),
        "classes": [names[label] for label in found.labels],
        "scores": found.scores.tolist(),
    }
    if found.masks is not None:
        from pycocotools import mask as masks

        encoded = [masks.encode(np.asfortranarray(m.astype(np.uint8))) for m in found.masks]
        answer["masks"] = [{**one, "counts": one["counts"].decode()} for one in encoded]
    return answer


def read_image(value: Any) -> "np.ndarray[Any, Any]":
    """An image of any form that `predict` takes, as (H, W, 3) uint8.

    Raises:
        MlflowException: it is none.
    """
    if isinstance(value, np.ndarray | list):
        try:
            array = np.asarray(value)
        except ValueError:
            raise _rejected("nested lists of unlike length") from None
        if array.dtype.kind not in "buif":
            raise _rejected(f"an array of {array.dtype}; an image has numbers from 0 to 255")
        if array.ndim != 3 or array.shape[2] != 3 or not array.size:
            raise _rejected(f"an array of shape {array.shape}; an image is (height, width, 3)")
        if not (array.min() >= 0 and array.max() <= 255):  # also of what is not a number
            raise _rejected("an array with values outside 0 to 255")
        return array.astype(np.uint8)
    if isinstance(value, str | Path):
        value = _bytes_of(str(value))
    if not isinstance(value, bytes):
        raise _rejected(f"{type(value).__name__}; give bytes, base64 or an array")
    try:
        with Image.open(io.BytesIO(value)) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _rejected(f"it does not decode: {error}") from None


def _bytes_of(text: str) -> bytes:
    # Who asks a server must not read the server's files.
    served = "mlflow.pyfunc.scoring_server.app" in sys.modules
    if not served and len(text) < 4096:
        with suppress(OSError, ValueError):  # no such file, or no name of one
            return Path(text).read_bytes()
    try:
        return base64.b64decode(text.rpartition("base64,")[2], validate=True)
    except (binascii.Error, ValueError):
        where = "" if served else " nor a file that is there"
        raise _rejected(f"a text that is no base64{where}: {text[:60]!r}") from None


def _rejected(what: str) -> mlflow.MlflowException:
    return mlflow.MlflowException(f"no image: {what}", error_code=INVALID_PARAMETER_VALUE)


mlflow.models.set_model(ServedModel())
