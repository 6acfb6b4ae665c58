"""Tar shards: the same images, order and tensors as the folder, on disk and over S3."""

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from pipelines.benchmarks.loader import measure
from pipelines.data import images, pack, store
from pipelines.data.demo import draw as demo
from pipelines.data.errors import DataError
from pipelines.data.public import verify
from pipelines.data.store import Dataset
from pipelines.params import Model, compose
from pipelines.train.classify import Classifier
from pipelines.train.job import Job
from pipelines.train.loading import MicroBatchSampler, Part, make_loader
from pipelines.train.reporter import LocalReporter

SETTINGS = compose().prepare
SMOKE = compose(["recipe=smoke"])
CONTENT = SETTINGS.model_copy(update={"check": "content"})


def each(function: Any, arguments: Any, unit: str, done: Any) -> None:
    for one in arguments:
        done(function(*one))


def manifest_of(place: Path | str, storage: Path, settings: Any = SETTINGS) -> dict[str, Any]:
    return verify.verify("imagenet", str(place), settings, SETTINGS.imagenet, storage, each)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`folder` with 10 classes, and `shards` packed from it."""
    root = tmp_path_factory.mktemp("shards")
    sizes = {"image_size": 48, "scene_size": 96, "train_scenes": 1, "val_scenes": 1}
    params = SimpleNamespace(seed=1, digits_per_class=10, train_variants=1, max_digits=3, **sizes)
    for shard in demo.shards(params):
        if shard.dataset == "imagenet":
            demo.render_shard(shard, root)
    (root / "imagenet").rename(root / "folder")
    manifest = manifest_of(root / "folder", root)
    packed = pack.pack(root / "folder", str(root / "shards"), manifest, each, shard_bytes=40_000)
    assert packed == manifest, "the same run as on the folder"
    return root


@pytest.fixture(scope="module")
def bucket(root: Path) -> Iterator[str]:
    """The shard set in an S3 bucket of a server on this machine."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # Loader processes have the environment of the process that they are forked from.
        forkserver._forkserver._stop()
        boto3.client("s3").create_bucket(Bucket="data")
        manifest = manifest_of(root / "folder", root)
        url = "s3://data/imagenet"
        assert pack.pack(root / "folder", url, manifest, each, shard_bytes=40_000) == manifest
        yield url
    forkserver._forkserver._stop()
    server.stop()


def batches(place: str, workers: int, training: bool) -> list[Any]:
    """Two epochs over half of the images, as training or evaluation loads them."""
    p = SMOKE.pretrain.model_copy(update={"batch_size": 7})
    loading = SMOKE.loader.model_copy(update={"data_workers": workers})
    data = images.Images(place, "train")
    part = Part(data, list(range(0, len(data), 4)) + list(range(1, len(data), 4)), seed=7)
    augment = "rand-m9-mstd0.5-inc1" if training else None
    part.transform = create_transform((3, 32, 32), training, auto_augment=augment)
    sampler = MicroBatchSampler(len(part), p)
    order: dict[str, Any] = {"batch_sampler": sampler} if training else {"batch_size": 7}
    loader = make_loader(loading, part, torch.device("cpu"), **order)
    found = []
    for sampler.epoch in range(2):
        found += list(loader)
    return found


