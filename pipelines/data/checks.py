"""Is a data set whole and right? Checked at the start of every training stage.

The order of the checks puts the precise message first: what is missing, then what the
content says (a COCO annotation of a missing image, an ADE20K label out of range), and only
then that files differ from the manifest.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipelines.data.errors import DataError
from pipelines.data.layout import DATASETS, IMAGES, LAYOUTS
from pipelines.data.manifest import MANIFEST, data_digest, file_entry

FIX = "run `dvc repro prepare`"
FULL_CHECK_LIMIT = 20_000  # above this many files only their presence and sizes are checked
BOX_SLACK = 1.0  # pixels: the boxes of COCO are rounded, so they may end just outside the image


def folders(dataset: str) -> tuple[str, ...]:
    """The folders that a data set must have."""
    layout = LAYOUTS[dataset]
    found = [
        str(Path(name).parent) if name.endswith(".json") else name
        for name in layout.annotations.values()
    ]
    return tuple(dict.fromkeys([*found, *layout.images.values()]))


def check_dataset(
    root: Path | str, kind: str, num_classes: int, image_size: int | None = None
) -> dict[str, Any]:
    """Check the data set in folder `root`; raises DataError with one message at the first fault.

    Args:
        root: the folder of the data set itself, such as `data/coco`.
        kind: its layout, one of DATASETS.
        num_classes: how many classes the parameters ask for.
        image_size: side in pixels that every image must have, if they are all alike.

    Returns:
        `dataset`, `classes`, `counts` (images per split), `digest`, and `checked`: "content",
        or "sizes" for a data set too large to read through.
    """
    root = Path(root)
    if kind not in DATASETS:
        raise ValueError(f"unknown kind of data set {kind!r}; allowed: {', '.join(DATASETS)}")
    manifest = _read_manifest(root, kind)
    classes, files = manifest["classes"], manifest["files"]
    if len(classes) != num_classes:
        raise DataError(
            f"{root} has {len(classes)} classes, but num_classes is {num_classes} in the "
            f"parameters; set num_classes to {len(classes)}, or {FIX} with other parameters"
        )
    _check_presence(root, kind, files)
    full = len(files) <= FULL_CHECK_LIMIT
    if full:
        sizes = _check_images(root, files, image_size)
        if kind == "imagenet":
            _check_imagenet(root, classes)
        elif kind == "coco":
            for name in LAYOUTS["coco"].images.values():
                _check_coco(root, name, classes, sizes)
        else:
            _check_ade20k(root, num_classes, sizes)
    changed = [name for name, entry in files.items() if _differs(root / name, entry, full)]
    if changed:
        _fail(root, f"differs from its {MANIFEST}", changed)
    if manifest["digest"] != data_digest(files, classes):
        raise DataError(f"{root / MANIFEST} does not match its own digest; {FIX}")
    return {
        "dataset": kind,
        "classes": list(classes),
        "counts": dict(manifest["counts"]),
        "digest": manifest["digest"],
        "checked": "content" if full else "sizes",
    }


def _fail(where: Path, what: str, names: Sequence[str], fix: str = FIX) -> NoReturn:
    first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    raise DataError(f"{where}: {len(names)} file(s) {what}: {first}; {fix}")


def _differs(path: Path, entry: Sequence[Any], full: bool) -> bool:
    if full:
        return file_entry(path) != (entry[0], entry[1])
    return bool(path.stat().st_size != entry[0])


def _read_manifest(root: Path, kind: str) -> dict[str, Any]:
    if not root.is_dir():
        raise DataError(f"there is no data set folder {root}; {FIX}")
    path = root / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{root} has no {MANIFEST}: the data set is only half prepared, or was not made "
            f"by this pipeline; {FIX}"
        )
    manifest = _read_json(path)
    wanted = {"dataset": str, "classes": list, "counts": dict, "files": dict, "digest": str}
    for key, kept in wanted.items():
        if not isinstance(manifest, dict) or not isinstance(manifest.get(key), kept):
            raise DataError(f"{path}: key {key!r} is missing or not a {kept.__name__}; {FIX}")
    if not all(isinstance(name, str) for name in manifest["classes"]):
        raise DataError(f"{path}: its classes are not all names; {FIX}")
    if manifest["dataset"] != kind:
        raise DataError(f"{root} holds a {manifest['dataset']!r} data set, not {kind!r}")
    for name, entry in manifest["files"].items():
        if not isinstance(entry, list) or [type(value) for value in entry] != [int, str]:
            raise DataError(f"{path}: files[{name!r}] is not [bytes, sha256]; {FIX}")
    return dict(manifest)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); {FIX}") from None


def _check_presence(root: Path, kind: str, files: dict[str, Any]) -> None:
    for folder in folders(kind):
        if not (root / folder).is_dir():
            raise DataError(f"{root} has no folder {folder}/, which the {kind} layout needs; {FIX}")
    present = {
        (folder / name).relative_to(root).as_posix()
        for folder, _, names in root.walk()
        for name in names
    }
    missing = sorted(files.keys() - present)
    if missing:
        _fail(root, "are missing", missing)
    unknown = sorted(
        name
        for name in present - files.keys()
        if name.startswith(tuple(f"{folder}/" for folder in folders(kind)))
        and name.lower().endswith(IMAGES)
    )
    if unknown:
        _fail(root, f"are not in {MANIFEST}", unknown, f"remove them, or {FIX}")


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


def _check_images(
    root: Path, files: dict[str, Any], image_size: int | None
) -> dict[str, tuple[int, int]]:
    """Decode every image; returns (width, height) by name."""
    sizes = {}
    for name, entry in files.items():
        if not name.lower().endswith(IMAGES):
            continue
        path = root / name
        try:
            sizes[name] = decode(path)
        except ValueError as error:
            raise DataError(
                f"{path} cannot be decoded ({error}): {path.stat().st_size} bytes, "
                f"{entry[0]} when it was made; {FIX}"
            ) from None
        if image_size is not None and sizes[name] != (image_size, image_size):
            raise DataError(
                f"{path} is {by(sizes[name])}, but the parameters say "
                f"{image_size}x{image_size}; {FIX}"
            )
    return sizes


def _check_imagenet(root: Path, classes: Sequence[str]) -> None:
    for split in folders("imagenet"):
        found = sorted(path.name for path in (root / split).iterdir() if path.is_dir())
        if found != sorted(classes):
            odd = sorted(set(found) ^ set(classes))
            raise DataError(
                f"{root / split} has {len(found)} class folders, {MANIFEST} names "
                f"{len(classes)} classes; they differ in {', '.join(odd[:3])}; {FIX}"
            )
        for name in found:
            if not any((root / split / name).iterdir()):
                raise DataError(f"{root / split / name} has no images; {FIX}")


def _duplicates(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def _check_coco(
    root: Path, folder: str, classes: Sequence[str], sizes: dict[str, tuple[int, int]]
) -> None:
    found = check_coco(root, folder, classes, sizes)
    for number, fault in (found.empty | found.without_mask).items():
        raise DataError(
            f"{root}/annotations/instances_{folder}.json: annotation {number} {fault}; {FIX}"
        )


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
        raise DataError(f"{root} has no annotations/{path.name}; {FIX}")
    content = _read_json(path)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{path}: key {key!r} is missing or not a list; {FIX}")
        for item in content[key]:
            if not isinstance(item, dict) or type(item.get("id")) is not int:
                raise DataError(f"{path}: {key} has an entry without a whole number as id; {FIX}")
        if ids := _duplicates(item["id"] for item in content[key]):
            raise DataError(f"{path}: {key} has id {ids[0]} more than once; {FIX}")
    names = [category.get("name") for category in content["categories"]]
    if names != list(classes):
        raise DataError(
            f"{path}: its {len(names)} categories are not the {len(classes)} classes of "
            f"{MANIFEST}; {FIX}"
        )
    images = {image["id"]: image for image in content["images"]}
    _check_coco_images(path, folder, list(images.values()), sizes, left_out)
    if not content["annotations"]:
        raise DataError(f"{path} has no annotations: there is nothing to learn or score; {FIX}")
    categories = {category["id"] for category in content["categories"]}
    found = CocoFindings(len(content["annotations"]))
    for annotation in content["annotations"]:
        fault = _annotation_fault(annotation, images, categories)
        if fault:
            raise DataError(f"{path}: annotation {annotation.get('id')} {fault}; {FIX}")
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
            raise DataError(
                f"{path}: image {image['id']} refers to {name}, which does not exist; {FIX}"
            )
        given = (image.get("width"), image.get("height"))
        if sizes[name] != given:
            raise DataError(
                f"{path}: image {image['id']} is given as {by(given)}, but {name} is "
                f"{by(sizes[name])}; {FIX}"
            )
    listed = {f"{folder}/{image['file_name']}" for image in images}
    unlisted = sorted(n for n in sizes if n.startswith(f"{folder}/") and n not in listed)
    if unlisted:
        _fail(path, "have no entry under `images`", unlisted)


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


def _check_ade20k(root: Path, num_classes: int, sizes: dict[str, tuple[int, int]]) -> None:
    for split in ("training", "validation"):
        stems = {
            part: {Path(n).stem: n for n in sizes if n.startswith(f"{part}/{split}/")}
            for part in ("images", "annotations")
        }
        images, labels = stems["images"], stems["annotations"]
        if lonely := sorted(images.keys() - labels.keys()):
            _fail(root, f"in images/{split} have no label map in annotations/{split}", lonely)
        if lonely := sorted(labels.keys() - images.keys()):
            _fail(root, f"in annotations/{split} have no image in images/{split}", lonely)
        for stem, name in labels.items():
            if sizes[name] != sizes[images[stem]]:
                raise DataError(
                    f"{root / name} is {by(sizes[name])}, its image {images[stem]} is "
                    f"{by(sizes[images[stem]])}; {FIX}"
                )
            try:
                read_label_map(root / name, num_classes)
            except ValueError as error:
                raise DataError(f"{root / name} {error}; {FIX}") from None


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
