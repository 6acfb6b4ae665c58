"""Backbones in mmdet and mmseg, the shipped configs, and exact resume of mmengine's Runner."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.runner import Runner
from safetensors.torch import load_file, save_file

import elsa
from elsa.mm import ELSASwin, TimmBackbone
from pipelines.data.files import sha256_file
from pipelines.data.store import Dataset
from pipelines.errors import PipelineError
from pipelines.mm.checkpoint import BEGUN, HISTORY, STATE
from pipelines.mm.config import PREDICTIONS, build_config
from pipelines.mm.hooks import WEIGHTS, percentages
from pipelines.mm.train import train
from pipelines.params import compose
from pipelines.tasks import TASKS
from pipelines.train.job import Job
from pipelines.train.reporter import LocalReporter

DATASETS = {"detect": "coco", "segment": "ade20k"}
CPU = torch.device("cpu")
SMALL = {"name": "elsa_swin_micro", "depths": (1, 1, 1, 1)}


@pytest.fixture
def data(tiny_data):
    return tiny_data


def make_job(stage, data, weights=None, loader=None, **changes):
    params = compose()
    sizes = {"img_size": 96, "batch_size": 4, "base_batch_size": 4, "epochs": 2, "warmup_iters": 1}
    if stage == "segment":
        sizes["crop_size"] = 64
    updates = {
        stage: getattr(params, stage).model_copy(update=sizes | changes),
        "model": params.model.model_validate(SMALL),
        "loader": params.loader.model_copy(update=loader or {}),
    }
    name = DATASETS[stage]
    classes = tuple(json.loads((data / name / "manifest.json").read_text())["classes"])
    dataset = Dataset(name, str(data / name), classes, {}, "")
    return Job(stage, params.model_copy(update=updates), dataset, str(weights) if weights else None)


@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
def test_backbone_is_found_by_both_libraries(scope):
    import importlib

    registry = importlib.import_module(f"{scope}.registry").MODELS
    backbone = registry.build({"type": "ELSASwin", "arch": "micro", "drop_path_rate": 0.0})
    assert isinstance(backbone, ELSASwin)
    assert registry.get("TimmBackbone") is TimmBackbone


def test_outputs_and_their_description_agree():
    backbone = ELSASwin("micro", out_indices=(1, 2, 3))
    outputs = backbone(torch.rand(2, 3, 72, 90))
    assert [y.shape[1] for y in outputs] == backbone.out_channels == [64, 128, 256]
    assert backbone.out_strides == [8, 16, 32]
    assert outputs[0].shape == (2, 64, 9, 12)


def test_tiny_has_the_published_size_and_one_norm_per_output():
    with torch.device("meta"):
        backbone = ELSASwin("tiny")
    assert sum(p.numel() for p in backbone.parameters()) == 28_373_322
    norms = [name for name, _ in backbone.core.named_children() if name.startswith("norm")]
    assert [n for n in norms if n != "norm"] == ["norm0", "norm1", "norm2", "norm3"]


@pytest.mark.parametrize("kind", ["elsa", "timm"])
def test_frozen_stages_stay_frozen_and_in_evaluation_mode(kind):
    def build(frozen):
        if kind == "elsa":
            return ELSASwin("micro", frozen_stages=frozen)
        small = {"embed_dim": 24, "depths": (1, 1, 1, 1), "img_size": 64}
        return TimmBackbone("swin_tiny_patch4_window7_224", frozen_stages=frozen, **small)

    backbone = build(2).train()
    core = backbone.core
    frozen, free = [core.patch_embed, core.layers[0], core.layers[1]], [core.layers[2]]
    assert not any(p.requires_grad for module in frozen for p in module.parameters())
    assert all(p.requires_grad for module in free for p in module.parameters())
    assert not core.layers[1].training
    assert core.layers[2].training
    assert not any(p.requires_grad for p in backbone._out_norm(1).parameters())
    assert all(p.requires_grad for p in backbone._out_norm(2).parameters())
    assert not any(p.requires_grad for p in build(0).core.patch_embed.parameters())
    with pytest.raises(ValueError, match="frozen_stages"):
        build(5)


def test_activation_checkpoints_change_nothing():
    torch.manual_seed(0)
    plain = ELSASwin("micro", drop_path_rate=0.0)
    saving = ELSASwin("micro", drop_path_rate=0.0, with_cp=True)
    saving.load_state_dict(plain.state_dict())
    image, gradients = torch.rand(1, 3, 64, 64), []
    for backbone in (plain, saving):
        outputs = backbone.train()(image)
        sum(y.square().sum() for y in outputs).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_classifier_weights_load_into_the_backbone(tmp_path):
    classifier = timm.create_model("elsa_swin_micro", num_classes=10)
    save_file(classifier.state_dict(), tmp_path / "model.safetensors")
    init = {"type": "Pretrained", "checkpoint": str(tmp_path / "model.safetensors")}
    backbone = ELSASwin("micro", init_cfg=init)
    backbone.init_weights()
    assert torch.equal(
        backbone.core.layers[3].blocks[0].norm1.weight, classifier.layers[3].blocks[0].norm1.weight
    )
    assert torch.equal(backbone.core.patch_embed.proj.weight, classifier.patch_embed.proj.weight)
    other = ELSASwin({"name": "micro", "kernel_size": 7}, init_cfg=init)
    with pytest.raises(elsa.CheckpointError, match="ghost_head"):
        other.init_weights()


def test_timm_weights_load_strictly(tmp_path):
    name = "resnet10t"
    classifier = timm.create_model(name, num_classes=10)
    save_file(classifier.state_dict(), tmp_path / "model.safetensors")
    backbone = TimmBackbone(name, drop_path_rate=0.0, out_indices=(1, 2, 3, 4))
    backbone.load(tmp_path / "model.safetensors")
    assert torch.equal(backbone.core.layer1[0].conv1.weight, classifier.layer1[0].conv1.weight)
    assert [y.shape[1] for y in backbone(torch.rand(1, 3, 64, 64))] == backbone.out_channels
    with pytest.raises(elsa.CheckpointError, match="does not fit"):
        TimmBackbone("resnet18").load(tmp_path / "model.safetensors")


def test_another_family_is_refused():
    with pytest.raises(ValueError, match="micro, tiny, small, base"):
        ELSASwin("resnet18")


@pytest.mark.parametrize("stage", ["detect", "segment"])
def test_configs_build_with_the_parameters(stage, data, tmp_path):
    from mmengine.registry import MODELS

    job = make_job(stage, data, lr=3e-4, weight_decay=0.1, epochs=7, clip_grad=2.0)
    built = build_config(job, tmp_path)
    assert built.train_dataloader.batch_size == 2
    assert built.optim_wrapper.optimizer.lr == 3e-4
    assert built.optim_wrapper.optimizer.weight_decay == 0.1
    assert built.optim_wrapper.clip_grad.max_norm == 2.0
    assert built.train_cfg.max_epochs == 7
    assert built.param_scheduler[1].end == 7
    assert tuple(built.val_dataloader.dataset.metainfo.classes) == job.dataset.classes
    init_default_scope(built.default_scope)
    model = MODELS.build(built.model)
    assert len(model.backbone.core.layers[0].blocks) == 1  # the params' depths
    head = model.roi_head.bbox_head if stage == "detect" else model.decode_head
    assert head.num_classes == len(job.dataset.classes)


def test_a_method_without_a_config_is_refused(data, tmp_path):
    with pytest.raises(PipelineError, match="no config cascade-mask-rcnn_elsa-swin_fpn_demo"):
        build_config(make_job("detect", data, method="cascade-mask-rcnn"), tmp_path)
    with pytest.raises(PipelineError, match=r"detect.milestones=\[1\]: schedule demo has no steps"):
        build_config(make_job("detect", data, milestones=(1,)), tmp_path)


def test_percentages_have_plain_names():
    found = percentages(
        {"coco/bbox_mAP": 0.5, "coco/bbox_mAP_l": -1.0, "mIoU": 33.0, "time": "x"}, suffix="_a"
    )
    assert found == {"bbox_mAP_a": 50.0, "mIoU_a": 33.0}


class KilledError(Exception):
    pass


class KilledReporter(LocalReporter):
    """Dies after checkpoint `last`, of an epoch or within one."""

    def __init__(self, folder, last):
        super().__init__(folder, quiet=True)
        self.left = last

    def keep(self, folder):
        super().keep(folder)
        self.left -= 1
        if not self.left:
            raise KilledError


class StoppingReporter(LocalReporter):
    """Asked to stop from the `after`-th time on that it is looked at."""

    def __init__(self, folder, after):
        super().__init__(folder, quiet=True)
        self.after = after

    def stopping(self):
        self.after -= 1
        return self.after < 0


def scores(folder):
    """The rows of the epochs, without what differs from run to run."""
    timed = ("images_per_second", "val_seconds")
    rows = json.loads((folder / HISTORY).read_text())
    return [{k: v for k, v in r.items() if k not in timed and k[-3:] != "_ms"} for r in rows]


def assert_same(straight, resumed):
    expected, found = load_file(straight / WEIGHTS), load_file(resumed / WEIGHTS)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert scores(straight) == scores(resumed)


@pytest.mark.parametrize("stage", ["detect", "segment"])
def test_a_resumed_run_ends_with_the_same_weights(stage, data, tmp_path):
    """Killed after each of its checkpoints: within epochs, before a validation, after it."""
    # 2 steps: a checkpoint after the first step of an epoch and before its validation.
    job = make_job(stage, data, val_interval=1)
    often = job.params.storage.model_copy(update={"checkpoint_minutes": 1e-9})
    often = replace(job, params=job.params.model_copy(update={"storage": often}))
    DefaultScope._instance_dict.clear()
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(job, CPU, LocalReporter(straight, quiet=True))
    kills, begun = 0, []
    for last in (1, 1, 1, 2, 9):
        try:
            train(often, CPU, KilledReporter(resumed, last))
        except KilledError:
            kills += 1
            begun.append((resumed / BEGUN).is_file())
    assert kills == 4
    assert begun == [True, True, False, True]
    assert_same(straight, resumed)
    rows = scores(resumed)
    assert [row["epoch"] for row in rows] == [1, 2]
    phases = {"data_ms", "forward_ms", "backward_ms", "optimizer_ms"}
    assert phases <= json.loads((resumed / HISTORY).read_text())[0].keys()
    percent = {k: v for k, v in rows[-1].items() if k not in ("epoch", "loss")}
    assert {"detect": "segm_mAP_50", "segment": "mIoU_ms_flip"}[stage] in percent
    assert all(0 <= value <= 100 for value in percent.values())
    written = sorted(path.name for path in (straight / PREDICTIONS).iterdir())
    if stage == "detect":
        assert written == ["coco.bbox.json", "coco.segm.json"]
    else:
        assert len(written) == 4
        assert all(name.endswith(".png") for name in written)


def test_a_stopping_run_leaves_a_checkpoint_and_goes_on(data, tmp_path):
    job = make_job("segment", data, val_interval=1)
    DefaultScope._instance_dict.clear()
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(job, CPU, LocalReporter(straight, quiet=True))
    for after in range(9):  # at each place that looks: in an epoch, before and in a validation
        train(job, CPU, StoppingReporter(stopped, after))
        if (stopped / WEIGHTS).is_file():
            break
    assert after > 2
    assert_same(straight, stopped)


@pytest.mark.parametrize("stage", ["detect", "segment"])
def test_images_depend_on_their_place_in_the_epoch_alone(stage, data, tmp_path):
    """Not on how many loader processes there are, or where in the epoch the run began."""

    def batches(data_workers, first):
        job = make_job(stage, data, loader={"data_workers": data_workers}, batch_size=2)
        config = build_config(job, tmp_path)
        init_default_scope(config.default_scope)
        loader = Runner.build_dataloader(config.train_dataloader, seed=0)
        loader.batch_sampler.sampler.set_epoch(3)
        loader.batch_sampler.first = first
        assert len(loader) == 4  # steps, of two shares
        return [torch.cat([image.flatten() for image in batch["inputs"]]) for batch in loader]

    DefaultScope._instance_dict.clear()
    straight, resumed, alone = batches(2, 0), batches(1, 1), batches(0, 2)
    assert [len(found) for found in (straight, resumed, alone)] == [8, 6, 4]
    assert all(map(torch.equal, straight[2:], resumed))
    assert all(map(torch.equal, straight[4:], alone))


def test_how_images_are_loaded_leaves_no_trace(data, tmp_path):
    """Loader processes that live on, or none: the same bits."""
    DefaultScope._instance_dict.clear()
    for workers in (0, 1):
        job = make_job("segment", data, loader={"data_workers": workers}, drop_path_rate=0.2)
        train(job, CPU, LocalReporter(tmp_path / str(workers), quiet=True))
    assert_same(tmp_path / "0", tmp_path / "1")


def test_a_checkpoint_of_another_format_is_rejected(data, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"format": 0}, folder / STATE)
    DefaultScope._instance_dict.clear()
    with pytest.raises(PipelineError, match=r"another version of this code.*--force"):
        train(make_job("segment", data), CPU, LocalReporter(folder, quiet=True))


def test_a_checkpoint_is_read_without_running_code(data, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"model": Harmful(tmp_path / "harm")}, folder / STATE)
    DefaultScope._instance_dict.clear()
    with pytest.raises(pickle.UnpicklingError):
        train(make_job("segment", data), CPU, LocalReporter(folder, quiet=True))
    assert not (tmp_path / "harm").exists()


class Harmful:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["classifier", "detector"])
def test_a_stage_starts_from_weights_of_its_own(kind, data, tmp_path, monkeypatch):
    """Of a classifier or of a whole detector; told before anything starts if they do not fit."""
    changes = {"amp": "none"}
    job = make_job("detect", data, **changes)
    file = tmp_path / "given.safetensors"
    classifier = timm.create_model(SMALL["name"], depths=SMALL["depths"], num_classes=7)
    state = {k: torch.randn_like(v) for k, v in classifier.state_dict().items()}
    if kind == "detector":
        config = build_config(job, tmp_path)
        init_default_scope("mmdet")
        model = MODELS.build(config.model)
        state = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(state, file)
    task = TASKS["detect"]
    monkeypatch.setattr(type(task), "find_dataset", lambda *_: job.dataset)
    section = job.params.detect.model_copy(update={"weights": str(file)})
    params = job.params.model_copy(update={"detect": section})
    ready = task.check(params)
    assert ready.weights == str(file)
    backbone = MODELS.build(build_config(ready, tmp_path).model.backbone)
    backbone.init_weights()

    def first_layer(state):
        [found] = [v for k, v in state.items() if k.endswith("0.blocks.0.attn.pre_proj.weight")]
        return found

    assert torch.equal(first_layer(backbone.state_dict()), first_layer(state))
    assert task.upstream(ready).sha256 == sha256_file(file)

    other = params.model_copy(
        update={"model": params.model.model_copy(update={"depths": (1, 1, 1, 2)})}
    )
    with pytest.raises(PipelineError, match=r"(?s)detect\.weights=.*missing key"):
        task.check(other)
    unused = section.model_copy(update={"pretrained": False})
    with pytest.raises(PipelineError, match=r"would not be used, as detect\.pretrained is false"):
        task.check(params.model_copy(update={"detect": unused}))
