"""The demo data: digits over photographs in the layouts of ImageNet, COCO 2017 and ADE20K.

`shards` splits the work, `render_shard` draws one part (anywhere, in any order), `finish`
writes what needs them all: annotations, manifests, cards. Every image has its own random
stream, named by (seed, data set, split, index), so the bytes do not depend on the shards.

    <root>/imagenet/{train,val}/digit_3/digit_3_01602_0.JPEG
    <root>/coco/annotations/instances_{train,val}2017.json, {train,val}2017/000000000001.jpg
    <root>/ade20k/{images,annotations}/{training,validation}/ADE_train_00000001.{jpg,png}
    <root>/<dataset>/manifest.json, sources.json     <root>/cards/<dataset>.{md,png,json}
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from pipelines.data.demo import card
from pipelines.data.demo.record import Record
from pipelines.data.demo.scenes import Mask, Scene, draw_scene, draw_single, tight_box
from pipelines.data.demo.sources import NUM_DIGITS, digit_pool, photos
from pipelines.data.files import write_json
from pipelines.data.layout import DATASETS, LAYOUTS
from pipelines.data.manifest import MANIFEST, ChunkEntry, FileEntry, file_entry, make_manifest
from pipelines.data.public.chunks import chunks, files_of

SPLITS = ("train", "val")
DIGIT_CLASSES = tuple(f"digit_{digit}" for digit in range(NUM_DIGITS))
CLASSES = {
    "imagenet": DIGIT_CLASSES,
    "coco": DIGIT_CLASSES,
    "ade20k": (*DIGIT_CLASSES, "background"),
}
CLUSTER_EVERY = 12  # one scene in this many holds a cluster (COCO: a crowd, ADE20K: ignored)
_VAL_IDS = 1_000_000  # COCO ids are unique across the splits
_IDS_PER_IMAGE = 100
_SHARD = 100


class PrepareParams(Protocol):
    """What `prepare` needs to know; pipelines.params has the validated class."""

    @property
    def seed(self) -> int: ...
    @property
    def digits_per_class(self) -> int: ...
    @property
    def image_size(self) -> int: ...
    @property
    def train_variants(self) -> int: ...
    @property
    def scene_size(self) -> int: ...
    @property
    def train_scenes(self) -> int: ...
    @property
    def val_scenes(self) -> int: ...
    @property
    def max_digits(self) -> int: ...


@dataclass(frozen=True)
class Shard:
    """Images `start` to `stop` of one split of one data set."""

    dataset: str
    split: str
    start: int
    stop: int
    seed: int
    per_class: int
    size: int
    variants: int
    max_digits: int

    @property
    def name(self) -> str:
        """For progress lines and task names."""
        return f"{self.dataset}/{self.split}[{self.start}:{self.stop}]"

    def __len__(self) -> int:
        return self.stop - self.start


def shards(params: PrepareParams) -> list[Shard]:
    """All the work, in parts of about equal time, each independent of the others."""
    found = []
    for dataset in DATASETS:
        for split in SPLITS:
            variants = params.train_variants if split == "train" else 1
            if dataset == "imagenet":
                pool = digit_pool(params.seed, params.digits_per_class, split)
                count, size = sum(map(len, pool)) * variants, params.image_size
            else:
                count = params.train_scenes if split == "train" else params.val_scenes
                size = params.scene_size
            step = _SHARD * 4 if dataset == "imagenet" else _SHARD
            found += [
                Shard(
                    dataset,
                    split,
                    start,
                    min(start + step, count),
                    params.seed,
                    params.digits_per_class,
                    size,
                    variants,
                    params.max_digits,
                )
                for start in range(0, count, step)
            ]
    return found


def render_shard(shard: Shard, root: Path | str) -> list[Record]:
    """Draw the images of a shard and write them below `root`."""
    cv2.setNumThreads(1)  # the images are small, and other shards run beside this one
    folder = Path(root) / shard.dataset
    draw = {"imagenet": _imagenet, "coco": _coco, "ade20k": _ade20k}[shard.dataset]
    return [draw(shard, index, folder) for index in range(shard.start, shard.stop)]


def finish(
    params: PrepareParams, root: Path | str, records: Iterable[Record]
) -> dict[str, dict[str, Any]]:
    """Write annotations, sources, cards and manifests; returns the manifest of each data set."""
    root = Path(root)
    ordered = sorted(records, key=lambda record: (record.dataset, record.split, record.index))
    expected = sum(map(len, shards(params)))
    if len(ordered) != expected:
        raise ValueError(f"{len(ordered)} records, but the parameters ask for {expected} images")
    manifests = {}
    for dataset in DATASETS:
        mine = [record for record in ordered if record.dataset == dataset]
        folder = root / dataset
        files = {name: entry for record in mine for name, entry in record.files.items()}
        if dataset == "coco":
            for split in SPLITS:
                name = LAYOUTS["coco"].annotations[split]
                write_json(folder / name, _coco_annotations(mine, split))
                files[name] = file_entry(folder / name)
        write_json(folder / "sources.json", _sources(mine))
        card.write_card(root, dataset, CLASSES[dataset], mine)
        counts = {split: sum(record.split == split for record in mine) for split in SPLITS}
        entries = {
            part.name: str(ChunkEntry.of({name: files[name] for name in files_of(folder, part)}))
            for part in chunks(folder, dataset, CLASSES[dataset])
        }
        manifests[dataset] = make_manifest(dataset, CLASSES[dataset], counts, entries, {})
        write_json(folder / MANIFEST, manifests[dataset], indent=1)
    return manifests


def prepare(params: PrepareParams, root: Path | str) -> dict[str, dict[str, Any]]:
    """Make all three data sets in this process (stages spread the shards over Ray instead)."""
    records = [record for shard in shards(params) for record in render_shard(shard, root)]
    return finish(params, root, records)


def _rng(shard: Shard, index: int) -> np.random.Generator:
    stream = [DATASETS.index(shard.dataset), SPLITS.index(shard.split), index]
    return np.random.default_rng([shard.seed, *stream])


def _write(folder: Path, name: str, pixels: NDArray[np.uint8], **options: Any) -> FileEntry:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **options)
    data = buffer.getvalue()
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return len(data), hashlib.sha256(data).hexdigest()


def _write_jpeg(folder: Path, name: str, pixels: NDArray[np.uint8]) -> FileEntry:
    return _write(folder, name, pixels, format="JPEG", quality=95, subsampling=0)


def _imagenet(shard: Shard, index: int, folder: Path) -> Record:
    pool = digit_pool(shard.seed, shard.per_class, shard.split)
    position, variant = divmod(index, shard.variants)
    label, position = divmod(position, len(pool[0]))
    digit = pool[label][position]
    rng = _rng(shard, index)
    photo = _choose_photo(rng, shard.split)
    name = f"{shard.split}/{DIGIT_CLASSES[label]}/{DIGIT_CLASSES[label]}_{digit:05d}_{variant}.JPEG"
    entry = _write_jpeg(folder, name, draw_single(rng, shard.size, digit, photo))
    return Record(
        *(shard.dataset, shard.split, index, name, shard.size),
        {name: entry},
        photo.name,
        [digit],
        [label],
    )


def _coco(shard: Shard, index: int, folder: Path) -> Record:
    scene = _scene(shard, index)
    number = index + 1 + (_VAL_IDS if shard.split == "val" else 0)
    name = f"{LAYOUTS['coco'].images[shard.split]}/{number:012d}.jpg"
    entry = _write_jpeg(folder, name, scene.image)
    annotations = [
        _annotation(number, i, instance.label + 1, instance.mask)
        for i, instance in enumerate(scene.instances, start=1)
    ]
    if scene.cluster is not None:
        crowd = _annotation(number, 0, scene.cluster_label + 1, scene.cluster, crowd=True)
        annotations.append(crowd)
    labels = [instance.label for instance in scene.instances]
    return Record(
        *(shard.dataset, shard.split, index, name, shard.size),
        {name: entry},
        scene.photo,
        scene.digits,
        labels,
        annotations,
    )


def _ade20k(shard: Shard, index: int, folder: Path) -> Record:
    scene = _scene(shard, index)
    layout, stem = LAYOUTS["ade20k"], f"ADE_{shard.split}_{index + 1:08d}"
    label_map = np.full(scene.image.shape[:2], NUM_DIGITS + 1, dtype=np.uint8)
    if scene.cluster is not None:
        label_map[scene.cluster] = 0
    for instance in scene.instances:
        label_map[instance.mask] = instance.label + 1
    image = f"{layout.images[shard.split]}/{stem}.jpg"
    labels = f"{layout.annotations[shard.split]}/{stem}.png"
    files = {
        image: _write_jpeg(folder, image, scene.image),
        labels: _write(folder, labels, label_map, format="PNG"),
    }
    pixels = np.bincount(label_map.ravel(), minlength=NUM_DIGITS + 2).tolist()
    shown = [instance.label for instance in scene.instances]
    return Record(
        *(shard.dataset, shard.split, index, image, shard.size),
        files,
        scene.photo,
        scene.digits,
        shown,
        pixels=pixels,
    )


def _choose_photo(rng: np.random.Generator, split: str) -> Any:
    choices = photos(split)
    return choices[int(rng.integers(len(choices)))]


def _scene(shard: Shard, index: int) -> Scene:
    rng = _rng(shard, index)
    pool = digit_pool(shard.seed, shard.per_class, shard.split)
    photo = _choose_photo(rng, shard.split)
    cluster = index % CLUSTER_EVERY == CLUSTER_EVERY // 2
    return draw_scene(rng, shard.size, shard.max_digits, pool, photo, cluster)


def _annotation(
    image_id: int, position: int, category: int, mask: Mask, crowd: bool = False
) -> dict[str, Any]:
    """A COCO annotation of a visible mask, as a run-length code: polygons cannot hold holes.

    Instances use the compressed form (a string), crowds the list of counts, as COCO does.
    """
    left, top, right, bottom = tight_box(mask)
    if crowd:
        segmentation = {"size": list(mask.shape), "counts": _run_lengths(mask)}
    else:
        code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        segmentation = {"size": list(mask.shape), "counts": code["counts"].decode("ascii")}
    return {
        "id": image_id * _IDS_PER_IMAGE + position,
        "image_id": image_id,
        "category_id": category,
        "bbox": [left, top, right - left, bottom - top],
        "area": int(mask.sum()),
        "segmentation": segmentation,
        "iscrowd": int(crowd),
    }


def _run_lengths(mask: Mask) -> list[int]:
    """Column-major run lengths, starting with a run of zeros (of length 0 if need be)."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    bounds = np.concatenate([[0], edges, [mask.size]])
    runs = np.diff(bounds).tolist()
    return runs if runs[-1] else runs[:-1]


def _coco_annotations(records: list[Record], split: str) -> dict[str, Any]:
    mine = [record for record in records if record.split == split]
    images = [
        {
            "id": int(Path(record.image).stem),
            "file_name": Path(record.image).name,
            "width": record.size,
            "height": record.size,
            "license": 1,
        }
        for record in mine
    ]
    return {
        "info": {
            "description": "MNIST digits over photographs, in the COCO 2017 layout",
            "version": "1.0",
            "year": 2017,
            "contributor": "pipelines.data.demo",
        },
        "licenses": [{"id": 1, "name": "see sources in cards/coco.json", "url": ""}],
        "categories": [
            {"id": i, "name": name, "supercategory": "digit"}
            for i, name in enumerate(CLASSES["coco"], start=1)
        ],
        "images": images,
        "annotations": [annotation for record in mine for annotation in record.annotations],
    }


def _sources(records: list[Record]) -> dict[str, dict[str, Any]]:
    """The photograph and the digits behind every image: {split: {image: {photo, digits}}}."""
    return {
        split: {
            record.image: {"photo": record.photo, "digits": record.digits}
            for record in records
            if record.split == split
        }
        for split in SPLITS
    }
