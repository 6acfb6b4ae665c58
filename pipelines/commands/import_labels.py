"""Label images of other formats, by palette or by colour, as ADE20K's label maps."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.commands.import_files import (
    Options,
    decoded,
    drawn,
    pictures,
    place_image,
    share_of,
    tiles,
)
from pipelines.data.errors import DataError
from pipelines.data.layout import LAYOUTS

IMAGES, LABELS = ("images", "JPEGImages"), ("labels", "masks", "annotations", "SegmentationClass")
"""Names of the folders; the last ones are VOC's."""
CLASS_FILES = ("labelmap.txt", "classes.txt", "class_names.txt")
COLOUR = re.compile(r"^(.+?)[:\s]\s*(\d{1,3})[,\s]\s*(\d{1,3})[,\s]\s*(\d{1,3})[:\s]*$")
"""A class and its colour: `road 128 64 128`, or CVAT's `road:128,64,128::`."""
BORDER_INDEX, BORDER_COLOUR = 255, 0xE0E0C0
"""VOC's border between objects, which is of no class."""
IGNORED = ("ignore", "void", "border", "unlabeled")
"""Names in a class file of what is of no class."""
MOST = 255
"""Classes that a label map can hold."""


@dataclass
class Classes:
    """What the values of label images stand for."""

    names: list[str] = field(default_factory=list)
    labels: dict[int, int] = field(default_factory=dict)
    """Label by value: from 1, 0 for what is ignored."""
    by_colour: bool = False
    """Values are colours, 0xRRGGBB; else indices."""
    given: bool = False
    """By a class file; else they are what occurs."""


def import_labels(source: Path, target: Path, options: Options) -> dict[str, int]:
    """Write the images of `source` and their label images in ADE20K's layout; what was written.

    Raises:
        DataError: a folder, a label image or the class file is not as it must be.
    """
    share, pairs = share_of(options), {"train": _pairs(source)}
    if share is None:
        pairs["val"] = _pairs(Path(options.val))
    else:
        chosen, every = drawn(len(pairs["train"]), share, options.seed), pairs["train"]
        pairs = {
            "train": [pair for i, pair in enumerate(every) if i not in chosen],
            "val": [pair for i, pair in enumerate(every) if i in chosen],
        }
    classes = _read_classes(source) or _find_classes([p for part in pairs.values() for p in part])
    counts = {"classes": len(classes.names)}
    for split, title in (("train", "training"), ("val", "validation")):
        counts[f"{title}_images"] = _write(pairs[split], classes, (target, split), options.tile)
    (target / "classes.txt").write_text("\n".join(classes.names) + "\n", encoding="utf-8")
    return counts


def _pairs(source: Path) -> list[tuple[Path, Path]]:
    """Images and their label images, of the same name but for the ending."""
    found = []
    for names in (IMAGES, LABELS):
        folders = [source / name for name in names if (source / name).is_dir()]
        if not folders:
            raise DataError(f"{source} has no folder {' or '.join(names)}")
        found.append({file.stem: file for file in pictures(folders[0])})
    images, labels = found
    if alone := sorted(labels.keys() - images.keys()):
        raise DataError(f"label images without an image: {', '.join(alone[:5])}")
    pairs = [(images[stem], labels[stem]) for stem in sorted(labels)]
    if not pairs:
        raise DataError(f"{source} has no label images")
    return pairs


def _read_classes(source: Path) -> Classes | None:
    """The classes of the class file; None without one."""
    file = next((source / name for name in CLASS_FILES if (source / name).is_file()), None)
    if not file:
        return None
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no text: {error}") from None
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    matches = [COLOUR.match(line) for line in lines]
    found = Classes(by_colour=any(matches), given=True)
    for index, (line, match) in enumerate(zip(lines, matches, strict=True)):
        if found.by_colour and not match:
            raise DataError(f"{file}: {line!r} has no colour, as other lines have")
        name, value = line, index
        if match:
            name, *channels = match.groups()
            red, green, blue = map(int, channels)
            if max(red, green, blue) > 255:
                raise DataError(f"{file}: {line!r}: a colour's parts are 0 to 255")
            value = red << 16 | green << 8 | blue
        if value in found.labels or name in found.names:
            raise DataError(f"{file}: {line!r} is there twice, by its name or its colour")
        if name.lower() in IGNORED:
            found.labels[value] = 0
        else:
            found.names.append(name)
            found.labels[value] = len(found.names)
    border = BORDER_COLOUR if found.by_colour else BORDER_INDEX
    found.labels.setdefault(border, 0)
    return _checked(found, file)


