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


def watch(file: Path) -> None:
    """Write the file of this process: its command, then each package when it is there."""
    written = ""
    while True:
        loaded = (name for name in PACKAGES if name in sys.modules)
        text = "\n".join([" ".join(sys.orig_argv), *loaded]) + "\n"
        if text != written:
            file.with_suffix(".part").write_text(text)
            file.with_suffix(".part").replace(file)
            written = text
        time.sleep(0.1)


def begin(folder: str) -> None:
    """Watch this process, which has just started."""
    file = Path(folder) / str(os.getpid())
    threading.Thread(target=watch, args=(file,), daemon=True).start()


if place := os.environ.get("ELSA_TEST_LOADED"):
    Path(place).mkdir(exist_ok=True)
    begin(place)
    os.register_at_fork(after_in_child=lambda: begin(place))
