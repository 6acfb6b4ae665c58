"""Notes which packages its process loads; a workspace has it as `sitecustomize.py`."""

import os
import sys
import threading
import time
from pathlib import Path

PACKAGES = (
    *("torch", "torchvision", "timm", "ray", "ray.train", "ray.tune", "ray.data", "mlflow"),
    *("mmengine", "mmcv", "mmdet", "mmseg", "pycocotools", "matplotlib", "pandas", "scipy"),
    *("sklearn", "pyarrow", "optuna", "onnx", "onnxruntime", "transformers", "IPython", "dvc"),
    *("pipelines.train.classify", "pipelines.mm.train"),
)


def watch(folder: Path) -> None:
    """Write a file for this process: its command, then each package when it is there."""
    known: list[str] = []
    with (folder / str(os.getpid())).open("w", buffering=1) as file:
        print(" ".join(sys.orig_argv), file=file)
        while True:
            for name in PACKAGES:
                if name in sys.modules and name not in known:
                    known.append(name)
                    print(name, file=file)
            time.sleep(0.1)


if place := os.environ.get("ELSA_TEST_LOADED"):
    Path(place).mkdir(exist_ok=True)
    threading.Thread(target=watch, args=(Path(place),), daemon=True).start()
