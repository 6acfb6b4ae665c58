"""Bring annotated images of other formats into the layouts that the pipeline trains on.

Pascal VOC, YOLO and labelme are read by supervision (https://supervision.roboflow.com).
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipelines.data.checks import IMAGES
from pipelines.data.errors import DataError
from pipelines.data.files import write_json
from pipelines.data.layout import LAYOUTS
from pipelines.data.masks import run_lengths

if TYPE_CHECKING:
    import supervision as sv

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
RECORD = "import.json"
"""What was imported and how; it marks a folder that may be replaced."""
KEPT_SHARE = 0.4
"""An object that a tile cuts is kept from this share of its box on."""


@dataclass(frozen=True)
class Options:
    """How to import."""

    val: str
    """A folder with the validation images, or the share of the images that becomes them."""
    seed: int
    tile: int
    """Side of the squares that images are cut into; 0 leaves them whole."""


@dataclass
class Coco:
    """A split in COCO's layout, as it grows."""

    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    left_out: int = 0
    """Objects outside of the images, smaller than a pixel, or in pieces on several tiles."""


def import_data(kind: str, source: Path, target: Path, options: Options) -> None:
    """Write `target` in COCO's layout, of class folders in ImageNet's, and tell what it holds.

    Raises:
        DataError: the source has not the format, or `target` holds something else.
    """
    if target.exists() and not (target / RECORD).is_file():
        raise DataError(f"{target} exists and was not imported", "Name another folder")
    if kind != "yolo" and not source.is_dir():
        raise DataError(f"there is no folder {source}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        staged = Path(scratch) / target.name
        counts = (
            _folders(source, staged, options)
            if kind == "folders"
            else _boxes(kind, source, staged, options)
        )
        how = {"format": kind, "val": options.val, "seed": options.seed, "tile": options.tile}
        write_json(staged / RECORD, {**how, "counts": counts}, indent=1)
        shutil.rmtree(target, ignore_errors=True)
        staged.replace(target)
    told = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
    print(f"{target}: {told}")
    print(f"Next: elsa finetune --{'classify' if kind == 'folders' else 'detect'} {target}")


def _share(options: Options) -> float | None:
    """The share of the images that is for validation; None where a folder has them.

    Raises:
        DataError: it is neither.
    """
    try:
        share = float(options.val)
    except ValueError:
        if Path(options.val).exists():
            return None
        raise DataError(
            f"--val {options.val}: there is no such folder, and it is no share such as 0.2"
        ) from None
    if not 0 < share < 1:
        raise DataError(f"--val {options.val}: a share is between 0 and 1")
    return share


def _drawn(count: int, share: float, seed: int) -> set[int]:
    """The indices of the validation images among `count`: at least one, and not all."""
    if count < 2:
        raise DataError(f"{count} images can't be split into training and validation images")
    number = min(count - 1, max(1, round(share * count)))
    return set(np.random.default_rng(seed).permutation(count)[:number].tolist())


def _folders(source: Path, target: Path, options: Options) -> dict[str, int]:
    """A folder of images for each class, into `train/<class>` and `val/<class>`."""
    share, counts = _share(options), {"classes": 0, "training_images": 0, "validation_images": 0}
    names = sorted(path.name for path in source.iterdir() if path.is_dir())
    if not names:
        raise DataError(f"{source} has no folders, which would be the classes")
    for name in names:
        files = _pictures(source / name)
        if share is None:
            split = {"train": files, "val": _pictures(Path(options.val) / name)}
        else:
            try:
                chosen = _drawn(len(files), share, options.seed)
            except DataError as error:
                raise DataError(f"class {name}: {error}") from None
            split = {
                "train": [f for i, f in enumerate(files) if i not in chosen],
                "val": [f for i, f in enumerate(files) if i in chosen],
            }
        for part, chosen_files in split.items():
            if not chosen_files:
                raise DataError(f"class {name} has no images in {part}")
            (target / part / name).mkdir(parents=True)
            for file in chosen_files:
                _place(file, target / part / name, file.name)
        counts["classes"] += 1
        counts["training_images"] += len(split["train"])
        counts["validation_images"] += len(split["val"])
    return counts


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in PICTURES)


def _place(file: Path, folder: Path, name: str) -> str:
    """Put an image into a folder; its name there. What the pipeline does not read becomes a PNG."""
    if file.suffix.lower() not in IMAGES:
        name = f"{Path(name).stem}.png"
        _decoded(file).save(folder / name)
        return name
    try:
        (folder / name).hardlink_to(file.resolve())
    except OSError:  # on another file system
        shutil.copy2(file, folder / name)
    return name


def _decoded(file: Path) -> Image.Image:
    """The image in RGB.

    Raises:
        DataError: it can't be decoded.
    """
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} can't be decoded: {error}", "Replace or remove it") from None


def _boxes(kind: str, source: Path, target: Path, options: Options) -> dict[str, int]:
    """Boxes or masks, into COCO's layout."""
    read = {"train": _read(kind, source, "train")}
    named = kind == "yolo" and _yolo_split(source, "val") is not None
    share = None if named else _share(options)
    if named:
        read["val"] = _read(kind, source, "val")
    elif share is None:
        read["val"] = _read(kind, Path(options.val), "train")
    # Images that nobody annotated are no images without objects, but for YOLO.
    names = {split: _annotated(kind, dataset) for split, dataset in read.items()}
    if share is not None:
        chosen = _drawn(len(names["train"]), share, options.seed)
        every = names["train"]
        read["val"] = read["train"]
        names = {
            "train": [name for i, name in enumerate(every) if i not in chosen],
            "val": [name for i, name in enumerate(every) if i in chosen],
        }
    classes = sorted({name for dataset in read.values() for name in dataset.classes})
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
        labels = [classes.index(dataset.classes[number]) + 1 for number in numbers]
        kept: set[int] = set()
        image = _decoded(Path(name))
        for part in _tiles(image.size, tile):
            if tile:
                written = f"{Path(flat).stem}_{part[0]}_{part[1]}.png"
                image.crop(part).save(folder / written)
            else:
                written = _place(Path(name), folder, flat)
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


def _tiles(size: tuple[int, int], tile: int) -> Iterator[tuple[int, int, int, int]]:
    """Left, top, right and bottom of parts of equal size that cover an image side by side, no
    larger than the tile; of tile 0 the whole image."""
    across, down = (max(1, -(-side // tile)) if tile else 1 for side in size)
    columns = [round(size[0] * i / across) for i in range(across + 1)]
    rows = [round(size[1] * i / down) for i in range(down + 1)]
    for top, bottom in pairwise(rows):
        for left, right in pairwise(columns):
            yield left, top, right, bottom


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
