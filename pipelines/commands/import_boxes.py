"""Boxes and masks of other formats, as COCO's annotations.

Pascal VOC, YOLO and labelme are read by supervision (https://supervision.roboflow.com).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipelines.commands.import_files import Options, decoded, drawn, place_image, share_of, tiles
from pipelines.data.errors import DataError
from pipelines.data.files import write_json
from pipelines.data.layout import LAYOUTS
from pipelines.data.masks import run_lengths

if TYPE_CHECKING:
    import supervision as sv

NO_CLASSES = ("__ignore__", "_background_")
"""What labelme calls that is of no class."""
KEPT_SHARE = 0.4
"""An object that a tile cuts is kept from this share of its box on."""


@dataclass
class Coco:
    """A split in COCO's layout, as it grows."""

    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    left_out: int = 0
    """Objects outside of the images, smaller than a pixel, or in pieces on several tiles."""


def import_boxes(kind: str, source: Path, target: Path, options: Options) -> dict[str, int]:
    """Boxes or masks, into COCO's layout."""
    read = {"train": _read(kind, source, "train")}
    named = kind == "yolo" and _yolo_split(source, "val") is not None
    share = None if named else share_of(options)
    if named:
        read["val"] = _read(kind, source, "val")
    elif share is None:
        read["val"] = _read(kind, Path(options.val), "train")
    # Images that nobody annotated are no images without objects, but for YOLO.
    names = {split: _annotated(kind, dataset) for split, dataset in read.items()}
    if share is not None:
        chosen = drawn(len(names["train"]), share, options.seed)
        every = names["train"]
        read["val"] = read["train"]
        names = {
            "train": [name for i, name in enumerate(every) if i not in chosen],
            "val": [name for i, name in enumerate(every) if i in chosen],
        }
    found = {name for dataset in read.values() for name in dataset.classes}
    classes = sorted(found.difference(NO_CLASSES))
    counts = {"classes": len(classes)}
    for split, title in (("train", "training"), ("val", "validation")):
        written = _write_split(read[split], names[split], classes, (target, split), options.tile)
        if not written.annotations:
            raise DataError(f"{source}: the {title} images have no objects")
        counts[f"{title}_images"] = len(written.images)
        counts[f"{title}_objects"] = len(written.annotations)
        if written.left_out:
            counts[f"{title}_objects_left_out"] = written.left_out
    return counts


def _yolo_split(source: Path, split: str) -> Path | None:
    """Folder of the images of a split, as YOLO's data.yaml names it; None if it names none."""
    try:
        content = YAML(typ="safe").load(source.read_text())
        given = content.get(split)
    except (OSError, YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise DataError(f"{source} is no data.yaml of YOLO: {error}", "Give that file") from None
    if given is None:
        return None
    if not isinstance(given, str):
        raise DataError(f"{source}: {split} is {given!r}", "Give one folder of images")
    root = source.parent / str(content.get("path") or "")
    for base in (root, source.parent):
        if (base / given).is_dir():
            return base / given
    raise DataError(f"{source}: {split}: there is no folder {given}")


def _read(kind: str, source: Path, split: str) -> "sv.DetectionDataset":
    import supervision as sv

    try:
        if kind == "yolo":
            images = _yolo_split(source, split)
            if images is None:
                raise DataError(f"{source} names no folder for {split}")
            parts = ["labels" if part == "images" else part for part in images.parts]
            return sv.DetectionDataset.from_yolo(str(images), str(Path(*parts)), str(source))
        if not source.is_dir():
            raise DataError(f"there is no folder {source}")
        images = source / "JPEGImages" if (source / "JPEGImages").is_dir() else source
        notes = source / "Annotations" if (source / "Annotations").is_dir() else source
        make = {
            "voc": sv.DetectionDataset.from_pascal_voc,
            "labelme": sv.DetectionDataset.from_labelme,
        }[kind]
        return make(str(images), str(notes))
    except DataError:
        raise
    except Exception as error:  # of whatever a damaged file makes the reader raise
        raise DataError(f"{source} can't be read as {kind}: {error}") from error


def _annotated(kind: str, dataset: "sv.DetectionDataset") -> list[str]:
    """The images to take, by path, in order."""
    every = sorted(map(str, dataset.image_paths))
    return every if kind == "yolo" else [n for n in every if len(dataset.annotations[n])]


def _write_split(
    dataset: "sv.DetectionDataset",
    names: Sequence[str],
    classes: Sequence[str],
    place: tuple[Path, str],
    tile: int,
) -> Coco:
    """Write a split, `place` being the target and the split's name."""
    from rich.progress import track

    target, split = place
    layout, found = LAYOUTS["coco"], Coco()
    folder = target / layout.images[split]
    folder.mkdir(parents=True)
    root = os.path.commonpath([str(Path(name).parent) for name in names]) if names else "."
    for name in track(names, description=split, transient=True):
        flat = "_".join(Path(name).relative_to(root).parts)
        objects = dataset.annotations[name]
        numbers = objects.class_id if objects.class_id is not None else ()
        called = [dataset.classes[number] for number in numbers]
        objects = cast("sv.Detections", objects[np.isin(called, classes)])
        labels = [classes.index(name) + 1 for name in called if name in classes]
        kept: set[int] = set()
        image = decoded(Path(name))
        for part in tiles(image.size, tile):
            if tile:
                written = f"{Path(flat).stem}_{part[0]}_{part[1]}.png"
                image.crop(part).save(folder / written)
            else:
                written = place_image(Path(name), folder, flat)
            kept |= _add(found, written, part, objects, labels)
        found.left_out += len(labels) - len(kept)
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    content = {
        "images": found.images,
        "annotations": found.annotations,
        "categories": categories,
    }
    write_json(target / layout.annotations[split], content)
    return found


def _add(
    found: Coco,
    name: str,
    part: tuple[int, int, int, int],
    objects: "sv.Detections",
    labels: Sequence[int],
) -> set[int]:
    """Add a part (left, top, right, bottom) of an image with its objects; which those are."""
    left, top, right, bottom = part
    number, kept = len(found.images) + 1, set()
    found.images.append(
        {"id": number, "file_name": name, "width": right - left, "height": bottom - top}
    )
    for index, label in enumerate(labels):
        x0, y0, x1, y1 = map(float, objects.xyxy[index])
        corner = max(x0, left), max(y0, top)
        width, height = min(x1, right) - corner[0], min(y1, bottom) - corner[1]
        enough = width * height >= KEPT_SHARE * (x1 - x0) * (y1 - y0)
        if min(width, height) < 1 or not enough:
            continue
        annotation: dict[str, Any] = {
            "id": len(found.annotations) + 1,
            "image_id": number,
            "category_id": label,
            "bbox": [round(v, 2) for v in (corner[0] - left, corner[1] - top, width, height)],
            "area": round(width * height, 2),
            "iscrowd": 0,
        }
        if objects.mask is not None:
            mask = np.asarray(objects.mask[index])[top:bottom, left:right]
            if not mask.any():
                continue
            annotation |= {"segmentation": run_lengths(mask), "area": int(mask.sum())}
        found.annotations.append(annotation)
        kept.add(index)
    return kept
