"""What a training stage finds: the data set that `prepare` drew, or what is wrong with it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.data import dataset
from pipelines.data.demo import draw as demo
from pipelines.data.errors import DataError
from pipelines.data.store import Dataset
from pipelines.params import compose

CLASSES = {kind: len(classes) for kind, classes in demo.CLASSES.items()}


@pytest.fixture
def find(
    demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Dataset]:
    shutil.copytree(demo_data, tmp_path / "data")
    monkeypatch.setattr(dataset, "ROOT", tmp_path)
    return lambda kind: dataset.find_dataset(compose(), kind, CLASSES[kind])


@pytest.mark.parametrize("kind", demo.DATASETS)
def test_what_was_drawn_is_found(find: Any, tmp_path: Path, kind: str) -> None:
    found = find(kind)
    assert (found.name, found.place) == (kind, str(tmp_path / "data" / kind))
    assert found.classes == demo.CLASSES[kind]
    assert found.counts["train"] == (160 if kind == "imagenet" else 14)
    with pytest.raises(DataError, match=r"classes, but num_classes is 7 .* Set num_classes to"):
        dataset.find_dataset(compose(), kind, 7)


@pytest.mark.parametrize("kind", demo.DATASETS)
def test_a_file_cut_short_missing_or_added(find: Any, tmp_path: Path, kind: str) -> None:
    root = tmp_path / "data" / kind
    paths = sorted(p for p in root.rglob("*.*") if p.suffix != ".json")
    for path in paths[:: len(paths) // 5]:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(DataError, match=r"is not what was drawn: .* `dvc repro prepare`"):
            find(kind)
        path.unlink()
        with pytest.raises(DataError):
            find(kind)
        path.write_bytes(whole)
        added = path.with_stem("added")
        added.write_bytes(whole)
        with pytest.raises(DataError):
            find(kind)
        added.unlink()
    find(kind)


def test_annotations_cut_short(find: Any, tmp_path: Path) -> None:
    path = tmp_path / "data/coco/annotations/instances_train2017.json"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="annotations has 2 files of"):
        find("coco")


def test_nothing_drawn_half_drawn_or_another_data_set(find: Any, tmp_path: Path) -> None:
    place = tmp_path / "data/imagenet/manifest.json"
    for damaged in ("{", '{"dataset": "imagenet", "classes": []}', '{"absent": true}'):
        place.write_text(damaged)
        with pytest.raises(DataError, match=r"has no manifest .* `dvc repro prepare`"):
            find("imagenet")
    shutil.copy(tmp_path / "data/coco/manifest.json", place)
    with pytest.raises(DataError, match="has no manifest of the data set in"):
        find("imagenet")
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(DataError, match=r"`dvc repro prepare`"):
        find("imagenet")
