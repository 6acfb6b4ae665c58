"""A replayed epoch ends with the same bits, and with others if anything of it was changed."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps

from pipelines.train.classify import train
from pipelines.train.replay import (
    add_to_chain,
    finished_epochs,
    read_chain,
    replay,
    state_digest,
)

from .test_classify import CPU, Recorder, job_of, smoke

BASE = {"epochs": 3, "mixup": 0.2, "drop_path_rate": 0.1}


class Keeper(Recorder):
    """Keeps the checkpoint of every epoch in a folder of its number."""

    def save(self, metrics: Mapping[str, float], epoch: int, folder: Path | None) -> None:
        super().save(metrics, epoch, folder)
        shutil.copytree(self.folder, self.folder.parent / str(epoch + 1))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of an honest run."""
    folder = tmp_path_factory.mktemp("run")
    train(job_of(smoke(**BASE), data), CPU, Keeper(folder))
    return folder


def test_every_epoch_of_an_honest_run_is_replayed_to_the_same_bits(data: Path, run: Path) -> None:
    job = job_of(smoke(**BASE), data)
    for epoch, start in ((1, None), (2, run / "1"), (3, run / "2")):
        assert finished_epochs(run / str(epoch)) == epoch
        assert replay(train, job, CPU, start, epoch) == {epoch: state_digest(run / str(epoch))}
    found = replay(train, job, CPU, run / "1", 3)
    assert found == {epoch: state_digest(run / str(epoch)) for epoch in (2, 3)}


def test_the_chain_has_a_link_for_each_epoch(run: Path, tmp_path: Path) -> None:
    chain: list[str] = []
    for epoch in (1, 2, 2, 3):  # the second one was written twice
        shutil.copytree(run / str(epoch), tmp_path / str(epoch), dirs_exist_ok=True)
        chain = add_to_chain(tmp_path / str(epoch), chain)
        assert read_chain(tmp_path / str(epoch)) == chain
    assert chain == [state_digest(run / str(epoch)) for epoch in (1, 2, 3)]
    assert read_chain(run / "1") == []


@pytest.mark.parametrize(
    "changed",
    [
        *({"seed": 1}, {"lr": 1.01e-3}, {"clip_grad": 0.1}, {"shares": 1}),
        *({"smoothing": 0.11}, {"mixup": 0.21}, {"cutmix": 0.1}, {"drop_path_rate": 0.2}),
        *({"hflip": 0.6}, {"scale_min": 0.5}, {"aa": ""}, {"reprob": 0.3}, {"batch_size": 12}),
        *({"model_ema_decay": 0.91}, {"holdout": 0.2}),
    ],
    ids=str,
)
def test_an_epoch_with_other_parameters_is_found(
    data: Path, run: Path, changed: dict[str, Any]
) -> None:
    other = replay(train, job_of(smoke(**BASE | changed), data), CPU, run / "1", 2)[2]
    assert other != state_digest(run / "2")


def changed_image(data: Path) -> None:
    file = sorted((data / "train").rglob("*.*"))[5]  # one that the second epoch trains on
    with Image.open(file) as image:
        other = ImageOps.invert(image.convert("RGB"))
    other.save(file)


def moved_image(data: Path) -> None:
    file = sorted((data / "train").rglob("*.*"))[0]
    others = sorted(path for path in (data / "train").iterdir() if path != file.parent)
    shutil.move(file, others[-1] / file.name)


def lost_image(data: Path) -> None:
    sorted((data / "train").rglob("*.*"))[0].unlink()


@pytest.mark.parametrize("change", [changed_image, moved_image, lost_image])
def test_an_epoch_with_other_images_is_found(
    data: Path, run: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    shutil.copytree(data, tmp_path / "data")
    change(tmp_path / "data")
    other = replay(train, job_of(smoke(**BASE), tmp_path / "data"), CPU, run / "1", 2)[2]
    assert other != state_digest(run / "2")


@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
def test_one_flipped_bit_is_found(data: Path, run: Path, tmp_path: Path, part: str) -> None:
    """In what is kept of the epoch, and in what the next one starts from."""
    shutil.copytree(run / "2", tmp_path / "2")
    state = torch.load(tmp_path / "2/state.pt", weights_only=True)
    tensors = state[part]
    if part == "optimizer":
        tensors = tensors["state"][0]
    name = max(tensors, key=lambda key: tensors[key].numel())
    flat = tensors[name].view(-1)
    at = int(flat.abs().argmax())
    flat[at : at + 1].view(torch.int32).bitwise_xor_(2**20)  # of the fraction
    torch.save(state, tmp_path / "2/state.pt")
    job = job_of(smoke(**BASE), data)
    assert state_digest(tmp_path / "2") != state_digest(run / "2")
    assert replay(train, job, CPU, tmp_path / "2", 3)[3] != state_digest(run / "3")


@pytest.mark.parametrize("changed", [{"weight_decay": 0.06}, {"betas": (0.9, 0.998)}], ids=str)
def test_other_settings_of_the_optimizer_are_found(
    data: Path, run: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    """They are resumed from the checkpoint, whatever the parameters say."""
    shutil.copytree(run / "1", tmp_path / "1")
    state = torch.load(tmp_path / "1/state.pt", weights_only=True)
    for group in state["optimizer"]["param_groups"]:
        group |= changed
    torch.save(state, tmp_path / "1/state.pt")
    other = replay(train, job_of(smoke(**BASE), data), CPU, tmp_path / "1", 2)[2]
    assert other != state_digest(run / "2")
