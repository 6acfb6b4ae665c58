"""What is known of an image of the demo once it is written."""

from dataclasses import dataclass, field
from typing import Any

from pipelines.data.manifest import FileEntry


@dataclass(frozen=True)
class Record:
    """One image that was written: its files, what it shows, and where that came from."""

    dataset: str
    split: str
    index: int
    image: str  # path within the data set folder, as are the keys of `files`
    size: int
    files: dict[str, FileEntry]
    photo: str
    digits: list[int]
    labels: list[int]
    annotations: list[dict[str, Any]] = field(default_factory=list)  # COCO only
    pixels: list[int] = field(default_factory=list)  # ADE20K only: pixels of each label
