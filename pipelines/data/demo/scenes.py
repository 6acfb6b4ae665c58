"""Draw digits over photograph crops, with exact visible masks.

Shapes: an image is (size, size, 3) float32 RGB in 0..1, a mask (size, size) bool,
a glyph (h, w) float32 alpha in 0..1, cropped tight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.data.demo.sources import NUM_DIGITS, Photo, load_digits, load_photo

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

SCENE_UNIT = 160  # the digit sizes below are for a scene of this many pixels
DIGIT_SIZE = (28.0, 72.0)  # longest side of an upright digit
CLUSTER_DIGIT_SIZE = (13.0, 17.0)
MIN_VISIBLE = 0.6  # the part of a digit's mask that later digits must leave visible
MAX_BOX_IOU = 0.35
MIN_DIGITS = 3
MAX_ANGLE = 20.0
BACKGROUND_LUMA = 0.4  # of a crop on average, at most; digits are lighter than what they cover
DULL = 12.0  # a crop whose grey levels spread less than this (empty sky) is drawn again
STROKE = (3.0, 4.6)  # width of a digit's strokes after thickening, in MNIST pixels
_UP = 4  # digits are thickened and smoothed at this many times 28 px
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass
class Instance:
    """A digit of a scene. `mask` is what is visible of it, `full` what it would cover alone."""

    label: int
    digit: int
    full: Mask
    mask: Mask
    color: Array
    box: tuple[int, int, int, int]  # of `full`: left, top, right, bottom


@dataclass
class Scene:
    """A drawn scene; `cluster` marks a dense group of small digits of class `cluster_label`."""

    image: NDArray[np.uint8]
    photo: str
    instances: list[Instance]
    cluster: Mask | None = None
    cluster_label: int = -1
    cluster_digits: list[int] = field(default_factory=list)

    @property
    def digits(self) -> list[int]:
        """Index of every digit drawn."""
        return [instance.digit for instance in self.instances] + self.cluster_digits


def background(rng: np.random.Generator, size: int, photo: Photo) -> Array:
    """A random crop of a photograph: turned, colours swapped and tinted, blurred, flattened."""
    source = load_photo(photo)
    short = min(source.shape[:2])
    for _ in range(4):
        side = min(short, round(size * rng.uniform(1.0, max(1.0, min(3.0, short / size)))))
        top = int(rng.integers(source.shape[0] - side + 1))
        left = int(rng.integers(source.shape[1] - side + 1))
        crop = source[top : top + side, left : left + side]
        if crop[::4, ::4].std() > DULL:
            break
    # Few photographs must stand for many: any of 8 orientations, any order of the colours.
    crop = np.rot90(crop, rng.integers(4))[:, :: rng.choice((-1, 1)), rng.permutation(3)]
    method = cv2.INTER_AREA if side >= size else cv2.INTER_CUBIC
    image = cv2.resize(np.ascontiguousarray(crop), (size, size), interpolation=method)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, 1.4))
    mean = image.mean(axis=(0, 1)) / 255
    contrast = rng.uniform(0.2, 0.8)
    tint = rng.uniform(0.85, 1.15, size=3)
    shift = mean * (1 - contrast) * tint + rng.uniform(-0.1, 0.1)
    gain = (contrast * tint / 255).astype(np.float32)
    image = np.clip(image * gain + shift.astype(np.float32), 0, 1)
    return image * min(1.0, BACKGROUND_LUMA / float((image @ _LUMA).mean()))


def _bold(pixels: NDArray[Any], width: float) -> Array:
    """Alpha of a digit at _UP times its size, thickened to `width` unless that closes a loop."""
    stroke = cv2.resize(pixels, None, fx=_UP, fy=_UP, interpolation=cv2.INTER_CUBIC)
    thin = _smooth(stroke)
    inside = (thin > 0.5).astype(np.uint8)
    edge = inside.sum() - cv2.erode(inside, np.ones((3, 3), np.uint8)).sum()
    radius = round((width * _UP - 2 * float(inside.sum()) / max(1, int(edge))) / 2)
    loops = cv2.connectedComponents(1 - inside)[0]
    for r in range(min(radius, _UP), 0, -1):
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * r + 1, 2 * r + 1))
        thick = _smooth(cv2.dilate(stroke, kernel))
        if cv2.connectedComponents((thick <= 0.5).astype(np.uint8))[0] >= loops:
            return thick
    return thin


def _smooth(stroke: NDArray[Any]) -> Array:
    blurred = cv2.GaussianBlur(stroke.astype(np.float32) / 255, (0, 0), 1.6)
    return np.clip((blurred - 0.42) * 4 + 0.5, 0, 1)


def glyph(rng: np.random.Generator, digit: int, size: float) -> Array:
    """Alpha of a digit, its longest upright side `size` px, thickened and turned at random."""
    smooth = _bold(load_digits()[0][digit], rng.uniform(*STROKE))
    rows, cols = np.flatnonzero((smooth > 0.5).any(1)), np.flatnonzero((smooth > 0.5).any(0))
    scale = size / (max(rows[-1] - rows[0], cols[-1] - cols[0]) + 1)
    if scale < 1:  # prefilter, so that shrinking does not alias
        smooth = cv2.GaussianBlur(smooth, (0, 0), 0.4 / scale).astype(np.float32)
    canvas = int(np.ceil(size * 1.5)) + 4
    center = (float(cols[0] + cols[-1]) / 2, float(rows[0] + rows[-1]) / 2)
    matrix = cv2.getRotationMatrix2D(center, rng.uniform(-MAX_ANGLE, MAX_ANGLE), scale)
    matrix[0, 1] += rng.uniform(-0.12, 0.12) * scale  # slant
    matrix[:, 2] += canvas / 2 - matrix @ np.array([*center, 1.0])
    alpha = cv2.warpAffine(smooth, matrix, (canvas, canvas), flags=cv2.INTER_LINEAR)
    alpha = np.clip((alpha - 0.5) * 1.4 + 0.5, 0, 1)
    rows, cols = np.flatnonzero((alpha > 0).any(1)), np.flatnonzero((alpha > 0).any(0))
    return alpha[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].astype(np.float32)


def _color(rng: np.random.Generator, under: Array, others: list[Array]) -> Array:
    """A colour that is lighter than the pixels `under` it and unlike other colours."""
    luma = under @ _LUMA
    hue, saturation, value = rng.uniform((0, 0.2, 0.6), (1, 1, 1), size=(24, 3)).T[..., None]
    pure = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    colors = (value * (1 - saturation * (1 - pure))).astype(np.float32)  # HSV to RGB
    score = (colors @ _LUMA - luma.mean()) / (0.3 + 0.5 * luma.std())
    for other in others:
        score = np.minimum(score, np.abs(colors - other).max(axis=1) / 0.35)
    good = np.flatnonzero(score >= 1)
    return colors[good[0] if len(good) else int(score.argmax())]


def _paint(
    rng: np.random.Generator, image: Array, alpha: Array, x: int, y: int, others: list[Array]
) -> Array:
    """Draw a glyph into `image` with its top left corner at (x, y); returns its colour."""
    height, width = alpha.shape
    window = image[y : y + height, x : x + width]
    color = _color(rng, window[alpha > 0.5], others)
    angle = rng.uniform(0, 2 * np.pi)  # light falls off along a random direction
    down = np.linspace(-0.12, 0.12, height, dtype=np.float32) * np.float32(np.sin(angle))
    across = np.linspace(-0.12, 0.12, width, dtype=np.float32) * np.float32(np.cos(angle))
    shade = np.clip(color * (1 + down[:, None, None] + across[:, None]), 0, 1)
    window += alpha[..., None] * (shade - window)
    return color


def _mask(alpha: Array, x: int, y: int, size: int) -> Mask:
    mask = np.zeros((size, size), dtype=bool)
    mask[y : y + alpha.shape[0], x : x + alpha.shape[1]] = alpha > 0.5
    return mask


def _iou(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / (areas - width * height)


def tight_box(mask: Mask) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) around a mask that is not empty; right and bottom exclusive."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1


def draw_single(rng: np.random.Generator, size: int, digit: int, photo: Photo) -> NDArray[np.uint8]:
    """One digit over a photograph crop, filling half to nine tenths of the image."""
    image = background(rng, size, photo)
    limit = size - 2
    side = size * rng.uniform(0.5, 0.9)
    alpha = glyph(rng, digit, side)
    while max(alpha.shape) > limit:
        side *= 0.95 * limit / max(alpha.shape)
        alpha = glyph(rng, digit, side)
    slack = [size - n for n in alpha.shape]  # small shifts around the middle
    y, x = (int(np.clip(s / 2 + rng.uniform(-0.15, 0.15) * size, 0, s)) for s in slack)
    _paint(rng, image, alpha, x, y, [])
    return to_bytes(image)


def draw_scene(
    rng: np.random.Generator,
    size: int,
    max_digits: int,
    pool: tuple[tuple[int, ...], ...],
    photo: Photo,
    cluster: bool,
) -> Scene:
    """Several digits, partly overlapping, over a photograph crop; with a cluster if asked for."""
    image = background(rng, size, photo)
    scene = Scene(np.empty(0, np.uint8), photo.name, [])
    if cluster:
        _draw_cluster(rng, image, pool, scene)
    count = int(rng.integers(min(MIN_DIGITS, max_digits), max_digits + 1))
    for _ in range(count):
        label = int(rng.integers(NUM_DIGITS))
        digit = int(rng.choice(pool[label]))
        _place(rng, image, label, digit, scene)
    scene.image = to_bytes(image)
    return scene


def _place(rng: np.random.Generator, image: Array, label: int, digit: int, scene: Scene) -> None:
    """Add a digit on top where it leaves the others visible enough; shrink it until it fits."""
    size = image.shape[0]
    unit = size / SCENE_UNIT
    low, high = (unit * side for side in DIGIT_SIZE)
    side = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    for _ in range(6):
        alpha = glyph(rng, digit, side)
        height, width = alpha.shape
        if max(height, width) <= size:
            for _ in range(16):
                x = int(rng.integers(size - width + 1))
                y = int(rng.integers(size - height + 1))
                full = _mask(alpha, x, y, size)
                box = tight_box(full)
                if _fits(full, box, scene):
                    touched = [o.color for o in scene.instances if _iou(o.box, box) > 0]
                    color = _paint(rng, image, alpha, x, y, touched)
                    for other in scene.instances:
                        other.mask &= ~full
                    if scene.cluster is not None:
                        scene.cluster &= ~full
                    scene.instances.append(Instance(label, digit, full, full.copy(), color, box))
                    return
        side = max(low, side * 0.8)


def _fits(full: Mask, box: tuple[int, int, int, int], scene: Scene) -> bool:
    for other in scene.instances:
        if _iou(other.box, box) > MAX_BOX_IOU:
            return False
        if (other.mask & ~full).sum() < MIN_VISIBLE * other.full.sum():
            return False
    if scene.cluster is None:
        return True
    return bool((scene.cluster & full).sum() <= 0.1 * scene.cluster.sum())


def _draw_cluster(
    rng: np.random.Generator, image: Array, pool: tuple[tuple[int, ...], ...], scene: Scene
) -> None:
    """A dense group of small digits of one class on a jittered grid; its mask is one region."""
    size = image.shape[0]
    unit = size / SCENE_UNIT
    label = int(rng.integers(NUM_DIGITS))
    rows, cols = int(rng.integers(2, 4)), int(rng.integers(3, 6))
    pitch = CLUSTER_DIGIT_SIZE[1] * unit
    top = rng.uniform(0, size - (rows + 1) * pitch)
    left = rng.uniform(0, size - (cols + 1) * pitch)
    union = np.zeros((size, size), dtype=bool)
    for row in range(rows):
        for col in range(cols):
            digit = int(rng.choice(pool[label]))
            alpha = glyph(rng, digit, unit * rng.uniform(*CLUSTER_DIGIT_SIZE))
            y = int(top + (row + rng.uniform(-0.15, 0.15)) * pitch)
            x = int(left + (col + rng.uniform(-0.15, 0.15)) * pitch)
            y = int(np.clip(y, 0, size - alpha.shape[0]))
            x = int(np.clip(x, 0, size - alpha.shape[1]))
            _paint(rng, image, alpha, x, y, [])
            union |= _mask(alpha, x, y, size)
            scene.cluster_digits.append(digit)
    reach = 2 * round(pitch * 0.55) + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach))
    closed = cv2.morphologyEx(union.astype(np.uint8), cv2.MORPH_CLOSE, kernel)
    scene.cluster, scene.cluster_label = (closed > 0) | union, label


def to_bytes(image: Array) -> NDArray[np.uint8]:
    """Float RGB in 0..1 to uint8."""
    return np.round(image * 255).astype(np.uint8)