@pytest.mark.parametrize(("workers", "training"), [(0, False), (0, True), (2, True)])
def test_shards_give_the_tensors_of_the_folder(
    root: Path, bucket: str, workers: int, training: bool
) -> None:
    expected = batches(str(root / "folder"), workers, training)
    for place in (str(root / "shards"), bucket):
        found = batches(place, workers, training)
        assert len(found) == len(expected)
        for (a, x), (b, y) in zip(expected, found, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(x, y)


def test_order_labels_names_and_webdataset_members(root: Path) -> None:
    for split, count in (("train", 80), ("val", 20)):
        folder = images.Images(str(root / "folder"), split)
        shards = images.Images(str(root / "shards"), split)
        assert len(folder) == len(shards) == count
        for i in range(count):
            assert folder[i][1] == shards[i][1]
            assert f"{split}/{folder.filename(i)}" == shards.filename(i)
        assert folder.reader.class_to_idx == shards.reader.class_to_idx
    index = json.loads((root / "shards/index.json").read_text())
    names = [shard["name"] for shard in index["splits"]["train"]["shards"]]
    assert len(names) >= 3
    seen, classes = [], set()
    for name in names:
        with tarfile.open(root / "shards" / name) as archive:
            members = archive.getnames()
            for key in sorted({member.split(".")[0] for member in members}):
                files = {m: archive.extractfile(f"{key}.{m}").read() for m in ("cls", "json")}
                note = json.loads(files["json"])
                assert demo.CLASSES["imagenet"].index(note["class"]) == int(files["cls"])
                data = archive.extractfile(f"{key}.jpg").read()
                assert data == (root / "folder" / note["name"]).read_bytes()
                seen.append(int(key))
                classes.add((name, note["class"]))
    assert sorted(seen) == list(range(80)), "each image is in one shard, once"
    assert len(classes) > 5 * len(names), "a shard that is streamed has mixed classes"


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy())


def test_every_worker_count_sees_each_image_once(root: Path) -> None:
    """Also across ranks: what one rank sees no other does, and none is missing."""
    for workers in (0, 1, 3):
        data = images.Images(str(root / "shards"), "val")
        data.transform = to_tensor
        seen = []
        for rank in range(2):
            part = Part(data, list(range(len(data)))[rank::2])
            loader = torch.utils.data.DataLoader(part, batch_size=3, num_workers=workers)
            seen += [image.numpy().tobytes() for batch, _ in loader for image in batch]
        assert len(seen) == len(set(seen)) == 20


def test_training_on_shards_is_training_on_the_folder(root: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)  # more only get in each other's way here
    params = compose(["recipe=smoke"])
    short = {"epochs": 1, "warmup_epochs": 0, "holdout": 0.1, "img_size": 32}
    section = params.pretrain.model_copy(update=short)
    model = Model(name="resnet10t")
    params = params.model_copy(update={"pretrain": section, "model": model})
    scores = []
    for name in ("folder", "shards"):
        reporter = LocalReporter(tmp_path / name, quiet=True)
        data = Dataset("imagenet", str(root / name), tuple("0123456789"), {}, "")
        Classifier(Job("pretrain", params, data), torch.device("cpu"), reporter).fit()
        result = json.loads((tmp_path / name / "result.json").read_text())
        scores.append([result["loss"], *[row["train_loss"] for row in result["history"]]])
    assert scores[0] == scores[1]


def test_a_killed_packing_resumes_and_gives_the_same_bytes(root: Path, tmp_path: Path) -> None:
    manifest, written = manifest_of(root / "folder", root), []

    def dying(function: Any, arguments: Any, unit: str, done: Any) -> None:
        for one in arguments:
            if len(written) == 2:
                raise KeyboardInterrupt
            function(*one)
            written.append(one[0].name)

    target = tmp_path / "shards"
    with pytest.raises(KeyboardInterrupt):
        pack.pack(root / "folder", str(target), manifest, dying, shard_bytes=40_000)
    assert not (target / "index.json").exists()
    counted: list[str] = []

    def counting(function: Any, arguments: Any, unit: str, done: Any) -> None:
        counted.extend(one[0].name for one in arguments)
        each(function, arguments, unit, done)

    pack.pack(root / "folder", str(target), manifest, counting, shard_bytes=40_000)
    assert not set(written) & set(counted)
    files = {p.name: p.read_bytes() for p in target.iterdir()}
    assert files == {p.name: p.read_bytes() for p in (root / "shards").iterdir()}


