"""Exported models: what they compute, and that they need nothing of this project."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

import ops
from elsa import run_exported
from elsa.export import ExportError, example, exportable, write_onnx, write_pt2
from elsa.predict import load_predictor
from elsa.run_exported import Exported

pytestmark = pytest.mark.usefixtures("compiled_library")


class Aggregation(nn.Module):
    """The operator alone: images are its values, and its weights are parameters."""

    def __init__(self, ghosts: str, size: int, **options: Any) -> None:
        super().__init__()
        self.options = options
        k, stride = options["kernel_size"], options["stride"]
        self.attn = nn.Parameter(torch.randn(1, 1, k * k, size // stride, size // stride))
        for name in ("mul", "add"):
            given = nn.Parameter(torch.randn(3, k, k)) if name in ghosts else None
            self.register_parameter(name, given)

    def forward(self, images: Tensor) -> Tensor:
        attn = self.attn.to(images.dtype) + 0 * images.mean((1, 2, 3)).view(-1, 1, 1, 1, 1)
        cast = [None if g is None else g.to(images.dtype) for g in (self.mul, self.add)]
        return ops.elsa_attention(images, attn, *cast, **self.options)


@pytest.mark.parametrize(
    ("ghosts", "kernel_size", "dilation", "stride", "size"),
    [
        ("", 3, 1, 1, 6),
        ("add", 5, 1, 1, 9),
        ("mul", 3, 2, 1, 8),
        ("mul add", 7, 1, 1, 8),
        ("mul add", 3, 2, 2, 9),  # the last row and column are dropped
        ("add", 1, 1, 1, 5),
    ],
)
def test_the_operator_in_onnx_is_the_operator(
    ghosts: str, kernel_size: int, dilation: int, stride: int, size: int, tmp_path: Path
) -> None:
    """Against the reference in float64, for batches of other sizes than the exported one."""
    torch.manual_seed(0)
    options = {"kernel_size": kernel_size, "dilation": dilation, "stride": stride}
    model = Aggregation(ghosts, size, **options).eval()
    described = {
        "size": [size, size],
        "task": "classify",
        "classes": [],
        "resize": 0,
        "squash": True,
    }
    write_onnx(model, {**described, "interpolation": "bicubic"}, tmp_path / "model.onnx")
    exported = Exported(tmp_path / "model.onnx")
    for batch in (1, 4):
        images = example((size, size), batch)
        with ops.use_backend("reference"), torch.no_grad():
            expected = model(images.double())
        found = torch.from_numpy(exported.logits(images.numpy())).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())
    import onnx

    proto = onnx.load(tmp_path / "model.onnx")
    assert sum(node.domain == "elsa" for node in proto.graph.node) == 1
    assert len(proto.functions) == 1  # one function, and standard operators in it
    assert {node.domain for node in proto.functions[0].node} == {""}


@pytest.fixture(params=["center", "squash"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A classifier of three classes, with timm's two ways to make an image of a picture."""
    torch.manual_seed(0)
    model = timm.create_model("elsa_swin_micro", num_classes=3, depths=(1, 1, 1, 1))
    config = {"input_size": (3, 32, 32), "crop_pct": 0.9, "interpolation": "bicubic"}
    names = {"label_names": ["a", "b", "c"]}
    config |= {"crop_mode": request.param}
    (tmp_path / "weights").mkdir()
    save_config_for_hf(model, str(tmp_path / "weights/config.json"), names, data_config=config)
    save_file(model.state_dict(), tmp_path / "weights/model.safetensors")
    return tmp_path / "weights"


def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    shapes = [(32, 32), (50, 41), (37, 90), (20, 64)]
    return [Image.fromarray(generator.integers(0, 256, (*s, 3), np.uint8)) for s in shapes]


def test_a_classifier_says_the_same_of_pictures(folder: Path, tmp_path: Path) -> None:
    predictor = load_predictor(folder)
    write_onnx(*exportable(predictor, None), tmp_path / "model.onnx")
    exported = Exported(tmp_path / "model.onnx")
    assert (exported.task, exported.classes) == ("classify", ["a", "b", "c"])
    for picture in pictures():
        logits = exported(picture)
        found = np.exp(logits) / np.exp(logits).sum()
        expected = predictor(np.asarray(picture))
        np.testing.assert_allclose(found[expected.labels], expected.probabilities, atol=1e-4)


def test_a_file_runs_where_neither_torch_nor_this_project_is(folder: Path, tmp_path: Path) -> None:
    write_onnx(*exportable(load_predictor(folder), None), tmp_path / "model.onnx")
    shutil.copy(run_exported.__file__, tmp_path / "run.py")
    pictures()[1].save(tmp_path / "photo.png")
    refuse = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'timm', 'elsa', 'ops', 'onnx']))\n"
        "sys.argv = ['run.py', 'model.onnx', 'photo.png']\n"
        "runpy.run_path('run.py', run_name='__main__')"
    )
    command = [sys.executable, "-P", "-c", refuse]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    label = load_predictor(folder)(np.asarray(pictures()[1])).labels[0]
    assert done.stdout.startswith(f"photo.png: {'abc'[label]} ")


def test_pt2_runs_by_torch_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Aggregation("mul add", 8, kernel_size=3, dilation=1, stride=1).eval()
    described = {"size": [8, 8], "task": "segment", "classes": ["x"], "resize": 0, "squash": True}
    write_pt2(model, {**described, "interpolation": "bilinear"}, tmp_path / "model.pt2")
    exported = Exported(tmp_path / "model.pt2")
    for batch in (1, 4):
        images = example((8, 8), batch)
        with torch.no_grad():
            expected = model(images)
        found = torch.from_numpy(exported.logits(images.numpy()))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


def test_what_is_no_exported_model_is_told(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    tensor = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([], "other", [tensor], [tensor])
    onnx.save(helper.make_model(graph), tmp_path / "other.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "text.pt2").write_text("no model")
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.onnx"):
        Exported(tmp_path / "none.onnx")
    for name in ("other.onnx", "text.onnx", "text.pt2"):
        with pytest.raises(ValueError, match=rf"{name} is no model that `elsa export` wrote"):
            Exported(tmp_path / name)
        assert run_exported.main([str(tmp_path / name), "photo.jpg"]) == 1
    assert run_exported.main([]) == 2


def test_images_of_another_shape_and_models_that_can_not_be_are_told(tmp_path: Path) -> None:
    model = Aggregation("", 6, kernel_size=3, dilation=1, stride=1).eval()
    described = {"size": [6, 6], "task": "classify", "classes": [], "resize": 0, "squash": True}
    write_onnx(model, {**described, "interpolation": "bicubic"}, tmp_path / "model.onnx")
    exported = Exported(tmp_path / "model.onnx")
    for wrong in (np.zeros((1, 3, 7, 6), np.float32), np.zeros((1, 3, 6, 6), np.uint8)):
        with pytest.raises(ValueError, match=r"images are \(n, 3, 6, 6\) float32, got"):
            exported.logits(wrong)
    shifted = Aggregation("", 6, kernel_size=3, dilation=1, stride=1, border="shift").eval()
    with pytest.raises(ExportError, match=r"border='shift' is not exported"):
        write_onnx(shifted, {**described, "interpolation": "bicubic"}, tmp_path / "shifted.onnx")
    assert not (tmp_path / "shifted.onnx").exists()
