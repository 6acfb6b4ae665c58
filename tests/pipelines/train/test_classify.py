"""Pretraining: what must be equal however it is spread, resumed or fed, and parity with timm."""

from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import create_transform

from pipelines.data.images import images_of
from pipelines.data.store import Dataset
from pipelines.errors import PipelineError
from pipelines.params import Model, Params, compose
from pipelines.train.classify import Classifier
from pipelines.train.components import make_mixing, switch_mixing
from pipelines.train.evaluation import predict
from pipelines.train.job import Job
from pipelines.train.loading import MicroBatchSampler, Part, make_loader
from pipelines.train.reporter import LocalReporter

CPU = torch.device("cpu")
DETERMINISTIC = {"aa": "", "mixup": 0.0, "reprob": 0.0, "color_jitter": 0.0, "scale_min": 1.0}


class Recorder(LocalReporter):
    """Keeps what is reported, as any rank. Can end after an epoch, as if killed, and be asked to
    stop within one, when it has asked `patience` times whether to."""

    def __init__(
        self,
        folder: Path,
        rank: int = 0,
        world_size: int = 1,
        stop: int = -1,
        patience: int | None = None,
    ) -> None:
        super().__init__(folder / "checkpoint", quiet=True)
        self.rank, self.world_size, self.stop = rank, world_size, stop
        self.epochs: list[Mapping[str, float]] = []
        self.patience, self.kept = patience, 0

    def stopping(self) -> bool:
        if self.patience is None:
            return False
        self.patience -= 1
        return self.patience < 0

    def keep(self, folder: Path | None) -> None:
        super().keep(folder)
        self.kept += 1

    def save(self, metrics: Mapping[str, float], epoch: int, folder: Path | None) -> None:
        super().save(metrics, epoch, folder)
        self.epochs.append(metrics)
        if epoch == self.stop:
            raise InterruptedError

    @property
    def state(self) -> dict[str, Any]:
        return torch.load(self.folder / "state.pt", weights_only=True)


def smoke(loader: Mapping[str, Any] | None = None, **pretrain: Any) -> Params:
    """The smoke recipe, smaller, through the same validation as a user's parameters."""
    values = compose(["recipe=smoke"]).model_dump()
    values["scaling"]["num_workers"] = 1
    values["loader"] |= loader or {}
    values["pretrain"] |= {"epochs": 2, "batch_size": 8, "amp": "none"} | pretrain
    return Params.model_validate(values)


def job_of(params: Params, data: Path) -> Job:
    classes = tuple(f"class{label}" for label in range(10))
    return Job("pretrain", params, Dataset("imagenet", str(data), classes, {}, ""))


def fit(params: Params, data: Path, reporter: Recorder) -> Classifier:
    classifier = Classifier(job_of(params, data), CPU, reporter)
    classifier.fit()
    return classifier


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def assert_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_deterministic_training_asks_torch_for_such_kernels(data: Path, tmp_path: Path) -> None:
    try:
        Classifier(job_of(smoke(deterministic=True), data), CPU, Recorder(tmp_path))
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


