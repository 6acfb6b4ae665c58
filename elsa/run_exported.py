"""Run an exported model: numpy, Pillow, and onnxruntime (.onnx) or torch (.pt2; of a detector
torchvision, too). A `.pt2` and the `elsa_ops.so` beside it are programs: run none that you do not
trust.

    python run.py model.onnx photo.jpg       # the likeliest classes, objects, or photo.labels.png

This file stands alone, a copy of it lies beside each exported model:

    model = Exported("model.onnx")
    model.classes                       # names, by label
    model.logits(images)                # (n, 3, H, W) float32, RGB from 0 to 255, of model.size
    model(Image.open("photo.jpg"))      # logits (classes) or (classes, H, W) of one picture
    model.labels(Image.open("photo.jpg"))  # of a segmentor: the class of each pixel (H, W)
    model.find(Image.open("photo.jpg")) # of a detector: boxes, labels, scores, masks
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Objects:
    """What is found in a picture, the surest first."""

    boxes: NDArray[np.float32]
    """(n, 4): left, top, right, bottom, in pixels of the picture."""
    labels: NDArray[np.int64]
    """(n)"""
    scores: NDArray[np.float32]
    """(n)"""
    masks: NDArray[np.bool_] | None
    """(n, H, W); None of a model that finds boxes only."""


def cpu_features() -> set[str]:
    """What this CPU can, by numpy's names; compiled code that needs more would kill the process."""
    from numpy._core._multiarray_umath import __cpu_features__

    return {name for name, here in __cpu_features__.items() if here}


