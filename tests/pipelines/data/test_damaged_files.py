"""Files that come from outside, damaged in hundreds of ways: each is read, or one message tells."""

import base64
import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

import elsa
from pipelines.data import dataset, pack
from pipelines.data.files import write_json
from pipelines.data.images import Images
from pipelines.data.public import archives
from pipelines.data.public.take import take_one
from pipelines.data.weights import WeightsDescription, read_description, write_weights
from pipelines.errors import PipelineError
from pipelines.params import Params, compose, load_params, read_yaml
from tests.mutations import VALUES, mutated, mutated_json

from .test_archives import add, pack_archives

Run = Callable[[], object]


def each(function: Any, arguments: Any, unit: str, done: Any) -> None:
    for one in arguments:
        done(function(*one))


def taking(kind: str, place: Path, storage: Path, check: str) -> Run:
    """A run of the stage's verification of a public data set, from its beginning."""
    params = compose()
    data = params.data.model_copy(update={kind: str(place), "storage": str(storage)})
    section = params.prepare.model_copy(update={"source": "public", "check": check})
    changed: Params = params.model_copy(update={"data": data, "prepare": section})

    def run() -> dict[str, Any]:
        shutil.rmtree(storage, ignore_errors=True)
        return take_one(changed, kind, each)

    return run


def damage(
    file: Path, run: Run, count: int, structure: bool = True, place: Path | None = None
) -> None:
    """Run on `count` damaged forms of a file, of its bytes and of its JSON; restores it. What is
    told names the file, or the folder `place` that it belongs to."""
    whole, rng = file.read_bytes(), random.Random(file.name)
    run()
    told: list[str] = []
    for number in range(count):
        if structure and number % 2:
            content = json.dumps(mutated_json(json.loads(whole), rng)).encode()
        else:
            content = mutated(whole, rng)
        file.write_bytes(content)
        try:
            run()
        except (PipelineError, elsa.CheckpointError, FileNotFoundError) as error:
            told.append(str(error))
    file.write_bytes(whole)
    assert len(told) > count / 10
    silent = [message for message in told if str(place or file.name) not in message]
    assert not silent, silent[0]
    run()


def test_params(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(json.dumps(compose().model_dump(mode="json")))
    damage(file, lambda: load_params(file), 200)
    damage(file, lambda: read_yaml(file), 50, structure=False)


def test_annotations_label_maps_and_class_files(copy_public, tmp_path: Path) -> None:
    coco, ade20k = copy_public("coco"), copy_public("ade20k")
    run = taking("coco", coco, tmp_path / "storage", "content")
    damage(coco / "annotations/instances_train2017.json", run, 80, place=coco)
    run = taking("ade20k", ade20k, tmp_path / "storage", "content")
    damage(ade20k / "classes.txt", run, 40, structure=False, place=ade20k)
    label_map = next((ade20k / "annotations/training").glob("*.png"))
    damage(label_map, run, 40, structure=False, place=ade20k)


@pytest.mark.parametrize("kind", ["imagenet", "coco", "ade20k"])
def test_manifests(kind: str, copy_demo, tmp_path: Path, monkeypatch) -> None:
    place = Path(shutil.move(copy_demo(kind), tmp_path / "data" / kind))
    count = len(json.loads((place / "manifest.json").read_text())["classes"])
    monkeypatch.setattr(dataset, "ROOT", tmp_path)
    find = partial(dataset.find_dataset, compose(), kind, count)
    damage(place / "manifest.json", find, 60, place=Path("data") / kind)


def test_indexes_of_shards(copy_public, tmp_path: Path) -> None:
    folder, shards = copy_public("imagenet"), tmp_path / "shards"
    manifest: Any = taking("imagenet", folder, tmp_path / "storage", "content")()
    pack.pack(folder, str(shards), manifest, each, shard_bytes=40_000)
    verify = taking("imagenet", shards, tmp_path / "storage", "sizes")

    def run() -> None:
        verify()
        Images(str(shards), "train")[0]

    damage(shards / "index.json", run, 80, place=shards)
    damage(shards / "manifest.json", run, 80, place=shards)
    damage(shards / "train.npz", run, 40, structure=False, place=shards)


def test_a_manifest_that_data_carry_is_used_only_whole(copy_public, tmp_path: Path) -> None:
    place, storage = copy_public("coco"), tmp_path / "storage"
    manifest: Any = taking("coco", place, storage, "content")()
    write_json(place / "manifest.json", manifest)
    run, rng = taking("coco", place, storage, "sizes"), random.Random(0)
    for _ in range(60):
        damaged = mutated_json(manifest, rng)
        write_json(place / "manifest.json", damaged)
        try:
            found: Any = run()
        except PipelineError:
            continue
        if found["digest"] != manifest["digest"]:  # it can't know another digest of the same data
            assert found["digest"] == damaged["digest"]
        assert found["counts"].keys() >= {"train", "val"}


def test_descriptions_of_weights(tmp_path: Path) -> None:
    import torch

    upstream = WeightsDescription({"name": "m"}, "0123", "run", {"top1": 1.5})
    described = WeightsDescription({"name": "m"}, "4567", "run", {}, upstream, "", ("a", "b"))
    written = write_weights(tmp_path / "weights", {"w": torch.zeros(2)}, described)
    assert read_description(tmp_path / "weights").upstream == replace(upstream, classes=[])
    assert read_description(tmp_path / "weights").sha256 == written.sha256
    damage(tmp_path / "weights/model.json", lambda: read_description(tmp_path / "weights"), 300)


def test_configs_of_models(tmp_path: Path) -> None:
    import timm
    from timm.models._hub import save_config_for_hf

    from elsa.predict import load_predictor

    model = timm.create_model("elsa_swin_micro", num_classes=3, depths=(1, 1, 1, 1))
    save_config_for_hf(model, str(tmp_path / "config.json"), {"label_names": ["a", "b", "c"]})
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    damage(tmp_path / "config.json", lambda: load_predictor(tmp_path), 80, place=tmp_path)


def test_requests_to_a_served_model() -> None:
    from pipelines.run.tracking.served_model import read_image

    rng, image = random.Random(0), np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    files = []
    for kind in ("PNG", "JPEG"):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, kind)
        files.append(buffer.getvalue())
    lists = ([[1]], [[[1, 2, "a"]]], [[[1, 2, None]]], [[1], [2, 3]], [[[float("nan")] * 3]])
    rejected: list[str] = []
    for _ in range(500):
        content = mutated(rng.choice(files), rng)
        forms = (content, base64.b64encode(content).decode(), content.decode("latin1"))
        try:
            found = read_image(rng.choice([*forms, *lists, *VALUES]))
        except mlflow.MlflowException as error:
            rejected.append(error.error_code)
        else:
            assert found.ndim == 3
            assert found.dtype == np.uint8
    assert len(rejected) > 300
    assert set(rejected) == {"INVALID_PARAMETER_VALUE"}


