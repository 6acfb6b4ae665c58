"""Contact sheets of data cards."""

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

GAP, HEADER = 8, 44
PAPER, INK, SOFT = (255, 255, 255), (32, 33, 36), (110, 114, 120)


def font(size: int) -> Any:
    """Pillow's own font at `size` pixels."""
    return ImageFont.load_default(size)


class Sheet:
    """A grid of cells under a title; each cell is `width` x `height` with room for a caption."""

    def __init__(self, grid: tuple[int, int], cell: tuple[int, int], title: str, note: str) -> None:
        self.cell = cell
        rows, columns = grid
        width = columns * (cell[0] + GAP) + GAP
        height = HEADER + rows * (cell[1] + GAP)
        self.image = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.draw.text((GAP, 12), title, INK, font(18))
        self.draw.text((width - GAP, 15), note, SOFT, font(14), anchor="ra")

    def paste(self, row: int, column: int, image: Image.Image, shift: int = 0) -> None:
        """Put an image into a cell, `shift` pixels from its left edge."""
        x = GAP + column * (self.cell[0] + GAP) + shift
        self.image.paste(image, (x, HEADER + row * (self.cell[1] + GAP)))


def open_image(path: Path, zoom: int = 1) -> Image.Image:
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    return rgb.resize((rgb.width * zoom, rgb.height * zoom), Image.Resampling.LANCZOS)
