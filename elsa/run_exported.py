"""Run an exported classifier or segmentor: numpy, Pillow, and onnxruntime (.onnx) or torch (.pt2).

    python run.py model.onnx photo.jpg       # the five likeliest classes, or photo.labels.png

This file stands alone, a copy of it lies beside each exported model:

    model = Exported("model.onnx")
    model.classes                       # names, by label
    model.logits(images)                # (n, 3, H, W) float32, RGB from 0 to 255, of model.size
    model(Image.open("photo.jpg"))      # logits (classes) or (classes, H, W) of one picture
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Exported:
    """An exported model.

    Args:
        file: `.onnx` or `.pt2`, written by `elsa export`.
        threads: of the runtime; 0 takes all cores.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it was not written by `elsa export`.
        ImportError: its runtime is not installed.
    """

    def __init__(self, file: str | Path, threads: int = 0) -> None:
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}")
        self._file = file
        try:
            described = self._load_onnx(threads) if file.suffix == ".onnx" else self._load_pt2()
            self.task: str = described["task"]
            self.classes: list[str] = described["classes"]
            self.size: tuple[int, int] = tuple(described["size"])
            """(H, W)"""
            self._resize, self._squash = int(described["resize"]), bool(described["squash"])
            self._interpolation = INTERPOLATIONS[described["interpolation"]]
            """Of what is cropped afterwards; else see `scaled`."""
        except ImportError:
            raise
        except Exception as error:  # of whatever a runtime makes of another file
            raise ValueError(f"{file} is no model that `elsa export` wrote: {error}") from error

    def _load_onnx(self, threads: int) -> dict[str, Any]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session: Any = onnxruntime.InferenceSession(
            self._file, options, providers=["CPUExecutionProvider"]
        )
        found = self._session.get_modelmeta().custom_metadata_map
        return dict(json.loads(found["elsa"]))

    def _load_pt2(self) -> dict[str, Any]:
        import torch

        self._session = torch._inductor.aoti_load_package(str(self._file))
        return dict(json.loads(self._session.get_metadata()["elsa"]))

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (n, classes) or (n, classes, H, W) of images (n, 3, H, W), RGB from 0 to 255.

        Raises:
            ValueError: they have another shape or type.
        """
        if images.dtype != np.float32 or images.ndim != 4 or images.shape[1:] != (3, *self.size):
            raise ValueError(
                f"images are (n, 3, {self.size[0]}, {self.size[1]}) float32, got"
                f" {images.shape} {images.dtype}"
            )
        if self._file.suffix == ".onnx":
            found: NDArray[np.float32] = self._session.run(None, {"images": images})[0]
            return found
        import torch

        with torch.inference_mode():
            result: NDArray[np.float32] = self._session(torch.from_numpy(images)).numpy()
        return result

    def prepare(self, picture: Image.Image) -> NDArray[np.float32]:
        """A picture as an image (3, H, W) of the model's size."""
        picture, (height, width) = picture.convert("RGB"), self.size
        if self._resize:
            across = down = self._resize
            if not self._squash:
                across, down = (side * self._resize // min(picture.size) for side in picture.size)
            if picture.size != (across, down):
                picture = picture.resize((across, down), self._interpolation)
            left, top = round((across - width) / 2), round((down - height) / 2)
            picture = picture.crop((left, top, left + width, top + height))
        pixels = np.asarray(picture, np.float32)
        if not self._resize:
            pixels = scaled(pixels, height, width).round()
        return pixels.transpose(2, 0, 1).copy()

    def __call__(self, picture: Image.Image) -> NDArray[np.float32]:
        return self.logits(self.prepare(picture)[None])[0]


def scaled(values: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Values (H, W, ...) between the four nearest ones, as OpenCV and torch scale images: without
    the mean over more that Pillow takes."""
    for axis, side in enumerate((height, width)):
        there = values.shape[axis]
        if there != side:
            place = np.clip((np.arange(side) + 0.5) * there / side - 0.5, 0, there - 1)
            first = np.minimum(place.astype(int), max(there - 2, 0))
            share = (place - first).astype(np.float32)
            share = share.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
            low = values.take(first, axis)
            values = low + share * (values.take(np.minimum(first + 1, there - 1), axis) - low)
    return values


def main(arguments: list[str]) -> int:
    """Tell of pictures what the model says of them."""
    if len(arguments) < 2 or arguments[0].startswith("-"):
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    try:
        model = Exported(arguments[0])
        for name in arguments[1:]:
            with Image.open(name) as picture:
                found, size = model(picture), picture.size
            if model.task == "classify":
                weights = np.exp(found - found.max())
                order = np.argsort(-found, kind="stable")[:5]
                told = (
                    f"{model.classes[i]} {100 * weights[i] / weights.sum():.1f}%" for i in order
                )
                print(f"{name}: {', '.join(told)}")
            else:
                found = scaled(found.transpose(1, 2, 0), size[1], size[0])
                labels = found.argmax(2).astype(np.uint8)
                out = Path(name).with_suffix(".labels.png")
                Image.fromarray(labels).save(out)
                shown = ", ".join(model.classes[i] for i in np.unique(labels))
                print(f"{out}: {shown}")
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
