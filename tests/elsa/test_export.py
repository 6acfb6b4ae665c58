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
from elsa.export import ExportError, Graph, any_batch, example, image_graph
from elsa.export_onnx import write_onnx
from elsa.export_pt2 import write_pt2
from elsa.predict import Predictor, load_predictor
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


def graph_of(model: nn.Module, size: int) -> Graph:
    images = (example((size, size)),)
    return Graph("model", model.eval(), images, any_batch(), ("images",), ("logits",))


def described(size: int) -> dict[str, Any]:
    """What the runner must know; of a picture it makes an image by scaling both sides."""
    about = {"size": [size, size], "task": "classify", "classes": []}
    return about | {"resize": 0, "squash": True, "interpolation": "bicubic"}


def check(exported: Exported, model: nn.Module, size: int) -> None:
    """Against the reference in float64, for batches of other sizes than the exported one."""
    for batch in (1, 4):
        images = example((size, size), batch)
        with ops.use_backend("reference"), torch.no_grad():
            expected = model(images.double())
        found = torch.from_numpy(exported.logits(images.numpy())).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


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
    torch.manual_seed(0)
    options = {"kernel_size": kernel_size, "dilation": dilation, "stride": stride}
    model = Aggregation(ghosts, size, **options)
    write_onnx(graph_of(model, size), described(size), tmp_path / "model.onnx")
    check(Exported(tmp_path / "model.onnx"), model, size)
    import onnx

    proto = onnx.load(tmp_path / "model.onnx")
    assert sum(node.domain == "elsa" for node in proto.graph.node) == 1
    assert len(proto.functions) == 1  # one function, and standard operators in it
    assert {node.domain for node in proto.functions[0].node} == {""}


@pytest.fixture(scope="module", params=["center", "squash"])
def classifier(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, compiled_library: Path
) -> tuple[Predictor, Path]:
    """Of three classes, with timm's two ways to make an image of a picture; and its ONNX file."""
    torch.manual_seed(0)
    weights, file = (tmp_path_factory.mktemp(name) for name in ("weights", "exported"))
    model = timm.create_model("elsa_swin_micro", num_classes=3, depths=(1, 1, 1, 1))
    config = {"input_size": (3, 32, 32), "crop_pct": 0.9, "interpolation": "bicubic"}
    names = {"label_names": ["a", "b", "c"]}
    config |= {"crop_mode": request.param}
    save_config_for_hf(model, str(weights / "config.json"), names, data_config=config)
    save_file(model.state_dict(), weights / "model.safetensors")
    predictor = load_predictor(weights)
    (graph,), about = image_graph(predictor, None)
    write_onnx(graph, about, file / "model.onnx")
    return predictor, file / "model.onnx"


def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    shapes = [(32, 32), (50, 41), (37, 90), (20, 64)]
    return [Image.fromarray(generator.integers(0, 256, (*s, 3), np.uint8)) for s in shapes]


def test_a_classifier_says_the_same_of_pictures(classifier: tuple[Predictor, Path]) -> None:
    predictor, file = classifier
    exported = Exported(file)
    assert (exported.task, exported.classes) == ("classify", ["a", "b", "c"])
    for picture in pictures():
        logits = exported(picture)
        found = np.exp(logits) / np.exp(logits).sum()
        expected = predictor(np.asarray(picture))
        np.testing.assert_allclose(found[expected.labels], expected.probabilities, atol=1e-4)


def test_a_file_runs_where_neither_torch_nor_this_project_is(
    classifier: tuple[Predictor, Path], tmp_path: Path
) -> None:
    predictor, file = classifier
    shutil.copy(file, tmp_path / "model.onnx")
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
    label = predictor(np.asarray(pictures()[1])).labels[0]
    assert done.stdout.startswith(f"photo.png: {'abc'[label]} ")


RUN_PT2 = """
import sys, types
import numpy as np
for name in ("timm", "elsa", "ops", "onnx"):
    sys.modules[name] = None
import run
model = run.Exported(sys.argv[1])
np.save("logits.npy", model.logits(np.load("images.npy")))
"""


@pytest.mark.parametrize("decomposed", [False, True])
def test_pt2_runs_by_torch_and_what_lies_beside_it(decomposed: bool, tmp_path: Path) -> None:
    """In a process without this project; the decomposed one without the operator's library, too."""
    torch.manual_seed(0)
    model = Aggregation("mul add", 8, kernel_size=3, dilation=1, stride=1)
    write_pt2(graph_of(model, 8), described(8), tmp_path / "model.pt2", decomposed)
    check(Exported(tmp_path / "model.pt2"), model, 8)
    library = tmp_path / "elsa_ops.so"
    assert library.is_file() != decomposed

    shutil.copy(run_exported.__file__, tmp_path / "run.py")
    images = example((8, 8), 3)
    np.save(tmp_path / "images.npy", images.numpy())
    command = [sys.executable, "-c", RUN_PT2, "model.pt2"]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = run()
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(images)
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_exported, "cpu_features", lambda: set[str]())
        with pytest.raises(ValueError, match=r"model\.pt2 .*compiled for a CPU with .*SSE"):
            Exported(tmp_path / "model.pt2")
    if not decomposed:
        library.unlink()
        assert "model.pt2 needs elsa_ops.so beside it" in run().stderr


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
        with pytest.raises(
            ValueError, match=rf"{name} is no model that `elsa export` wrote for this machine"
        ):
            Exported(tmp_path / name)
        assert run_exported.main([str(tmp_path / name), "photo.jpg"]) == 1
    assert run_exported.main([]) == 2


def test_a_damaged_description_is_told(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    tensor = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    for text in ("{}", "[]", "3", '{"task": "classify", "classes": [], "size": 7}'):
        proto = helper.make_model(helper.make_graph([], "other", [tensor], [tensor]))
        helper.set_model_props(proto, {"elsa": text})
        onnx.save(proto, tmp_path / "other.onnx")
        with pytest.raises(ValueError, match=r"other\.onnx is no model that `elsa export` wrote"):
            Exported(tmp_path / "other.onnx")


def test_images_of_another_shape_and_models_that_can_not_be_are_told(tmp_path: Path) -> None:
    model = Aggregation("", 6, kernel_size=3, dilation=1, stride=1)
    write_onnx(graph_of(model, 6), described(6), tmp_path / "model.onnx")
    exported = Exported(tmp_path / "model.onnx")
    for wrong in (np.zeros((1, 3, 7, 6), np.float32), np.zeros((1, 3, 6, 6), np.uint8)):
        with pytest.raises(ValueError, match=r"images are \(n, 3, 6, 6\) float32, got"):
            exported.logits(wrong)
    shifted = Aggregation("", 6, kernel_size=3, dilation=1, stride=1, border="shift")
    with pytest.raises(ExportError, match=r"border='shift' is not exported"):
        write_onnx(graph_of(shifted, 6), described(6), tmp_path / "shifted.onnx")
    assert not (tmp_path / "shifted.onnx").exists()
