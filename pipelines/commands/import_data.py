"""Bring annotated images of other formats into the layouts that the pipeline trains on."""

import shutil
import tempfile
from pathlib import Path

from pipelines.commands.import_boxes import import_boxes
from pipelines.commands.import_files import Options, drawn, pictures, place_image, share_of
from pipelines.commands.import_labels import import_labels
from pipelines.data.errors import DataError
from pipelines.data.files import write_json

RECORD = "import.json"
"""What was imported and how; it marks a folder that may be replaced."""
TASKS = {"folders": "classify", "palette": "segment"}
"""What a format is for, if not for detection."""


def import_data(kind: str, source: Path, target: Path, options: Options) -> None:
    """Write `target` in the layout of COCO, ImageNet or ADE20K, and tell what it holds.

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
        if kind == "folders":
            counts = _folders(source, staged, options)
        elif kind == "palette":
            counts = import_labels(source, staged, options)
        else:
            counts = import_boxes(kind, source, staged, options)
        how = {"format": kind, "val": options.val, "seed": options.seed, "tile": options.tile}
        write_json(staged / RECORD, {**how, "counts": counts}, indent=1)
        shutil.rmtree(target, ignore_errors=True)
        staged.replace(target)
    told = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
    print(f"{target}: {told}")
    print(f"Next: elsa finetune --{TASKS.get(kind, 'detect')} {target}")


def _folders(source: Path, target: Path, options: Options) -> dict[str, int]:
    """A folder of images for each class, into `train/<class>` and `val/<class>`."""
    share, counts = share_of(options), {"classes": 0, "training_images": 0, "validation_images": 0}
    names = sorted(path.name for path in source.iterdir() if path.is_dir())
    if not names:
        raise DataError(f"{source} has no folders, which would be the classes")
    for name in names:
        files = pictures(source / name)
        if share is None:
            split = {"train": files, "val": pictures(Path(options.val) / name)}
        else:
            try:
                chosen = drawn(len(files), share, options.seed)
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
                place_image(file, target / part / name, file.name)
        counts["classes"] += 1
        counts["training_images"] += len(split["train"])
        counts["validation_images"] += len(split["val"])
    return counts
