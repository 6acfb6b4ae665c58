"""`elsa export` of a segmentor of mmseg, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from elsa.export import ExportError, exportable
from elsa.predict import Detector, load_predictor
from elsa.run_exported import Exported, scaled
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
    config = inference_config(build_config(job, Path(), 1))
    config.model.decode_head.channels = config.model.auxiliary_head.channels = 32
    config.dump(weights / "config.py")
    assert config.test_dataloader.dataset.type == "BaseSegDataset"  # mm's tools know no other
    out.mkdir()
    with pytest.raises(PipelineError, match="exists and holds no export"):
        export(Weights(str(weights)), ["onnx"], None, out)
    out.rmdir()
    for _ in range(2):  # an earlier export is replaced
        export(Weights(str(weights)), ["onnx"], None, out)
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


def test_a_detector_is_refused() -> None:
    with pytest.raises(ExportError, match=r"detectors are not exported.*elsa predict"):
        exportable(object.__new__(Detector), None)
