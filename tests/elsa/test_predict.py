"""Prediction from a folder: as the model itself says it, and no damaged or hostile folder runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

import elsa
from elsa.predict import load_predictor, read_config

MARK = "executed"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A classifier of three classes for 32 px."""
    torch.manual_seed(0)
    model = timm.create_model("elsa_swin_micro", num_classes=3, depths=(1, 1, 1, 1))
    config = {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bilinear"}
    names = {"label_names": ["a", "b", "c"]}
    save_config_for_hf(model, str(tmp_path / "config.json"), names, data_config=config)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def image(height: int = 40, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_timm_and_the_predictor_say_the_same(folder: Path) -> None:
    predictor = load_predictor(folder)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    from PIL import Image

    with torch.no_grad():
        expected = model(transform(Image.fromarray(image())).unsqueeze(0)).softmax(-1)[0]
    found = predictor(image())
    assert predictor.classes == ("a", "b", "c")
    assert len(model.layers[2].blocks) == 1  # an argument of the model came along
    np.testing.assert_array_equal(found.probabilities, expected.sort(descending=True)[0].numpy())
    np.testing.assert_array_equal(found.labels, expected.argsort(descending=True).numpy())


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3))]
)
def test_what_is_no_image_is_told(folder: Path, wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"an image is \(H, W, 3\) uint8, got"):
        load_predictor(folder)(wrong)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "no json", "is no JSON"),
        ("config.json", '{"architecture": "not_there"}', "makes no timm model"),
        ("config.json", "[1]", "makes no timm model"),
        ("model.safetensors", "text", "truncated or not a checkpoint"),
        ("config.py", f"open({MARK!r}, 'w')", "no config that mmengine dumped: line 1"),
        ("config.py", f"model = open({MARK!r}, 'w')", "line 1 calls open"),
        ("config.py", "model = [x for x in (1,)]", "no config that mmengine dumped"),
        ("config.py", "model = {[1]: 2}", "no config that mmengine dumped"),
        ("config.py", "model = dict(", "no config that mmengine dumped"),
        ("config.py", "default_scope = 'mmdet'", "no config of mmdet or mmseg"),
        ("config.py", "default_scope = 'mmdet'\nmodel = dict(type='No')", "makes no model"),
    ],
)
def test_a_damaged_or_hostile_folder_is_told_and_not_executed(
    folder: Path, name: str, content: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / name).write_text(content)
    with pytest.raises(elsa.CheckpointError, match=message):
        load_predictor(folder)
    assert not (folder / MARK).exists()


def test_missing_files_and_other_tensors_are_told(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["num_classes"] = config["model_args"]["num_classes"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(elsa.CheckpointError, match=r"model\.safetensors does not fit its config"):
        load_predictor(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither config\.json"):
        load_predictor(folder)
    with pytest.raises(FileNotFoundError, match="not there has no model"):
        load_predictor("not there")


def test_a_config_is_read_as_mmengine_reads_it(tmp_path: Path) -> None:
    from mmengine.config import Config

    values = {
        "a": 1,
        "model": {"type": "X", "scale": (3, 4), "part": [{"b": None, 3: -0.5}], "not-a-name": "é"},
    }
    Config(values).dump(tmp_path / "config.py")
    assert Config.fromfile(tmp_path / "config.py").to_dict() == values
    assert read_config(tmp_path / "config.py") == values
