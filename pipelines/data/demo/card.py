"""Data cards of the demo: a contact sheet (.png), facts (.json) and both in prose (.md).

The sheets of COCO and ADE20K are drawn from the files that training reads, not from memory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from pipelines.data.demo.record import Record
from pipelines.data.demo.sources import DIGITS_CREDIT, PHOTOS
from pipelines.data.files import write_json
from pipelines.data.layout import LAYOUTS
from pipelines.data.sheet import INK, PAPER, Sheet, font, open_image

TITLES = {
    "imagenet": "ImageNet layout: one digit over a photograph crop",
    "coco": "COCO 2017 layout: boxes, visible masks, crowds",
    "ade20k": "ADE20K layout: image and label map",
}
PALETTE = (
    (230, 25, 75),
    (60, 180, 75),
    (255, 200, 25),
    (67, 99, 216),
    (245, 130, 49),
    (145, 30, 180),
    (66, 212, 244),
    (240, 50, 230),
    (170, 220, 60),
    (0, 150, 140),
)
BACKGROUND_COLOR = (58, 60, 66)
CROWD_COLOR = (250, 250, 250)
_COCO_SMALL, _COCO_MEDIUM = 32**2, 96**2
_ZOOM = 2
_SHEETS = {"imagenet": (10, 16), "coco": (3, 4), "ade20k": (3, 3)}  # rows, columns


def write_card(root: Path, dataset: str, classes: Sequence[str], records: list[Record]) -> None:
    """Write `<root>/cards/<dataset>.{png,json,md}`."""
    folder = root / "cards"
    folder.mkdir(parents=True, exist_ok=True)
    facts = _facts(dataset, classes, records)
    sheet = {"imagenet": _imagenet_sheet, "coco": _coco_sheet, "ade20k": _ade_sheet}[dataset]
    sheet(root / dataset, records).save(folder / f"{dataset}.png")
    write_json(folder / f"{dataset}.json", facts, indent=1)
    (folder / f"{dataset}.md").write_text(_prose(dataset, facts), encoding="utf-8")


def _facts(dataset: str, classes: Sequence[str], records: list[Record]) -> dict[str, Any]:
    facts: dict[str, Any] = {"dataset": dataset, "title": TITLES[dataset], "classes": list(classes)}
    facts["splits"] = {}
    for split in ("train", "val"):
        mine = [record for record in records if record.split == split]
        shown = np.bincount([label for record in mine for label in record.labels], minlength=10)
        part: dict[str, Any] = {
            "images": len(mine),
            "image_size": mine[0].size if mine else 0,
            "bytes": sum(size for record in mine for size, _ in record.files.values()),
            "digits_per_class": dict(zip(classes, shown.tolist(), strict=False)),
            "distinct_digits": len({digit for record in mine for digit in record.digits}),
            "photographs": sorted({record.photo for record in mine}),
        }
        if dataset == "coco":
            part |= _coco_facts(mine)
        if dataset == "ade20k":
            part |= _ade_facts(classes, mine)
        facts["splits"][split] = part
    used = {record.photo for record in records}
    facts["sources"] = {
        "digits": DIGITS_CREDIT,
        "photographs": [
            {k: v for k, v in asdict(photo).items() if k != "box"}
            for photo in PHOTOS
            if photo.name in used
        ],
    }
    return facts


def _coco_facts(records: list[Record]) -> dict[str, Any]:
    found = [a for record in records for a in record.annotations]
    objects = [a for a in found if not a["iscrowd"]]
    areas = np.array([a["area"] for a in objects] or [0])
    sides = np.array([max(a["bbox"][2:]) for a in objects] or [0])
    return {
        "objects": len(objects),
        "crowds": len(found) - len(objects),
        "objects_by_area": {
            "small (mask under 32x32)": int((areas < _COCO_SMALL).sum()),
            "medium": int(((areas >= _COCO_SMALL) & (areas < _COCO_MEDIUM)).sum()),
            "large (96x96 and over)": int((areas >= _COCO_MEDIUM).sum()),
        },
        "longest_box_side_quartiles": np.percentile(sides, [0, 25, 50, 75, 100]).tolist(),
    }


def _ade_facts(classes: Sequence[str], records: list[Record]) -> dict[str, Any]:
    pixels = np.sum([record.pixels for record in records], axis=0)
    share = np.round(100 * pixels / max(1, pixels.sum()), 3).tolist()
    return {"pixel_percent": dict(zip(["ignored", *classes], share, strict=True))}


def _prose(dataset: str, facts: dict[str, Any]) -> str:
    splits = facts["splits"]
    rows: list[tuple[str, Any, Any]] = []

    def add(name: str, key: str) -> None:
        if key in splits["train"]:
            rows.append((name, splits["train"][key], splits["val"][key]))

    add("images", "images")
    add("image size (px)", "image_size")
    add("bytes", "bytes")
    add("distinct MNIST digits", "distinct_digits")
    add("objects", "objects")
    add("crowd regions", "crowds")
    for key in ("digits_per_class", "objects_by_area", "pixel_percent"):
        unit = {"objects_by_area": "objects: ", "pixel_percent": "% of pixels: "}.get(key, "")
        for name in splits["train"].get(key, {}):
            rows.append((unit + name, splits["train"][key][name], splits["val"][key][name]))
    if dataset == "coco":
        train, val = (
            " / ".join(f"{q:g}" for q in splits[split]["longest_box_side_quartiles"])
            for split in ("train", "val")
        )
        rows.append(("longest box side, quartiles (px)", train, val))
    table = "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
    credit = facts["sources"]["digits"]
    photographs = "\n".join(
        f"| {p['name']} | {p['package']} | {p['licence']} | {'val' if p['val'] else 'train'} |"
        for p in facts["sources"]["photographs"]
    )
    return f"""# {facts["title"]}