@pytest.mark.parametrize(
    "settings",
    [
        {"shares": 2, "amp": "float16"},
        {"loader": {"data_workers": 2}, "sched_on_updates": False},
    ],
    ids=["shares and scaler", "workers that live on"],
)
def test_resumed_run_repeats_an_undisturbed_one_bit_for_bit(
    data: Path, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # So high that the first steps overflow: the state of the scaler matters.
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: scaler(device, 2.0**20, enabled=enabled)
    )
    monkeypatch.setattr("pipelines.train.classify.REPORT_EVERY", 2)
    params = smoke(epochs=3, **settings)
    undisturbed = Recorder(tmp_path / "a")
    killed = Recorder(tmp_path / "b", stop=0)
    for reporter in (undisturbed, killed):
        reporter.folder.parent.mkdir()
    fit(params, data, undisturbed)
    with pytest.raises(InterruptedError):
        fit(params, data, killed)
    # Then asked to stop, in the middle of the second epoch and once more further on.
    for patience, step in ((1, 3), (0, 5)):
        stopped = Recorder(tmp_path / "b", patience=patience)
        fit(params, data, stopped)
        assert (stopped.epochs, stopped.state["epoch"]) == ([], 0)
        assert stopped.state["begun"]["first"] == step
    fit(params, data, Recorder(tmp_path / "b"))
    state, other = undisturbed.state, killed.state
    for part in ("model", "ema", "optimizer", "scaler"):
        assert_equal(other[part], state[part])
    assert [row["train_loss"] for row in other["history"]] == [
        row["train_loss"] for row in state["history"]
    ]
    if params.pretrain.amp == "float16":
        skipped = sum(row["skipped_steps"] for row in state["history"])
        assert skipped > 0
        assert state["scaler"]["scale"] == 2.0 ** (20 - skipped)
        steps = {int(value["step"]) for value in state["optimizer"]["state"].values()}
        assert steps == {3 * (54 // 8) - skipped}


def test_shares_split_a_batch_and_change_rounding_alone(data: Path, tmp_path: Path) -> None:
    """Where nothing is drawn: 1 share and 4 of the same batch."""
    common = {"opt": "sgd", "lr": 0.05, "drop_path_rate": 0.0, "mixup": 0.0, "holdout": 0.0}
    states = []
    for shares in (1, 4):
        reporter = Recorder(tmp_path / str(shares))
        reporter.folder.parent.mkdir()
        with threads(1):
            fit(smoke(**common, shares=shares), data, reporter)
        states.append(reporter.state)
    one, four = states
    for part in ("model", "ema"):
        torch.testing.assert_close(four[part], one[part], rtol=1e-4, atol=1e-5)
    for row, expected in zip(four["history"], one["history"], strict=True):
        for key in ("train_loss", "val_loss", "val_top1"):
            assert row[key] == pytest.approx(expected[key], rel=1e-4), key


def test_predictions_name_their_images(data: Path, tmp_path: Path) -> None:
    params = smoke()
    job = job_of(params, data)
    model = Classifier(job, CPU, LocalReporter(tmp_path)).model
    found = predict(job, model, CPU, LocalReporter(tmp_path))
    assert found
    images = images_of(job.dataset, "val")
    assert list(found["name"]) == images.filenames()
    assert found["target"].tolist() == [label for _, label in images]


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_how_images_are_loaded_leaves_no_trace(data: Path, tmp_path: Path, mixup: float) -> None:
    """None, one or two loader processes, that live on or not: the same bits."""
    states = []
    for loader in (
        {"data_workers": 0},
        {"data_workers": 2, "persistent_workers": True},
        {"data_workers": 1, "persistent_workers": False, "prefetch_factor": 1},
    ):
        reporter = Recorder(tmp_path / str(len(states)))
        reporter.folder.parent.mkdir()
        fit(smoke(loader, drop_path_rate=0.2, mixup=mixup), data, reporter)
        states.append(reporter.state)
    for other in states[1:]:
        for part in ("model", "ema", "optimizer"):
            assert_equal(other[part], states[0][part])


def test_batches_that_are_mixed_as_they_are_collated_depend_on_their_images_alone(
    data: Path,
) -> None:
    """As on a GPU, where the processes that load also mix."""
    params = smoke(mixup=0.8, cutmix=1.0)
    job, p = job_of(params, data), params.pretrain
    collate = make_mixing(p, prefetch=True).collate

    def batches(workers: int) -> list[Any]:
        loader = params.loader.model_copy(update={"data_workers": workers})
        part = Part(images_of(job.dataset, "train"), list(range(60)), p.seed)
        part.transform = create_transform(32, is_training=True, use_prefetcher=True)
        sampler = MicroBatchSampler(len(part), p)
        return list(make_loader(loader, part, CPU, batch_sampler=sampler, collate_fn=collate))

    torch.manual_seed(1)
    np.random.seed(1)
    alone = batches(0)
    np.random.seed(2)
    assert_equal(alone, batches(2))
    assert len({float(target.max()) for _, target in alone}) > 1  # it does mix


@pytest.mark.parametrize("prefetch", [False, True], ids=["here", "in the loader"])
def test_nothing_is_mixed_from_the_given_epoch_on(data: Path, prefetch: bool) -> None:
    """Also by loader processes that began before it."""
    params = smoke({"data_workers": 1, "persistent_workers": True}, mixup=0.8, mixup_off_epoch=2)
    job, p = job_of(params, data), params.pretrain
    mixing = make_mixing(p, prefetch)
    part = Part(images_of(job.dataset, "train"), list(range(60)), p.seed)
    part.transform = create_transform(32, is_training=True, use_prefetcher=prefetch)
    sampler = MicroBatchSampler(len(part), p)
    further = {"batch_sampler": sampler, "persistent_workers": True}
    loader = make_loader(params.loader, part, CPU, collate_fn=mixing.collate, **further)
    mixed = []
    for sampler.epoch in range(4):
        switch_mixing(mixing.mixup, sampler.epoch, p.mixup_off_epoch)
        batches = [mixing.mixup(*batch) if mixing.mixup else batch for batch in loader]
        smoothed = 1 - p.smoothing + p.smoothing / p.num_classes
        sure = [(target.max(1).values - smoothed).abs().max() < 1e-6 for _, target in batches]
        mixed.append(not all(sure))
    assert mixed == [True, True, False, False]


@pytest.mark.parametrize("name", ["elsa_swin_micro", "ghostnet_050"])
def test_training_starts_from_given_weights(data: Path, tmp_path: Path, name: str) -> None:
    """Another classifier than theirs begins anew; without an epoch they are only evaluated."""

    def changed(**pretrain: Any) -> Params:
        params = smoke(drop_path_rate=0.0, weights=str(tmp_path / "weights.pth"), **pretrain)
        return params.model_copy(update={"model": Model(name=name)})

    trained = timm.create_model(name, num_classes=10)
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "weights.pth")
    reporter = Recorder(tmp_path / "evaluated")
    reporter.folder.parent.mkdir()
    fit(changed(epochs=0, warmup_epochs=0), data, reporter)
    kept = load_file(reporter.folder / "best.safetensors")
    for key, value in trained.state_dict().items():
        assert torch.equal(kept[key], value), key
    assert [row["epoch"] for row in reporter.state["history"]] == [0]
    start = Classifier(job_of(changed(), data), CPU, LocalReporter(tmp_path)).model
    assert torch.equal(start.get_classifier().weight, trained.get_classifier().weight)

    other = timm.create_model(name, num_classes=12)
    torch.save(other.state_dict(), tmp_path / "weights.pth")
    start = Classifier(job_of(changed(), data), CPU, LocalReporter(tmp_path)).model
    assert start.get_classifier().weight.shape[0] == 10
    same = [torch.equal(v, other.state_dict()[k]) for k, v in start.state_dict().items()]
    assert same.count(False) <= 2  # weight and bias of the classifier
    with pytest.raises(PipelineError, match="nothing to evaluate"):
        fit(changed(epochs=0, warmup_epochs=0), data, reporter)
    torch.save({"other": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(PipelineError, match=r"(?s)pretrain\.weights=.*other"):
        fit(changed(), data, reporter)


@pytest.mark.parametrize(
    "setting", [{"grad_checkpointing": True}, {"channels_last": True}, {"compile": True}], ids=str
)
def test_what_only_makes_it_faster_or_smaller_gives_the_same_model(
    data: Path, tmp_path: Path, setting: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "compile" in setting:  # all of dynamo and autograd, without minutes of C++ compilation
        compile = torch.nn.Module.compile
        monkeypatch.setattr(
            torch.nn.Module, "compile", lambda self: compile(self, backend="aot_eager")
        )
    common = {"opt": "sgd", "epochs": 1, "warmup_epochs": 0, **DETERMINISTIC}
    states = []
    for name, extra in (("plain", {}), ("other", setting)):
        reporter = Recorder(tmp_path / name)
        reporter.folder.parent.mkdir()
        fit(smoke(**common, **extra), data, reporter)
        states.append(reporter.state)
    plain, other = states
    assert list(other["model"]) == list(plain["model"])  # no `_orig_mod.`
    torch.testing.assert_close(other["model"], plain["model"], rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_be_checkpointed_is_refused(data: Path, tmp_path: Path) -> None:
    params = smoke(grad_checkpointing=True)
    params = params.model_copy(update={"model": params.model.__class__(name="pit_ti_224")})
    with pytest.raises(PipelineError, match=r"grad_checkpointing: pit_ti_224 does not support it"):
        Classifier(job_of(params, data), CPU, Recorder(tmp_path))


def test_diverging_run_ends_at_once_and_keeps_no_checkpoint(data: Path, tmp_path: Path) -> None:
    reporter = Recorder(tmp_path)
    with pytest.raises(PipelineError, match=r"the loss is \S+ at step \d \(epoch 1\)\. Lower"):
        fit(smoke(opt="sgd", lr=1e30, warmup_epochs=0, clip_grad=0.0), data, reporter)
    assert not reporter.epochs


def test_batch_size_that_no_epoch_can_fill_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"batch_size=64 is larger than the 54 images"):
        Classifier(job_of(smoke(batch_size=64), data), CPU, Recorder(tmp_path))


def test_epoch_reports_what_it_cost(data: Path, tmp_path: Path) -> None:
    reporter = Recorder(tmp_path)
    fit(smoke(epochs=1, warmup_epochs=0, amp="auto"), data, reporter)
    cost = reporter.epochs[0]
    parts = [cost[f"{phase}_ms"] for phase in ("data", "forward", "backward", "optimizer")]
    assert min(parts) > 0
    assert sum(parts) <= 1000 * 8 / cost["images_per_second"]
    assert "mfu" not in cost  # a CPU's peak is not known
