"""Distillation from a teacher: the loss, and what is refused."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from torch.nn import functional as F

from pipelines.data.store import Dataset
from pipelines.errors import PipelineError
from pipelines.params import Params, Pretrain, compose
from pipelines.train import distillation
from pipelines.train.classify import Classifier
from pipelines.train.distillation import load_teacher, make_objective
from pipelines.train.job import Job
from pipelines.train.models import write_config
from pipelines.train.reporter import LocalReporter

CPU = torch.device("cpu")


def smoke(**pretrain: object) -> Params:
    values = compose(["recipe=smoke"]).model_dump()
    values["scaling"]["num_workers"] = 1
    values["pretrain"] |= {"amp": "none", **pretrain}
    return Params.model_validate(values)


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """In the folder `teacher`, as `pretrain` leaves its weights; trained with another
    normalisation."""
    from safetensors.torch import save_file

    monkeypatch.setattr(distillation, "ROOT", tmp_path)
    torch.manual_seed(0)
    half = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    model = timm.create_model("resnet10t", num_classes=10, pretrained_cfg_overlay=half).eval()
    (tmp_path / "teacher").mkdir()
    save_file(model.state_dict(), str(tmp_path / "teacher/model.safetensors"))
    write_config(tmp_path / "teacher/config.json", model, smoke().pretrain, ())
    config = json.loads((tmp_path / "teacher/config.json").read_text())
    config["pretrained_cfg"] |= half
    (tmp_path / "teacher/config.json").write_text(json.dumps(config))
    return model


def test_the_loss_is_the_labels_and_the_teachers(teacher: torch.nn.Module) -> None:
    """Against the formula of Hinton et al. (arXiv 1503.02531), in float64; the teacher sees the
    images as it knows them."""
    p = smoke(
        teacher="teacher", distill_loss_weight=0.7, task_loss_weight=0.3, kd_temperature=2.0
    ).pretrain
    student = timm.create_model("elsa_swin_micro", num_classes=10).eval()
    images = torch.randn(4, 3, 32, 32)
    targets = F.one_hot(torch.arange(4), 10).float()
    loss = make_objective(student, SoftTargetCrossEntropy(), p, CPU)(images, targets)

    with torch.no_grad():
        pixels = images * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        pixels += torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        theirs, ours = teacher(2 * pixels - 1).double(), student(images).double()
        soft, wanted = (ours / 2).log_softmax(1), (theirs / 2).softmax(1)
        distance = 4 * (wanted * (wanted.log() - soft)).sum(1).mean()
        expected = 0.3 * -(targets * ours.log_softmax(1)).sum(1).mean() + 0.7 * distance
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_student_learns_what_its_teacher_says(
    teacher: torch.nn.Module, data: Path, tmp_path: Path
) -> None:
    """Without a look at the labels; the teacher stays as it was, and is not in the weights."""
    settings = {"teacher": "teacher", "task_loss_weight": 0.0, "kd_temperature": 1.0, "mixup": 0.0}
    params = smoke(
        **settings,
        cutmix=0.0,
        epochs=4,
        warmup_epochs=0,
        lr=3e-3,
        base_batch_size=8,
        batch_size=8,
        smoothing=0.0,
        drop_path_rate=0.0,
    )
    dataset = Dataset("imagenet", str(data), tuple("0123456789"), {}, "")
    reporter = LocalReporter(tmp_path / "run", quiet=True)
    trained = Classifier(Job("pretrain", params, dataset), CPU, reporter)
    trained.fit()
    losses = [row["train_loss"] for row in trained.history]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.8 * losses[0]
    again = load_teacher(params.pretrain)
    for name, value in teacher.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "no_such_model"}, r"pretrain\.teacher=no_such_model can't be loaded.*no_such"),
        ({"num_classes": 7}, r"teacher=teacher tells 10 classes apart.*num_classes is 7"),
        ({"teacher": "of one size"}, r"does not take images of pretrain\.img_size=32"),
    ],
)
def test_a_teacher_that_cannot_teach_is_told(
    teacher: torch.nn.Module, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    from safetensors.torch import save_file

    fixed = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    (tmp_path / "of one size").mkdir()
    save_file(fixed.state_dict(), str(tmp_path / "of one size/model.safetensors"))
    p: Pretrain = smoke(img_size=32).pretrain
    size = p.model_copy(update={"img_size": 224})
    write_config(tmp_path / "of one size/config.json", fixed, size, ())
    with pytest.raises(PipelineError, match=r"(?s)" + message):
        load_teacher(p.model_copy(update={"teacher": "teacher", **change}))


def test_a_teacher_of_other_classes_is_told(teacher: torch.nn.Module, tmp_path: Path) -> None:
    """By their names, where both are known: as many in another order would teach nonsense."""
    p = smoke(teacher="teacher").pretrain
    load_teacher(p, tuple("9876543210"))  # the teacher names none
    write_config(tmp_path / "teacher/config.json", teacher, p, tuple("0123456789"))
    load_teacher(p, tuple("0123456789"))
    load_teacher(p)
    with pytest.raises(PipelineError, match=r"in another order: one that it calls 1 is 2 in the"):
        load_teacher(p, tuple("0213456789"))