def test_resized_shards(root: Path, tmp_path: Path) -> None:
    manifest = manifest_of(root / "folder", root)
    packed = pack.pack(root / "folder", str(tmp_path), manifest, each, resize=24)
    assert packed["digest"] != manifest["digest"], "other images are another run"
    assert packed["counts"] == manifest["counts"]
    assert manifest_of(tmp_path, root, CONTENT) == packed
    image, _ = images.Images(str(tmp_path), "val")[0]
    assert image.size == (24, 24)


def test_a_shard_set_is_verified(root: Path, bucket: str, tmp_path: Path) -> None:
    manifest = manifest_of(root / "folder", root)
    assert manifest_of(bucket, root, CONTENT) == manifest
    copy = Path(shutil.copytree(root / "shards", tmp_path / "copy"))
    assert manifest_of(copy, root, CONTENT) == manifest
    shard = copy / "train-00001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    assert manifest_of(copy, root) == manifest
    with pytest.raises(DataError, match=r"train-00001.tar has another sha256"):
        manifest_of(copy, root, CONTENT)
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"train-00001.tar has \d+ bytes, \d+ when it was packed"):
        manifest_of(copy, root)
    with pytest.raises(DataError, match=r"train-00001.tar is cut short"):
        batches(str(copy), 0, False)
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00001.tar is missing"):
        manifest_of(copy, root)
    (copy / "index.json").write_text("{}")
    with pytest.raises(DataError, match="is not the index of a shard set"):
        manifest_of(copy, root)


def test_a_folder_that_changed_is_not_packed(root: Path, tmp_path: Path) -> None:
    manifest = manifest_of(root / "folder", root)
    copy = Path(shutil.copytree(root / "folder", tmp_path / "folder"))
    path = min((copy / "train/digit_3").iterdir())
    buffer = io.BytesIO()
    Image.new("RGB", (48, 48)).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="is not what was verified: train/digit_3"):
        pack.pack(copy, str(tmp_path / "shards"), manifest, each)
    assert not (tmp_path / "shards").exists()


def test_a_full_disk_leaves_no_half_shard(root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def full(archive: Any, name: str, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    manifest = manifest_of(root / "folder", root)
    with monkeypatch.context() as patch:
        patch.setattr(pack, "_add", full)
        with pytest.raises(DataError, match=r"train-00000.tar can't be written .*No space left"):
            pack.pack(root / "folder", str(tmp_path / "shards"), manifest, each)
    assert list((tmp_path / "shards").iterdir()) == []


def test_an_unreachable_url_is_named_without_its_credentials(bucket: str, monkeypatch: Any) -> None:
    tried = []
    monkeypatch.setattr(store.time, "sleep", tried.append)
    with pytest.raises(DataError, match=r"s3://data/nothing/index.json can't be read"):
        store.ShardSet("s3://data/nothing")
    assert not tried, "what is not there is not tried again"
    with pytest.raises(DataError) as caught:
        store.ShardSet("http://user:hush@127.0.0.1:9/imagenet")
    assert "http://127.0.0.1:9/imagenet/index.json can't be reached after 4 tries" in str(
        caught.value
    )
    assert "hush" not in str(caught.value)
    assert len(tried) == 3
    assert tried[0] < tried[-1]


def test_a_lost_connection_is_tried_again(bucket: str, monkeypatch: Any) -> None:
    reader = images.Shards(bucket, "train")
    whole = [file.read() for file, _ in reader.read([3, 60, 9])]
    failures = [TimeoutError("lost"), ConnectionResetError("lost")]
    ranges = store.Store._ranges

    def flaky(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return ranges(*arguments)

    monkeypatch.setattr(store.Store, "_ranges", staticmethod(flaky))
    monkeypatch.setattr(store, "BACKOFF", 0.01)
    assert [file.read() for file, _ in reader.read([3, 60, 9])] == whole
    assert not failures


def test_the_loader_benchmark_reads_each_kind(root: Path) -> None:
    for name in ("folder", "shards"):
        result = measure(str(root / name), compose(["recipe=smoke"]).pretrain, workers=0, count=40)
        assert result["images"] == 40
        assert result["images_per_second"] > 0