class _Graph:
    """One file: arrays to arrays.

    Raises:
        FileNotFoundError: the file, or the operator's library beside it, is not there.
        ImportError: its runtime is not installed.
        ValueError: it was not written by `elsa export`, or compiled for another CPU.
    """

    def __init__(self, file: Path, threads: int) -> None:
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}")
        try:
            self._onnx = file.suffix == ".onnx"
            text = self._load_onnx(file, threads) if self._onnx else self._load_pt2(file)
            self.described: dict[str, Any] = json.loads(text)
        except (ImportError, FileNotFoundError):
            raise
        except Exception as error:  # of whatever a runtime makes of another file
            raise ValueError(
                f"{file} is no model that `elsa export` wrote for this machine: {error}"
            ) from error

    def _load_onnx(self, file: Path, threads: int) -> str:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            file, options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [one.name for one in self._session.get_inputs()]
        found: str = self._session.get_modelmeta().custom_metadata_map["elsa"]
        return found

    def _load_pt2(self, file: Path) -> str:
        import torch

        loader: Any = torch._C._aoti.AOTIModelPackageLoader
        found: str = loader.load_metadata_from_package(str(file), "model")["elsa"]
        described = json.loads(found)
        lacking = set(described["cpu"]) - cpu_features()
        if lacking:
            raise ValueError(f"it was compiled for a CPU with {', '.join(sorted(lacking))}")
        if "torchvision" in described["needs"]:
            import torchvision  # noqa: F401 - registers its operators
        if "elsa" in described["needs"] and not hasattr(torch.ops.elsa, "elsa_attention"):
            library = file.with_name("elsa_ops.so")
            if not library.is_file():
                raise FileNotFoundError(f"{file} needs {library.name} beside it")
            torch.ops.load_library(str(library))
        self._session = torch._inductor.aoti_load_package(str(file))
        self.inputs = described["inputs"]
        return found

    def __call__(self, *arguments: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        if self._onnx:
            given = dict(zip(self.inputs, arguments, strict=True))
            found: list[NDArray[np.float32]] = self._session.run(None, given)
            return found
        import torch

        with torch.inference_mode():
            result = self._session(*map(torch.from_numpy, arguments))
        return [one.numpy() for one in ([result] if torch.is_tensor(result) else result)]


class Exported:
    """An exported model; of a detector the files beside it, too.

    Args:
        file: `.onnx` or `.pt2`, written by `elsa export`.
        threads: of onnxruntime; 0 takes all cores.

    Raises:
        FileNotFoundError: the file, or one that belongs to it, is not there.
        ValueError: it was not written by `elsa export`, or compiled for another CPU.
        ImportError: its runtime is not installed.
    """

    def __init__(self, file: str | Path, threads: int = 0) -> None:
        file = Path(file)
        self._graphs = {"model": _Graph(file, threads)}
        try:
            self._read(self._graphs["model"].described)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{file} is no model that `elsa export` wrote: in its description {error!r}"
            ) from error
        for name in self._heads:
            # model.onnx and boxes.onnx, model.decomposed.pt2 and boxes.decomposed.pt2
            beside = file.with_name("".join([name, *file.suffixes]))
            self._graphs[name] = _Graph(beside, threads)

    def _read(self, described: dict[str, Any]) -> None:
        self._described = described
        self.task: str = described["task"]
        self.classes: list[str] = described["classes"]
        self.size: tuple[int, int] = tuple(described["size"])
        """(H, W)"""
        self._heads: tuple[str, ...] = ()
        if self.task == "detect":
            self._heads = ("boxes", "masks") if described["masks"] else ("boxes",)
        else:
            self._resize, self._squash = int(described["resize"]), bool(described["squash"])
            self._interpolation = INTERPOLATIONS[described["interpolation"]]
            """Of what is cropped afterwards; else see `scaled`."""

    def run(self, graph: str, *arguments: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """What one of its graphs (`model`; of a detector also `boxes`, `masks`) says of arrays."""
        return self._graphs[graph](*arguments)

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
        return self.run("model", images)[0]

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

    def labels(self, picture: Image.Image) -> NDArray[np.int64]:
        """The class of each pixel (H, W) of a picture, by a segmentor."""
        logits = self(picture).transpose(1, 2, 0)
        return scaled(logits, picture.size[1], picture.size[0]).argmax(2)

    def find(self, picture: Image.Image) -> Objects:
        """The objects in a picture, by a detector, as mmdet finds them."""
        about, pixels = self._described, np.asarray(picture.convert("RGB"), np.float32)
        own = pixels.shape[:2]
        factor = min(side / given for side, given in zip(self.size, own, strict=True))
        inside = (int(own[0] * factor + 0.5), int(own[1] * factor + 0.5))
        image = np.tile(np.array(about["pad"], np.float32), (*self.size, 1))
        image[: inside[0], : inside[1]] = scaled(pixels, *inside).round()
        maps, boxes = self._propose(image.transpose(2, 0, 1)[None].copy(), inside)

        limits = about["rcnn"]
        found, shifts = self._look("boxes", maps, boxes)
        shifts = shifts.reshape(len(boxes), -1, 4)
        number, labels = np.nonzero(found[:, :-1] > limits["least"])
        scores = found[number, labels]
        chosen = shifts[number, labels if shifts.shape[1] > 1 else 0]
        boxes = _decoded(boxes[number], chosen, limits, inside)
        kept = _suppressed(boxes, scores, labels, limits)
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        back = boxes * np.array([own[1] / inside[1], own[0] / inside[0]] * 2, np.float32)
        masks = None
        if about["masks"]:
            masks = np.zeros((len(boxes), *own), bool)
            logits: Any = self._look("masks", maps, boxes)[0] if len(boxes) else None
            for i, (box, label) in enumerate(zip(back, labels, strict=True)):
                one = logits[i, label if logits.shape[1] > 1 else 0]
                masks[i] = _pasted(one, box, own) >= limits["mask"]
        return Objects(back, labels, scores, masks)

    def _propose(
        self, image: NDArray[np.float32], inside: tuple[int, int]
    ) -> tuple[dict[str, Any], NDArray[np.float32]]:
        """Feature maps of an image (1, 3, H, W), and boxes (n, 4) to look at within it."""
        about, limits = self._described, self._described["rpn"]
        levels, found = len(about["strides"]), self.run("model", image)
        maps = {f"map{i}": one for i, one in enumerate(found[: -2 * levels])}
        parts = []
        for level, base in enumerate(about["anchors"]):
            score, shift = found[level - 2 * levels][0], found[level - levels][0]
            anchors = _anchors(base, about["strides"][level], score.shape[1:])
            scores = score.transpose(1, 2, 0).ravel()
            shifts = shift.transpose(1, 2, 0).reshape(-1, 4)
            best = np.argsort(-scores, kind="stable")
            best = best[: limits["before"]] if limits["before"] > 0 else best
            boxes = _decoded(anchors[best], shifts[best], limits, inside)
            parts.append((boxes, scores[best], np.full(len(best), level)))
        boxes, scores, of_level = (np.concatenate(part) for part in zip(*parts, strict=True))
        large = (boxes[:, 2:] - boxes[:, :2] > max(limits["smallest"], -1)).all(1)
        boxes, scores, of_level = boxes[large], scores[large], of_level[large]
        return maps, boxes[_suppressed(boxes, scores, of_level, limits)]

    def _look(
        self, head: str, maps: dict[str, NDArray[np.float32]], boxes: NDArray[np.float32]
    ) -> list[NDArray[np.float32]]:
        numbered = np.concatenate([np.zeros_like(boxes[:, :1]), boxes], 1)
        given = {**maps, "boxes": numbered}
        return self.run(head, *(given[name] for name in self._graphs[head].inputs))


def _anchors(
    base: list[list[float]], stride: list[int], size: tuple[int, int]
) -> NDArray[np.float32]:
    """Those of a level (h * w * anchors, 4), row by row."""
    x, y = np.meshgrid(np.arange(size[1]) * stride[0], np.arange(size[0]) * stride[1])
    places = np.stack([x, y, x, y], -1).reshape(-1, 1, 4)
    return (places + np.array(base)).reshape(-1, 4).astype(np.float32)


def _decoded(
    boxes: NDArray[np.float32],
    shifts: NDArray[np.float32],
    limits: dict[str, Any],
    inside: tuple[int, int],
) -> NDArray[np.float32]:
    """Boxes (n, 4) moved and scaled by shifts (n, 4), within an image of this height and width."""
    shifts = shifts * np.array(limits["stds"], np.float32) + np.array(limits["means"], np.float32)
    most = np.float32(abs(np.log(16 / 1000)))
    side = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) * 0.5 + side * shifts[:, :2]
    half = side * np.exp(shifts[:, 2:].clip(-most, most)) * 0.5
    found = np.concatenate([centre - half, centre + half], 1)
    edge = np.array([inside[1], inside[0]] * 2, np.float32)
    return np.clip(found, 0, edge).astype(np.float32)