![contact sheet]({dataset}.png)

| | train | val |
|---|---:|---:|
{table}

No digit and no photograph of the validation set occurs in any training set, in this data set
or in the other two; `sources.json` names both for every image.

Digits: {credit["name"]}; {credit["authors"]}; through {credit["package"]}, {credit["licence"]}.

| photograph | package | licence | split |
|---|---|---|---|
{photographs}
"""


def _choose(records: list[Record], split: str, count: int) -> list[Record]:
    """Some records of a split: as many photographs as possible, and a cluster if there is one."""
    seen: Counter[str] = Counter()
    ranked = []
    for record in records:
        if record.split == split:
            ranked.append((seen[record.photo], record.index, record))
            seen[record.photo] += 1
    chosen = [record for *_, record in sorted(ranked, key=lambda item: item[:2])]
    clusters = [i for i, record in enumerate(chosen) if _has_cluster(record)]
    if clusters and clusters[0] >= count:
        chosen.insert(count - 1, chosen.pop(clusters[0]))
    return chosen[:count]


def _has_cluster(record: Record) -> bool:
    crowded = any(annotation["iscrowd"] for annotation in record.annotations)
    return crowded or bool(record.pixels and record.pixels[0])


def _examples(records: list[Record], count: int) -> list[Record]:
    """Two thirds training images, one third validation images."""
    val = _choose(records, "val", max(1, count // 3))
    return _choose(records, "train", count - len(val)) + val


def _imagenet_sheet(folder: Path, records: list[Record]) -> Image.Image:
    rows, columns = _SHEETS["imagenet"]
    size = records[0].size
    val_columns = columns // 4
    note = f"left: train, last {val_columns} columns: val"
    sheet = Sheet((rows, columns), (size, size), TITLES["imagenet"], note)
    for label in range(rows):
        mine = [record for record in records if record.labels[0] == label]
        train = _choose(mine, "train", columns - val_columns)
        val = _choose(mine, "val", val_columns)
        for column, record in enumerate(train):
            sheet.paste(label, column, open_image(folder / record.image))
        for column, record in enumerate(val, start=columns - val_columns):
            sheet.paste(label, column, open_image(folder / record.image))
    return sheet.image


def _tag(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, color: Any) -> None:
    """A small label with its bottom left corner at (x, y), kept inside the image."""
    small = font(13)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=small)
    width, height = right - left + 6, bottom - top + 6
    y = max(y, height)
    draw.rectangle((x, y - height, x + width, y), fill=color)
    light = sum(c * w for c, w in zip(color, (0.3, 0.59, 0.11), strict=True)) < 150
    draw.text((x + 3 - left, y - height + 3 - top), text, PAPER if light else INK, small)


def _outline(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    inner = mask.copy()
    for _ in range(width):
        padded = np.pad(inner, 1)
        inner = (
            padded[1:-1, 1:-1]
            & padded[:-2, 1:-1]
            & padded[2:, 1:-1]
            & padded[1:-1, :-2]
            & padded[1:-1, 2:]
        )
    return mask & ~inner


def _coco_picture(path: Path, annotations: list[dict[str, Any]], zoom: int) -> Image.Image:
    """The image with its masks tinted and outlined, its boxes, and crowds hatched."""
    pixels = np.asarray(open_image(path, zoom)).astype(np.float32)
    for annotation in annotations:
        code = annotation["segmentation"]
        if annotation["iscrowd"]:
            code = coco_mask.frPyObjects(code, *code["size"])
        mask = coco_mask.decode(code).astype(bool).repeat(zoom, 0).repeat(zoom, 1)
        color = np.array(_color_of(annotation), dtype=np.float32)
        if annotation["iscrowd"]:
            y, x = np.indices(mask.shape)
            area = mask & ((x + y) % 8 < 2)
            pixels[area] = 0.3 * pixels[area] + 0.7 * color
        else:
            pixels[mask] = 0.55 * pixels[mask] + 0.45 * color
        pixels[_outline(mask, 1)] = color
    image = Image.fromarray(pixels.round().astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for annotation in annotations:
        x, y, width, height = (zoom * value for value in annotation["bbox"])
        draw.rectangle((x, y, x + width - 1, y + height - 1), outline=_color_of(annotation))
    for annotation in annotations:
        x, y, *_ = (zoom * value for value in annotation["bbox"])
        text = str(annotation["category_id"] - 1) + (" crowd" if annotation["iscrowd"] else "")
        _tag(draw, x, y + 1, text, _color_of(annotation))
    return image


def _color_of(annotation: dict[str, Any]) -> tuple[int, int, int]:
    return CROWD_COLOR if annotation["iscrowd"] else PALETTE[annotation["category_id"] - 1]


def _coco_sheet(folder: Path, records: list[Record]) -> Image.Image:
    rows, columns = _SHEETS["coco"]
    size = records[0].size
    zoom = max(1, round(_ZOOM * 160 / size))
    folders = LAYOUTS["coco"].images
    truth: dict[str, list[dict[str, Any]]] = {}
    for name in folders.values():
        content = json.loads((folder / f"annotations/instances_{name}.json").read_text())
        names = {i["id"]: f"{name}/{i['file_name']}" for i in content["images"]}
        for annotation in content["annotations"]:
            truth.setdefault(names[annotation["image_id"]], []).append(annotation)
    cell = (size * zoom, size * zoom)
    note = "two rows: train, last row: val; hatched: crowd"
    sheet = Sheet((rows, columns), cell, TITLES["coco"], note)
    for position, record in enumerate(_examples(records, rows * columns)):
        picture = _coco_picture(folder / record.image, truth.get(record.image, []), zoom)
        sheet.paste(position // columns, position % columns, picture)
    return sheet.image


def _ade_sheet(folder: Path, records: list[Record]) -> Image.Image:
    rows, columns = _SHEETS["ade20k"]
    size = records[0].size
    zoom = max(1, round(1.25 * 160 / size))
    colors = np.array([(255, 255, 255), *PALETTE, BACKGROUND_COLOR], dtype=np.uint8)
    cell = (2 * size * zoom + 2, size * zoom)
    note = "two rows: train, last row: val; white: label 0, ignored"
    sheet = Sheet((rows, columns), cell, TITLES["ade20k"], note)
    for position, record in enumerate(_examples(records, rows * columns)):
        row, column = divmod(position, columns)
        name = record.image.replace("images/", "annotations/").replace(".jpg", ".png")
        with Image.open(folder / name) as labels:
            painted = Image.fromarray(colors[np.asarray(labels)])
        sheet.paste(row, column, open_image(folder / record.image, zoom))
        painted = painted.resize((size * zoom, size * zoom), Image.Resampling.NEAREST)
        sheet.paste(row, column, painted, shift=size * zoom + 2)
    legend = ImageDraw.Draw(sheet.image)
    for digit, color in enumerate(PALETTE):
        x = 330 + 22 * digit
        legend.rectangle((x, 14, x + 18, 32), fill=color)
        legend.text((x + 9, 23), str(digit), PAPER, font(13), anchor="mm")
    return sheet.image
