"""`elsa evaluate` of an exported classifier: the scores of the weights that it was made of.

Those of detectors and segmentors are compared by picture in tests/pipelines/mm/test_export.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from elsa.export import image_graph
from elsa.export_onnx import write_onnx
from elsa.predict import load_predictor
from elsa.run_exported import Exported
from pipelines.commands import evaluate, evaluate_export
from pipelines.commands.evaluate import Options
from pipelines.commands.exported import ExportedPredictor
from pipelines.commands.predict import Weights, predict
from pipelines.data.layout import DATASETS
from pipelines.data.store import Dataset
from pipelines.data.weights import WeightsDescription, write_weights
from pipelines.errors import PipelineError
from pipelines.params import compose
from pipelines.tasks import TASKS, Prediction
from pipelines.train.reporter import LocalReporter

TASK = TASKS["classify"]


@pytest.fixture(scope="module")
def what(tiny_data: Path) -> Prediction:
    place = tiny_data / "imagenet"
    classes = json.loads((place / "manifest.json").read_text())["classes"]
    params = compose(["recipe=smoke", f"pretrain.num_classes={len(classes)}", "pretrain.amp=none"])
    return Prediction(params, Dataset("imagenet", str(place), tuple(classes), {}, ""))


@pytest.fixture(scope="module")
def state(what: Prediction) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return TASK.evaluation_model(what).state_dict()


@pytest.fixture(scope="module")
def file(what: Prediction, state: dict, compiled_library: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    about = WeightsDescription(TASK.model(what.params), "", "", {}, classes=what.classes)
    write_weights(folder, state, about)
    TASK.write_model_config(folder, what)
    (graph,), described = image_graph(load_predictor(folder), None)
    write_onnx(graph, described, folder / "model.onnx")
    return folder / "model.onnx"


def test_the_export_scores_what_the_weights_score(what, state, file, tmp_path) -> None:
    ours, theirs = tmp_path / "weights", tmp_path / "export"
    ours.mkdir()
    reporter = LocalReporter(tmp_path / "run", quiet=True)
    TASK.predict(what, state, torch.device("cpu"), reporter, ours)
    evaluate_export.predict(Exported(file), what.dataset, theirs)
    with np.load(ours / "predictions.npz") as own, np.load(theirs / "predictions.npz") as found:
        assert set(own) == set(found)
        for key in ("name", "target"):
            assert (own[key] == found[key]).all()
        np.testing.assert_allclose(own["probabilities"], found["probabilities"], atol=1e-4)
    expected = TASK.score(what, ours).metrics
    assert TASK.score(what, theirs).metrics == pytest.approx(expected, abs=0.1)
    assert {"top1", "loss"} <= set(expected)


def test_pictures_get_the_answer_of_the_weights(file, tmp_path, capsys) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    found = ExportedPredictor(Exported(file))(image)
    expected = load_predictor(file.parent)(image)
    assert (found.labels == expected.labels).all()
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-5)
    Image.fromarray(image).save(tmp_path / "photo.png")
    predict([tmp_path / "photo.png"], Weights(str(file)), tmp_path / "out", "cpu", 0.5)
    assert "1 pictures in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "segment", "data": "ade20k"}, "is for --task classify, not segment"),
        ({"recipe": "demo"}, "--recipe is not for an export"),
        ({"no_ema": True}, "--no-ema is not for an export"),
        ({"weights": "nowhere.onnx"}, "there is no file nowhere.onnx"),
        ({"data": "coco"}, "there is no folder val"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_told(given, message, file, tiny_data) -> None:
    given = {"task": "classify", "weights": str(file), "data": "imagenet"} | given
    assert given["data"] in DATASETS
    given["data"] = str(tiny_data / given["data"])
    with pytest.raises(PipelineError, match=message):
        evaluate.evaluate(Options(**given))


def test_classes_in_another_order_are_told(what, file) -> None:
    turned = Dataset("imagenet", what.dataset.place, what.classes[::-1], {}, "")
    with pytest.raises(PipelineError, match="in another order"):
        evaluate_export.check_classes(Exported(file), turned)
