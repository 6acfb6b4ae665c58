"""`elsa finetune`: parameters from folders of data, on a CPU and as on GPUs."""

import json
from pathlib import Path

import pytest
import torch

from pipelines.commands import finetune as command
from pipelines.commands.finetune import Device, balanced, choices, common, finetune, look
from pipelines.data.errors import DataError
from pipelines.data.weights import PRETRAINED
from pipelines.errors import PipelineError
from pipelines.params import Params, compose
from pipelines.schema.training import Segment

CPU, GPUS = Device(0, 2), Device(8, 64)


def linked(place: Path, copy: Path) -> Path:
    """The folder again, so that files can be added and replaced."""
    copy.mkdir()
    for part in place.iterdir():
        (copy / part.name).symlink_to(part)
    return copy


@pytest.fixture
def folders(tiny_data: Path, tmp_path: Path) -> dict[str, Path]:
    ade20k = linked(tiny_data / "ade20k", tmp_path / "ade20k")
    classes = json.loads((ade20k / "manifest.json").read_text())["classes"]
    (ade20k / "classes.txt").write_text("\n".join(classes))
    return {
        "classify": tiny_data / "imagenet",
        "detect": tiny_data / "coco",
        "segment": ade20k,
    }


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Params]:
    """The parameters that would have been written."""
    found: list[Params] = []
    monkeypatch.setattr(command, "write_params", lambda words: found.append(compose(words)))
    monkeypatch.setattr(command, "_device", lambda: CPU)
    return found


def test_parameters_come_from_the_data(folders, written, capsys) -> None:
    finetune(folders, None, None, True, ["detect.epochs=3"])
    [params] = written
    assert params.tasks == ("classify", "detect", "segment")
    assert (params.pretrain.num_classes, params.detect.num_classes) == (10, 10)
    assert params.segment.num_classes == 11
    assert len(params.segment.class_weights) == 11
    assert params.data.coco == str(folders["detect"].resolve())
    assert (params.detect.method, params.detect.schedule) == ("mask-rcnn", "finetune")
    assert params.detect.pretrained  # from the classifier that is trained first
    assert params.detect.epochs == 3  # a change beats what is derived
    assert (params.scaling.use_gpu, params.scaling.num_workers) == (False, 2)
    shown = capsys.readouterr().out
    assert "detect.num_classes" in shown
    assert "detect.epochs" in shown


@pytest.mark.parametrize("device", [CPU, GPUS], ids=["cpu", "gpus"])
def test_every_device_gets_parameters_that_fit(folders, device) -> None:
    seen = [look(task, place) for task, place in folders.items()]
    model = "elsa_swin_tiny" if device.gpus else "elsa_swin_micro"
    words = [choice.word for choice in common(seen, device, None, model)]
    for one in seen:
        words += [choice.word for choice in choices(one, device, model, True)]
    groups = ["detect=mask-rcnn_1x"] if device.gpus else []
    params = compose(["recipe=finetune", *groups, *words])
    assert params.scaling.num_workers == (device.gpus or 2)
    assert params.detect.lr == (1e-4 if device.gpus else 1e-3)


def test_one_box_without_a_mask_asks_for_a_method_of_boxes(folders, written, tmp_path) -> None:
    place = folders["detect"]
    copy = linked(place, tmp_path / "coco")
    (copy / "annotations").unlink()
    (copy / "annotations").mkdir()
    for file in (place / "annotations").iterdir():
        content = json.loads(file.read_text())
        del content["annotations"][0]["segmentation"]
        (copy / "annotations" / file.name).write_text(json.dumps(content))
    finetune({"detect": copy}, None, None, False, [])
    [params] = written
    assert (params.detect.method, params.detect.pretrained) == ("faster-rcnn", False)
    assert params.tasks == ("detect",)


def test_weights_go_to_the_first_stage_that_trains(folders, written, tmp_path) -> None:
    """Those of a whole detector to detection as a whole."""
    file, detector = tmp_path / "published.pth", tmp_path / "detector.pth"
    torch.save({"head.fc.weight": torch.zeros(1)}, file)
    torch.save({"roi_head.bbox_head.fc_cls.weight": torch.zeros(1)}, detector)
    finetune(folders, str(file), None, False, [])
    finetune({"detect": folders["detect"]}, str(file), None, False, [])
    finetune({t: folders[t] for t in ("detect", "segment")}, str(detector), None, False, [])
    both, alone, whole = written
    assert (both.pretrain.weights, both.detect.weights) == (str(file), PRETRAINED)
    assert (alone.pretrain.weights, alone.detect.weights) == (None, str(file))
    assert alone.detect.init_from == "backbone"
    assert (whole.detect.init_from, whole.segment.init_from) == ("model", "backbone")
    file.write_bytes(b"no checkpoint")
    with pytest.raises(PipelineError, match=r"--weights .*published\.pth"):
        finetune({"detect": folders["detect"]}, str(file), None, False, [])


def test_rare_classes_weigh_more(folders) -> None:
    seen = look("segment", folders["segment"])
    weights = dict(zip(seen.classes, balanced(seen), strict=True))
    assert weights["background"] == min(weights.values())
    assert sum(weights.values()) == pytest.approx(11, abs=0.1)


def test_what_does_not_fit_is_told(folders, written, tmp_path) -> None:
    with pytest.raises(PipelineError, match="Give --classify, --detect or --segment"):
        finetune({}, None, None, False, [])
    with pytest.raises(DataError, match="no folder annotations"):
        finetune({"detect": folders["classify"]}, None, None, False, [])
    with pytest.raises(PipelineError, match=r"detect\.lr"):
        finetune({"detect": folders["detect"]}, None, None, False, ["detect.lr=fast"])
    assert written == []


def test_class_weights_are_one_for_each_class() -> None:
    base = compose(["recipe=finetune"]).segment.model_dump()
    with pytest.raises(ValueError, match="2 weights for num_classes=3"):
        Segment.model_validate(base | {"num_classes": 3, "class_weights": [1.0, 2.0]})
    with pytest.raises(ValueError, match="choose segment=upernet_finetune"):
        Segment.model_validate(base | {"num_classes": 3, "schedule": "demo"})