def _find_classes(pairs: Sequence[tuple[Path, Path]]) -> Classes:
    """What occurs in the label images: indices, or colours where one has no palette."""
    by_colour = any(_mode(label) not in ("P", "L", "1") for _, label in pairs)
    values: set[int] = set()
    for _, label in pairs:
        values |= set(np.unique(_values(label, by_colour)).tolist())
        if len(values) > MOST + 1:
            raise DataError(
                f"the label images hold more than {MOST} colours, up to {label}",
                "Are they photographs, or were they saved with losses or smooth edges?",
            )
    border = BORDER_COLOUR if by_colour else BORDER_INDEX
    used = sorted(values - {border})
    names = [f"#{value:06x}" if by_colour else f"class {value}" for value in used]
    labels = {value: i for i, value in enumerate(used, 1)} | {border: 0}
    return _checked(Classes(names, labels, by_colour), pairs[0][1].parent)


def _checked(classes: Classes, where: Path) -> Classes:
    if not 2 <= len(classes.names) <= MOST:
        raise DataError(f"{where}: {len(classes.names)} classes; there must be 2 to {MOST}")
    return classes


def _mode(file: Path) -> str:
    try:
        with Image.open(file) as image:
            return image.mode
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{file} can't be read as an image: {error}") from None


def _values(file: Path, by_colour: bool) -> NDArray[np.int64]:
    """The value of each pixel (height, width): its index, or its colour 0xRRGGBB."""
    if by_colour:
        channels = np.asarray(decoded(file)).astype(np.int64)
        return channels[..., 0] << 16 | channels[..., 1] << 8 | channels[..., 2]
    if _mode(file) not in ("P", "L", "1"):
        raise DataError(
            f"{file} has colours and no palette, but the class file has names alone",
            "Write each class's colour behind its name: road 128 64 128",
        )
    try:
        with Image.open(file) as image:
            return np.asarray(image).astype(np.int64)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{file} can't be decoded: {error}", "Replace or remove it") from None


def _labels(file: Path, classes: Classes) -> NDArray[np.uint8]:
    """The label map (height, width) of a label image."""
    values, inverse = np.unique(_values(file, classes.by_colour), return_inverse=True)
    unknown = [int(value) for value in values if int(value) not in classes.labels]
    if unknown:
        shown = [f"#{v:06x}" if classes.by_colour else str(v) for v in unknown[:5]]
        raise DataError(
            f"{file} has {'colours' if classes.by_colour else 'values'} of no class:"
            f" {', '.join(shown)}",
            "Add them to the class file; what is called ignore or void there is left out",
        )
    table = np.array([classes.labels[int(value)] for value in values], np.uint8)
    return table[inverse].reshape(inverse.shape)


def _write(
    pairs: Sequence[tuple[Path, Path]], classes: Classes, place: tuple[Path, str], tile: int
) -> int:
    """Write a split, `place` being the target and the split's name; how many images it has."""
    from rich.progress import track

    target, split = place
    layout, count = LAYOUTS["ade20k"], 0
    images, maps = target / layout.images[split], target / layout.annotations[split]
    for folder in (images, maps):
        folder.mkdir(parents=True)
    for image, label in track(pairs, description=split, transient=True):
        labels, pixels = _labels(label, classes), decoded(image)
        if labels.shape != pixels.size[::-1]:
            raise DataError(
                f"{label} is {labels.shape[1]} x {labels.shape[0]} pixels, and its image"
                f" {pixels.size[0]} x {pixels.size[1]}"
            )
        for name, part in _parts(image.stem, pixels.size, tile):
            left, top, right, bottom = part
            if tile:
                pixels.crop(part).save(images / f"{name}.png")
            else:
                place_image(image, images, image.name)
            Image.fromarray(labels[top:bottom, left:right]).save(maps / f"{name}.png")
            count += 1
    return count


def _parts(
    stem: str, size: tuple[int, int], tile: int
) -> Iterator[tuple[str, tuple[int, int, int, int]]]:
    for part in tiles(size, tile):
        yield (f"{stem}_{part[0]}_{part[1]}" if tile else stem), part
