"""`elsa export` of models of mmseg and mmdet, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from safetensors.torch import save_file

from elsa.export import ExportError
from elsa.export_detector import detector_graphs
from elsa.predict import Detector, load_predictor
from elsa.run_exported import Exported, scaled
from pipelines.commands import evaluate_export
from pipelines.commands.export import export
from pipelines.commands.predict import Weights
from pipelines.errors import PipelineError
from pipelines.mm.config import build_config
from pipelines.mm.inference import inference_config

from .full_size import SHORT, SMALL, build_model

pytestmark = pytest.mark.usefixtures("compiled_library")


def test_an_exported_segmentor_labels_pictures_as_mmseg_does(make_job, tmp_path, capsys) -> None:
    """With its own size of images, and those larger; the folder appears whole."""
    job = make_job("segment", "demo", "upernet_demo", **SMALL["segment"] | SHORT)
    weights, out = tmp_path / "weights", tmp_path / "out"
    weights.mkdir()
    model = build_model(job, tmp_path)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        weights / "model.safetensors",
        {"classes": json.dumps(job.dataset.classes)},
    )
    config = inference_config(build_config(job, Path()))
    config.model.decode_head.channels = config.model.auxiliary_head.channels = 32
    config.dump(weights / "config.py")
    assert config.test_dataloader.dataset.type == "BaseSegDataset"  # mm's tools know no other
    out.mkdir()
    with pytest.raises(PipelineError, match="exists and holds no export"):
        export(Weights(str(weights)), ["onnx"], None, out)
    for name in ("export.json", "old.onnx"):
        (out / name).touch()
    export(Weights(str(weights)), ["onnx"], None, out)  # an earlier export is replaced
    assert "model.onnx" in capsys.readouterr().out
    assert {file.name for file in out.iterdir()} == {"model.onnx", "run.py", "export.json"}

    exported, predictor = Exported(out / "model.onnx"), load_predictor(weights)
    assert (exported.task, tuple(exported.classes)) == ("segment", job.dataset.classes)
    assert exported.size == (64, 64)
    generator = np.random.default_rng(0)
    for side, same in ((64, 0.9999), (96, 0.98)):  # ties of an untrained model, scaled
        image = generator.integers(0, 256, (side // 8, side // 8, 3), np.uint8)
        picture = Image.fromarray(image).resize((side, side))
        logits = scaled(exported(picture).transpose(1, 2, 0), side, side)
        expected = predictor(np.asarray(picture)).labels
        assert (logits.argmax(2) == expected).mean() > same

    evaluate_export.predict(exported, job.dataset, tmp_path / "predictions")
    files = sorted((Path(job.dataset.place) / "images/validation").iterdir())
    assert len(files) == len(list((tmp_path / "predictions").iterdir())) > 0
    for file in files:
        labels = np.asarray(Image.open(tmp_path / f"predictions/{file.stem}.png")).astype(int)
        expected = predictor(np.asarray(Image.open(file).convert("RGB"))).labels + 1
        assert (labels == expected).mean() > 0.98


@pytest.mark.parametrize(
    ("group", "kind"), [("mask-rcnn_demo", "onnx"), ("faster-rcnn_finetune", "pt2")]
)
def test_an_exported_detector_finds_what_mmdet_finds(group, kind, make_job, tmp_path) -> None:
    """An untrained one, which finds something everywhere; in a picture of its size."""
    recipe = "demo" if group.endswith("demo") else "finetune"
    job = make_job("detect", recipe, group, **SMALL["detect"] | SHORT)
    config = inference_config(build_config(job, Path()))
    head = config.model.roi_head.bbox_head
    head.fc_out_channels = 16
    config.model.test_cfg.rcnn.score_thr = 0.0
    weights = tmp_path / "weights"
    weights.mkdir()
    config.dump(weights / "config.py")
    init_default_scope("mmdet")
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    for parameter in (model.rpn_head.rpn_reg, model.roi_head.bbox_head.fc_cls):
        torch.nn.init.normal_(parameter.weight, std=0.3)  # no two scores alike
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    header = {"classes": json.dumps(job.dataset.classes)}
    save_file(state, weights / "model.safetensors", header)
    export(Weights(str(weights)), [kind], None, tmp_path / "out")
    files = {f"model.{kind}", f"boxes.{kind}", "run.py", "export.json"}
    files |= {"masks.onnx"} if group.startswith("mask") else {"elsa_ops.so"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files

    exported, predictor = Exported(tmp_path / f"out/model.{kind}"), load_predictor(weights)
    height, width = exported.size
    image = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    picture = Image.fromarray(image).resize((width, height))
    found, expected = exported.find(picture), predictor(np.asarray(picture))
    assert len(found.scores) == len(expected.scores) > 5
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    same = np.abs(found.boxes - expected.boxes).max(1) < 0.05
    assert same.mean() > 0.9  # those with nearly the same score may change places
    assert (found.labels == expected.labels)[same].all()
    assert (found.masks is None) == (expected.masks is None)
    if found.masks is not None:
        assert (found.masks == expected.masks)[same].mean() > 0.999

    evaluate_export.predict(exported, job.dataset, tmp_path / "predictions")
    results = json.loads((tmp_path / "predictions/coco.bbox.json").read_text())
    assert (tmp_path / "predictions/coco.segm.json").is_file() == group.startswith("mask")
    place = Path(job.dataset.place)
    truth = json.loads((place / "annotations/instances_val2017.json").read_text())
    names = {one["id"]: one["name"] for one in truth["categories"]}
    for one in truth["images"]:
        objects = exported.find(Image.open(place / "val2017" / one["file_name"]))
        own = [result for result in results if result["image_id"] == one["id"]]
        assert [result["score"] for result in own] == objects.scores.tolist()
        classes = [exported.classes[label] for label in objects.labels]
        assert [names[result["category_id"]] for result in own] == classes
        corners = np.array([result["bbox"] for result in own])
        corners[:, 2:] += corners[:, :2]
        np.testing.assert_allclose(corners, objects.boxes, atol=1e-3)


def test_what_is_no_such_detector_is_told(make_job, tmp_path) -> None:
    job = make_job("detect", group="cascade-mask-rcnn_3x", **SMALL["detect"] | SHORT)
    predictor = object.__new__(Detector)
    predictor.model = build_model(job, tmp_path)
    with pytest.raises(ExportError, match=r"CascadeRCNN with CascadeRoIHead is not exported"):
        detector_graphs(predictor, None)
