"""What a served model takes for an image, and what it rejects. tests/integration serves one."""

import base64
import io
import sys
import types

import numpy as np
import pytest
from mlflow import MlflowException
from PIL import Image

from pipelines.run.tracking.served_model import read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("form", ["bytes", "base64", "data address", "array", "lists", "path"])
def test_an_image_in_any_form(form: str, tmp_path) -> None:
    text = base64.b64encode(png()).decode()
    (tmp_path / "a.png").write_bytes(png())
    given = {
        "bytes": png(),
        "base64": text,
        "data address": f"data:image/png;base64,{text}",
        "array": PIXELS,
        "lists": PIXELS.tolist(),
        "path": str(tmp_path / "a.png"),
    }
    np.testing.assert_array_equal(read_image(given[form]), PIXELS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"nonsense", "does not decode"),
        (png()[:-30], "does not decode"),
        ("no file!", "no base64 nor a file"),
        (3, "int; give bytes"),
        ([[1, 2], [3, 4]], r"shape \(2, 2\)"),
        (np.full((2, 2, 3), 300), "outside 0 to 255"),
    ],
)
def test_what_is_no_image_is_a_wrong_request(given: object, message: str) -> None:
    with pytest.raises(MlflowException, match=f"no image: .*{message}") as told:
        read_image(given)
    assert told.value.error_code == "INVALID_PARAMETER_VALUE"  # 400, not 500


def test_a_server_reads_no_file_for_who_asks(tmp_path, monkeypatch) -> None:
    (tmp_path / "a.png").write_bytes(png())
    name = "mlflow.pyfunc.scoring_server.app"
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    with pytest.raises(MlflowException, match="no base64: "):
        read_image(str(tmp_path / "a.png"))
