"""The public layouts of the data sets: where their images and annotations are, and how many."""

from collections.abc import Mapping
from dataclasses import dataclass

IMAGES = (".jpg", ".jpeg", ".png")
"""How the names of images end, in any case."""


@dataclass(frozen=True)
class Layout:
    """The layout of one data set."""

    images: Mapping[str, str]
    """Folder of the images by split (`train`, `val`)."""
    annotations: Mapping[str, str]
    """File or folder of the annotations by split; empty where the folders say the classes."""
    classes: int
    """Of the public data set."""
    train_images: int
    """That the public data set trains on; of COCO those with objects."""

    @property
    def training(self) -> tuple[str, ...]:
        """How the paths of training files begin: of those, corrupt ones may be left out."""
        folders = [self.images["train"]]
        if self.annotations and not self.annotations["train"].endswith(".json"):
            folders.append(self.annotations["train"])
        return tuple(f"{folder}/" for folder in folders)


LAYOUTS = {
    "imagenet": Layout({"train": "train", "val": "val"}, {}, 1000, 1_281_167),
    "coco": Layout(
        {"train": "train2017", "val": "val2017"},
        {
            "train": "annotations/instances_train2017.json",
            "val": "annotations/instances_val2017.json",
        },
        80,
        117_266,
    ),
    "ade20k": Layout(
        {"train": "images/training", "val": "images/validation"},
        {"train": "annotations/training", "val": "annotations/validation"},
        150,
        20_210,
    ),
}
DATASETS = tuple(LAYOUTS)
