"""The weights of a workspace, in the hands of timm, mmdet, mmseg and MLflow."""

import base64
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import timm
import torch
from PIL import Image

import elsa  # noqa: F401  registers the models

from .conftest import free_port

PICTURES = {"pretrain": "imagenet/val", "detect": "coco/val2017", "segment": "ade20k/images"}


def pictures(root: Path, stage: str) -> list[Path]:
    """Validation images of the stage's data set, in order."""
    place = root / "data" / PICTURES[stage]
    files = sorted(f for f in place.rglob("*") if f.suffix.lower() in (".jpg", ".jpeg"))
    return [file for file in files if "training" not in file.parts]


def pixels(file: Path) -> Any:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def score_of_timm(root: Path) -> float:
    """Top-1 in percent, by timm alone."""
    model = timm.create_model(f"local-dir:{root / 'weights/pretrain'}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    dataset = timm.data.create_dataset("", root=str(root / "data/imagenet/val"))
    dataset.transform = timm.data.create_transform(**config)
    assert model.pretrained_cfg["label_names"] == list(dataset.reader.class_to_idx)
    images = torch.stack([image for image, _ in dataset])
    with torch.inference_mode():
        found = torch.cat([model(part).argmax(1) for part in images.split(50)])
    return 100 * (found == torch.tensor([target for _, target in dataset])).float().mean().item()


def score_of_mm(root: Path, stage: str, work: Path) -> dict[str, float]:
    """What the Runner of mmdet's and mmseg's tools/test.py says, with the working folder `root`."""
    from mmengine.config import Config
    from mmengine.runner import Runner

    config = Config.fromfile(root / f"weights/{stage}/config.py")
    config.load_from = str(root / f"weights/{stage}/model.safetensors")
    config.work_dir, config.experiment_name = str(work), f"{stage}-{time.time_ns()}"
    found = Runner.from_cfg(config).test()
    return {name.rpartition("/")[2]: float(value) for name, value in found.items()}


def inferencer(root: Path, stage: str) -> Any:
    """mm's own, for `inferencer(image)`."""
    from mmdet.apis import DetInferencer
    from mmseg.apis import MMSegInferencer

    kind = {"detect": DetInferencer, "segment": MMSegInferencer}[stage]
    folder = root / f"weights/{stage}"
    return kind(f"{folder}/config.py", f"{folder}/model.safetensors", device="cpu")


@contextmanager
def served(uri: str, tracking_uri: str) -> Iterator[str]:
    """The address of `mlflow models serve`, on loopback."""
    port = free_port()
    command = ["mlflow", "models", "serve", "-m", uri, "--env-manager", "local", "-p", str(port)]
    with subprocess.Popen(
        [sys.executable, "-m", *command],
        env={**os.environ, "MLFLOW_TRACKING_URI": tracking_uri},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not _answers(f"http://127.0.0.1:{port}/ping"):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/invocations"
        finally:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(url: str, *images: Any) -> tuple[int, Any]:
    """Status and answer to a request for images: bytes, or what JSON holds."""
    inputs = [base64.b64encode(i).decode() if isinstance(i, bytes) else i for i in images]
    body = json.dumps({"inputs": inputs}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