def _suppressed(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    groups: NDArray[Any],
    limits: dict[str, Any],
) -> NDArray[np.int64]:
    """Which boxes are kept, the surest first: those that overlap no surer one of their group."""
    order, kept = np.argsort(-scores, kind="stable"), list[int]()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    while len(order) and len(kept) < limits["most"]:
        best, order = order[0], order[1:]
        kept.append(best)
        low, high = (
            np.maximum(boxes[best, :2], boxes[order, :2]),
            np.minimum(boxes[best, 2:], boxes[order, 2:]),
        )
        both = (high - low).clip(0).prod(1)
        overlap = both / np.maximum(area[best] + area[order] - both, 1e-12)
        order = order[(groups[order] != groups[best]) | (overlap <= limits["overlap"])]
    return np.array(kept, int)


def _pasted(
    logits: NDArray[np.float32], box: NDArray[np.float32], size: tuple[int, ...]
) -> NDArray[np.float32]:
    """Probabilities of `size` (H, W) of a mask's logits (h, w) that lie over a box."""
    mask = np.pad(1 / (1 + np.exp(-logits)), 1)  # beyond its edge there is nothing
    places, shares = [], []
    for side, low, high, count in zip(size, box[1::-1], box[:1:-1], logits.shape, strict=True):
        place = (np.arange(side) + 0.5 - low) / max(high - low, 1e-6) * count + 0.5
        place = place.clip(0, count + 1)
        first = np.minimum(place.astype(int), count)
        places.append(first)
        shares.append((place - first).astype(np.float32))
    (y, x), (b, a) = places, shares
    top = mask[y][:, x] * (1 - a) + mask[y][:, x + 1] * a
    low_row = mask[y + 1][:, x] * (1 - a) + mask[y + 1][:, x + 1] * a
    found: NDArray[np.float32] = top * (1 - b[:, None]) + low_row * b[:, None]
    return found


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


def _told(model: Exported, picture: Image.Image, name: Path) -> str:
    """What the model says of a picture; labels are written beside it."""
    if model.task == "detect":
        objects = model.find(picture)
        lines = (
            f"{model.classes[label]} {100 * score:.0f}% at {', '.join(f'{v:.0f}' for v in box)}"
            for box, label, score in zip(objects.boxes, objects.labels, objects.scores, strict=True)
            if score >= 0.3
        )
        return "; ".join(lines) or "nothing"
    if model.task == "classify":
        found = model(picture)
        weights = np.exp(found - found.max())
        order = np.argsort(-found, kind="stable")[:5]
        return ", ".join(
            f"{model.classes[i]} {100 * weights[i] / weights.sum():.1f}%" for i in order
        )
    labels = model.labels(picture)
    out = name.with_suffix(".labels.png")
    Image.fromarray(labels.astype(np.uint8)).save(out)
    return f"{', '.join(model.classes[i] for i in np.unique(labels))}, in {out.name}"


def main(arguments: list[str]) -> int:
    """Tell of pictures what the model says of them."""
    if len(arguments) < 2 or arguments[0].startswith("-"):
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    try:
        model = Exported(arguments[0])
        for name in arguments[1:]:
            with Image.open(name) as picture:
                print(f"{name}: {_told(model, picture, Path(name))}")
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
