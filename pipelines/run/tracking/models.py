"""Weights folders as models that `mlflow.pyfunc` loads and `mlflow models serve` serves."""

import base64
import io
import logging
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow.pyfunc
from mlflow.environment_variables import (
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR,
    MLFLOW_LOG_UV_FILES,
)
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, Schema
from mlflow.types.schema import AnyType
from PIL import Image

from pipelines.paths import ROOT

BASE = ("torch", "torchvision", "timm", "safetensors", "pillow", "ninja", "mlflow")
MM = (
    "onedl-mmcv",
    "onedl-mmengine",
    "onedl-mmdetection",
    "onedl-mmsegmentation",
    "opencv-python-headless",
    "pycocotools",
)
CODE = Path(__file__).with_name("served_model.py")


def write_model(folder: Path, weights: Path, ids: Mapping[str, Any]) -> None:
    """Write a weights folder in MLflow's form: its code, pinned requirements and an example.

    Args:
        folder: to write; it must not exist.
        ids: of the run and the logged model, as `mlflow.models.Model` takes them.
    """
    dense = (weights / "config.py").is_file()
    MLFLOW_LOG_UV_FILES.set(False)  # uv.lock holds addresses of registries
    MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)
    logging.getLogger("mlflow").setLevel(logging.ERROR)  # what it tells is no one's concern here
    names = (*BASE, *MM) if dense else BASE
    with warnings.catch_warnings(action="ignore"):
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(CODE),
            artifacts={"weights": str(weights)},
            code_paths=[str(ROOT / "elsa"), str(ROOT / "ops")],
            signature=ModelSignature(Schema([ColSpec(AnyType())]), Schema([ColSpec(AnyType())])),
            input_example=[example()],
            pip_requirements=[f"{name}=={version(name)}" for name in names],
            mlflow_model=Model(**ids),
        )


def example() -> str:
    """A grey image, as a request has it: a PNG in base64."""
    png = io.BytesIO()
    Image.new("RGB", (64, 64), "gray").save(png, "PNG")
    return base64.b64encode(png.getvalue()).decode()
