"""What all formats that are imported share: splits, pictures, tiles."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.data.errors import DataError
from pipelines.data.layout import IMAGES

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Options:
    """How to import."""

    val: str
    """A folder with the validation images, or the share of the images that becomes them."""
    seed: int
    tile: int
    """Side of the squares that images are cut into; 0 leaves them whole."""


def share_of(options: Options) -> float | None:
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


def drawn(count: int, share: float, seed: int) -> set[int]:
    """The indices of the validation images among `count`: at least one, and not all."""
    if count < 2:
        raise DataError(f"{count} images can't be split into training and validation images")
    number = min(count - 1, max(1, round(share * count)))
    return set(np.random.default_rng(seed).permutation(count)[:number].tolist())


def pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in PICTURES)


def place_image(file: Path, folder: Path, name: str) -> str:
    """Put an image into a folder; its name there. What the pipeline does not read becomes a PNG."""
    if file.suffix.lower() not in IMAGES:
        name = f"{Path(name).stem}.png"
        decoded(file).save(folder / name)
        return name
    try:
        (folder / name).hardlink_to(file.resolve())
    except OSError:  # on another file system
        shutil.copy2(file, folder / name)
    return name


def decoded(file: Path) -> Image.Image:
    """The image in RGB.

    Raises:
        DataError: it can't be decoded.
    """
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} can't be decoded: {error}", "Replace or remove it") from None


def tiles(size: tuple[int, int], tile: int) -> Iterator[tuple[int, int, int, int]]:
    """Left, top, right and bottom of parts of equal size that cover an image side by side, no
    larger than the tile; of tile 0 the whole image."""
    across, down = (max(1, -(-side // tile)) if tile else 1 for side in size)
    columns = [round(size[0] * i / across) for i in range(across + 1)]
    rows = [round(size[1] * i / down) for i in range(down + 1)]
    for top, bottom in pairwise(rows):
        for left, right in pairwise(columns):
            yield left, top, right, bottom