@pytest.mark.parametrize("kind", ["imagenet", "coco", "ade20k"])
def test_archives(kind: str, copy_public, tmp_path: Path, monkeypatch: Any) -> None:
    """With no published checksum to tell: nothing is left under the name of what is unpacked, and
    no file is written outside."""
    monkeypatch.setattr(archives, "CHECKSUMS", {})
    folder, target = tmp_path / "archives", tmp_path / "out/target"
    pack_archives(copy_public(kind), kind, folder)

    def run() -> None:
        shutil.rmtree(target.parent, ignore_errors=True)
        target.parent.mkdir()
        try:
            archives.unpack(folder, kind, target, each)
        except PipelineError:
            assert not target.exists()
            raise
        finally:
            assert {file.name for file in tmp_path.iterdir()} == before
            assert {file.name for file in target.parent.iterdir()} <= {"target", "target.unpacking"}

    target.parent.mkdir()
    before = {file.name for file in tmp_path.iterdir()}
    for file in sorted(folder.iterdir()):
        damage(file, run, 60, structure=False)


def test_what_is_inside_imagenets_devkit(copy_public, tmp_path: Path) -> None:
    """Damage that the devkit's own compression does not notice; and a list of labels."""
    pack_archives(copy_public("imagenet"), "imagenet", tmp_path / "archives")
    val, devkit = (tmp_path / "archives" / name for name in (archives.VAL_TAR, archives.DEVKIT))
    with tarfile.open(devkit) as archive:
        whole = {m.name: archive.extractfile(m).read() for m in archive if m.isreg()}  # type: ignore[union-attr]
    labels = tmp_path / archives.VAL_LABELS
    rng, told = random.Random(0), 0
    for changed in [name for name in whole for _ in range(60)]:
        content = whole | {changed: mutated(whole[changed], rng)}
        with tarfile.open(devkit, "w") as archive:
            for name, data in content.items():
                add(archive, name, data)
        labels.write_bytes(mutated(b"n01440764\n" * 20, rng))
        for given in (devkit, labels):
            try:
                archives.val_classes(val, given)
            except PipelineError as error:
                told += str(given) in str(error)
    assert told > 120
