"""What images, COCO's annotations and ADE20K's label maps must be, for any data set."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipelines.data.errors import DataError
from pipelines.data.layout import LAYOUTS

BOX_SLACK = 1.0  # pixels: the boxes of COCO are rounded, so they may end just outside the image


def folders(dataset: str) -> tuple[str, ...]:
    """The folders that a data set must have."""
    layout = LAYOUTS[dataset]
    found = [
        str(Path(name).parent) if name.endswith(".json") else name
        for name in layout.annotations.values()
    ]
    return tuple(dict.fromkeys([*found, *layout.images.values()]))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not valid JSON ({error})") from None


def decode(source: Path | BinaryIO) -> tuple[int, int]:
    """(width, height) of an image that decodes, as training decodes it; else ValueError."""
    try:
        with warnings.catch_warnings(), Image.open(source) as image:
            warnings.simplefilter("ignore")  # such as of EXIF data, which training does not read
            image.load()
            if image.mode not in ("RGB", "L", "P"):
                image.convert("RGB")
            return image.size
    except UnidentifiedImageError:  # its message names an object in memory
        raise ValueError("it is no image, or of an unknown kind") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from None


def _duplicates(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


@dataclass(frozen=True)
class CocoFindings:
    """What is not wrong with COCO annotations, and yet to be told: faults by annotation id."""

    annotations: int
    """How many there are."""
    empty: dict[int, str] = field(default_factory=dict)
    """Empty boxes: mmdet leaves them out."""
    without_mask: dict[int, str] = field(default_factory=dict)
    """Boxes alone: for methods without masks."""


def check_coco(
    root: Path,
    folder: str,
    classes: Sequence[str],
    sizes: dict[str, tuple[int, int]],
    left_out: Collection[str] = (),
) -> CocoFindings:
    """Check `instances_<folder>.json` in itself and against the images.

    Args:
        sizes: (width, height) of every image, by `<folder>/<file name>`.
        left_out: names of images that have no size and are not used.

    Raises:
        DataError: what no method can train on.
    """
    path = root / f"annotations/instances_{folder}.json"
    if not path.is_file():
        raise DataError(f"{root} has no annotations/{path.name}")
    content = _read_json(path)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{path}: key {key!r} is missing or not a list")
        for item in content[key]:
            if not isinstance(item, dict) or type(item.get("id")) is not int:
                raise DataError(f"{path}: {key} has an entry without a whole number as id")
        if ids := _duplicates(item["id"] for item in content[key]):
            raise DataError(f"{path}: {key} has id {ids[0]} more than once")
    names = [category.get("name") for category in content["categories"]]
    if names != list(classes):
        raise DataError(
            f"{path}: its {len(names)} categories are not the {len(classes)} of the training"
            " annotations"
        )
    images = {image["id"]: image for image in content["images"]}
    _check_coco_images(path, folder, list(images.values()), sizes, left_out)
    if not content["annotations"]:
        raise DataError(f"{path} has no annotations: there is nothing to learn or score")
    categories = {category["id"] for category in content["categories"]}
    found = CocoFindings(len(content["annotations"]))
    for annotation in content["annotations"]:
        fault = _annotation_fault(annotation, images, categories)
        if fault:
            raise DataError(f"{path}: annotation {annotation.get('id')} {fault}")
        name = images[annotation["image_id"]]["file_name"]
        if min(annotation["bbox"][2:]) == 0:
            found.empty[annotation["id"]] = f"of {name} has an empty bbox {annotation['bbox']}"
        if not annotation.get("segmentation"):
            found.without_mask[annotation["id"]] = f"of {name} has no segmentation"
    return found


def _check_coco_images(
    path: Path,
    folder: str,
    images: Sequence[dict[str, Any]],
    sizes: dict[str, tuple[int, int]],
    left_out: Collection[str],
) -> None:
    for image in images:
        name = f"{folder}/{image.get('file_name')}"
        if name in left_out:
            continue
        if name not in sizes:
            raise DataError(f"{path}: image {image['id']} refers to {name}, which does not exist")
        given = (image.get("width"), image.get("height"))
        if sizes[name] != given:
            raise DataError(
                f"{path}: image {image['id']} is given as {by(given)}, but {name} is "
                f"{by(sizes[name])}"
            )
    listed = {f"{folder}/{image['file_name']}" for image in images}
    unlisted = sorted(n for n in sizes if n.startswith(f"{folder}/") and n not in listed)
    if unlisted:
        raise DataError(
            f"{path}: {len(unlisted)} image(s) have no entry under `images`:"
            f" {', '.join(unlisted[:3])}{', ...' if len(unlisted) > 3 else ''}"
        )


def _annotation_fault(
    annotation: dict[str, Any], images: dict[int, dict[str, Any]], categories: set[int]
) -> str | None:
    for key, known in (("image_id", images), ("category_id", categories)):
        value = annotation.get(key)
        if type(value) is not int or value not in known:
            return f"refers to {key} {value!r}, which does not exist"
    image = images[annotation["image_id"]]
    if annotation.get("iscrowd") not in (0, 1):
        return f"has iscrowd {annotation.get('iscrowd')!r}, not 0 or 1"
    box = annotation.get("bbox")
    if not isinstance(box, list) or [type(v) in (int, float) for v in box] != [True] * 4:
        return f"has no bbox [x, y, width, height] (found {box!r})"
    x, y, width, height = box
    bounds = image["width"], image["height"]
    over = max(-x, -y, x + width - bounds[0], y + height - bounds[1])
    if not over <= BOX_SLACK or min(width, height) < 0:
        return (
            f"has bbox {box}, which is outside its image "
            f"({image['file_name']}, {bounds[0]}x{bounds[1]})"
        )
    area = annotation.get("area")
    if not isinstance(area, int | float) or not area >= 0:
        return f"has area {area!r}, not the object's number of pixels"
    code = annotation.get("segmentation")
    if not code:
        return None  # a box alone
    if isinstance(code, dict):
        if code.get("size") != [bounds[1], bounds[0]]:
            return f"has a mask of size {code.get('size')}, its image {[bounds[1], bounds[0]]}"
        if not isinstance(code.get("counts"), list | str):
            return "has a mask without counts"
    elif not isinstance(code, list):
        return f"has a segmentation of type {type(code).__name__}, not polygons or RLE"
    return None


def read_label_map(source: Path | BinaryIO, num_classes: int) -> NDArray[np.uint8]:
    """An ADE20K label map that decodes; ValueError says what is wrong with its content."""
    with Image.open(source) as image:
        mode, values = image.mode, np.asarray(image)
    if mode not in ("L", "P"):
        raise ValueError(f"is not an 8-bit label map (mode {mode})")
    if values.max() > num_classes:
        raise ValueError(f"has label {values.max()}; allowed: 0 (ignored) to {num_classes}")
    return values


def by(size: tuple[Any, Any]) -> str:
    return f"{size[0]}x{size[1]}"
