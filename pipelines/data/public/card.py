"""Data cards of public data sets: a contact sheet (.png), facts (.json) and both in prose (.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from pipelines.data.files import write_json
from pipelines.data.layout import IMAGES, LAYOUTS
from pipelines.data.manifest import ChunkEntry
from pipelines.data.sheet import Sheet, open_image


def write_public_card(root: Path, dataset: str, manifest: dict[str, Any], place: str) -> None:
    """Write `<root>/cards/<dataset>.{png,json,md}` of a data set that is read at `place`."""
    folder, counts = root / "cards", manifest["counts"]
    entries = [ChunkEntry.parse(line) for line in manifest["chunks"].values()]
    facts = {
        "dataset": dataset,
        "classes": manifest["classes"],
        "splits": {split: {"images": count} for split, count in counts.items()},
        "files": sum(entry.files for entry in entries),
        "bytes": sum(entry.bytes for entry in entries),
        "skipped": manifest["skipped"],
        "digest": manifest["digest"],
    }
    write_json(folder / f"{dataset}.json", facts, indent=1)
    size, rows, columns = 144, 3, 8
    title = f"{dataset}: {len(manifest['classes'])} classes"
    sheet = Sheet((rows, columns), (size, size), title, "validation images")
    for i, image in enumerate(_public_samples(dataset, manifest, place, rows * columns)):
        sheet.paste(*divmod(i, columns), ImageOps.fit(image, (size, size)))
    sheet.image.save(folder / f"{dataset}.png")
    skipped = "".join(f"| {name} | {why} |\n" for name, why in manifest["skipped"].items())
    text = f"""# {dataset}

![contact sheet]({dataset}.png)

| | |
|---|---:|
| classes | {len(manifest["classes"])} |
| training images | {counts["train"]} |
| validation images | {counts["val"]} |
| files | {facts["files"]} |
| bytes | {facts["bytes"]} |
| images left out | {len(manifest["skipped"])} |
| digest | {manifest["digest"][:12]} |
"""
    if skipped:
        text += f"\n| left out | because |\n|---|---|\n{skipped}"
    (folder / f"{dataset}.md").write_text(text, encoding="utf-8")


def _public_samples(
    dataset: str, manifest: dict[str, Any], place: str, count: int
) -> list[Image.Image]:
    """Validation images spread over the data set."""
    from pipelines.data.images import Images  # with torch, which the demo's do not need
    from pipelines.data.store import is_shards

    if is_shards(place):
        images = Images(place, "val")
        chosen = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int).tolist()
        return [image for image, _ in images.__getitems__(chosen)]
    if dataset == "imagenet":
        folders = [Path(place) / n for n in manifest["chunks"] if n.startswith("val/")]
        step = max(1, len(folders) // count)
        files = [_image_files(folder)[0] for folder in folders[::step][:count]]
    else:
        found = _image_files(Path(place) / LAYOUTS[dataset].images["val"])
        files = found[:: max(1, len(found) // count)][:count]
    return [open_image(path) for path in files]


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES)
