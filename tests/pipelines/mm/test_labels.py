"""Images of several kinds beside their label maps."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from pipelines.mm.config import build_config

from .full_size import SHORT, SMALL


def test_images_of_all_kinds_are_found_with_their_labels(make_job, tmp_path) -> None:
    job = make_job("segment", group="upernet_160k", **SMALL["segment"] | SHORT)
    place = Path(job.dataset.place)
    shutil.copytree(place, tmp_path / "mixed")
    folder = tmp_path / "mixed/images/validation"
    first, second, *rest = sorted(folder.glob("*.jpg"))
    Image.open(first).save(first.with_suffix(".png"))
    first.unlink()
    second.rename(second.with_suffix(".JPEG"))
    assert rest
    job = replace(job, dataset=replace(job.dataset, place=str(tmp_path / "mixed")))
    config = build_config(job, tmp_path)
    init_default_scope("mmseg")
    steps = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}]
    dataset = DATASETS.build(config.val_dataloader.dataset | {"pipeline": steps})
    names = [first.with_suffix(".png").name, second.with_suffix(".JPEG").name]
    assert len(dataset) == len(rest) + 2
    assert [Path(dataset[i]["img_path"]).name for i in range(len(dataset))] == [
        *names,
        *(file.name for file in rest),
    ]
    for i in range(3):
        item = dataset[i]
        label = np.asarray(Image.open(place / f"annotations/validation/{first.stem}.png"))
        if i == 0:
            np.testing.assert_array_equal(item["gt_seg_map"], label - 1)  # 0 becomes 255
        assert item["img"].shape[:2] == item["gt_seg_map"].shape
