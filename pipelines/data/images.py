"""Images to train on: a folder, tar shards on disk, or tar shards at an fsspec URL, all alike."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder

from pipelines.data.errors import DataError
from pipelines.data.store import Dataset, ShardSet, is_shards, public_url


class Shards(Reader):
    """timm's reader of one split of a shard set."""

    def __init__(self, place: str, split: str) -> None:
        super().__init__()
        shard_set = ShardSet(place)
        if split not in shard_set.splits:
            raise DataError(f"{public_url(place)} has no split {split}")
        self.store = shard_set.store
        self.shards = [shard["name"] for shard in shard_set.splits[split]["shards"]]
        self.table = shard_set.images(split, "shard", "offset", "size", "label", "name")
        self.class_to_idx = {name: i for i, name in enumerate(shard_set.classes)}

    def __len__(self) -> int:
        return len(self.table["label"])

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        return self.read([index])[0]

    def read(self, indices: Sequence[int]) -> list[tuple[io.BytesIO, int]]:
        """Encoded images with their labels, read together."""
        table, parts = self.table, []
        for i in indices:
            name = self.shards[int(table["shard"][i])]
            parts.append((name, int(table["offset"][i]), int(table["size"][i])))
        found = self.store.read_parts(parts)
        labels = table["label"]
        return [(io.BytesIO(d), int(labels[i])) for d, i in zip(found, indices, strict=True)]

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = self.table["name"][index].decode()
        return name.rsplit("/", 1)[-1] if basename else name


class Folder(ReaderImageFolder):
    """timm's reader of `<place>/<split>/<class>/`, without the images in `skipped`."""

    def __init__(self, place: str, split: str, skipped: Collection[str] = ()) -> None:
        super().__init__(str(Path(place) / split))
        left_out = {str(Path(place) / name) for name in skipped}
        if left_out:
            self.samples = [sample for sample in self.samples if sample[0] not in left_out]


class Images(ImageDataset):
    """One split of a data set for timm's loader.

    Where timm takes the next image for one that can't be read, this raises DataError with its
    name: what may be left out was decided when the data was verified.

    Args:
        place: a folder with `<split>/<class>/`, or a shard set in a folder or at a URL.
        split: `train` or `val`.
        skipped: images of a folder to leave out, as `<split>/<class>/<file>`.
    """

    def __init__(self, place: str, split: str, skipped: Collection[str] = ()) -> None:
        reader = Shards(place, split) if is_shards(place) else Folder(place, split, skipped)
        super().__init__(root=place, reader=reader)
        self._ahead: dict[int, tuple[Any, int]] = {}

    def __getitem__(self, index: int) -> tuple[Any, int]:
        found = self._ahead.pop(index, None) or self.reader[index]
        return self._sample(index, *found)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int]]:
        self.prefetch(indices)
        return [self[i] for i in indices]

    def prefetch(self, indices: Sequence[int]) -> None:
        """Read the images of a batch together, which are then asked for one by one.

        At a URL that takes the time of one image, not of all; a folder needs none of it.
        """
        if isinstance(self.reader, Shards):
            self._ahead = dict(zip(indices, self.reader.read(indices), strict=True))

    def _sample(self, index: int, file: Any, label: int) -> tuple[Any, int]:
        try:
            with file, Image.open(file) as image:
                pixels = image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(
                f"image {self.filename(index, absolute=True)} can't be decoded ({error}); run"
                " `dvc repro --force prepare` with prepare.check=content, which lists all of these"
            ) from None
        return (self.transform(pixels) if self.transform else pixels), label


def images_of(dataset: Dataset, split: str) -> Images:
    """The images of a split that training and evaluation read."""
    return Images(dataset.place, split, dataset.skipped)
