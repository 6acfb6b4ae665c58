"""A user's own photographs in formats of other tools, from `elsa import` to the report.

In the workspace of the other tests, so that the operator is compiled already.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import supervision as sv
from PIL import Image
from scipy import ndimage
from skimage import data

from .conftest import Workspace

SIDE = 96


def coins() -> tuple[np.ndarray, np.ndarray]:
    """A photograph of 24 Greek coins (303, 384, 3), and the number of the coin at each pixel."""
    gray = data.coins()
    objects = ndimage.binary_opening(ndimage.gaussian_filter(gray, 3) > 105, iterations=3)
    labels, _ = ndimage.label(objects)
    return np.stack([gray] * 3, -1), labels


def pieces(image: np.ndarray) -> dict[str, np.ndarray]:
    """Twelve squares of a photograph, by name."""
    return {
        f"{row}-{column}": image[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
        for row in range(3)
        for column in range(4)
    }


def write_voc(folder: Path) -> None:
    image, labels = coins()
    images, annotations = {}, {}
    for name, piece in pieces(image).items():
        found = pieces(labels)[name]
        masks = np.array([found == i for i in np.unique(found[found > 0])])
        masks = masks[masks.sum((1, 2)) > 100]
        file = str(folder / f"source/{name}.jpg")
        images[file] = piece
        annotations[file] = sv.Detections(
            xyxy=sv.mask_to_xyxy(masks).astype(float), class_id=np.zeros(len(masks), int)
        )
    (folder / "source").mkdir(parents=True)
    for file, piece in images.items():
        Image.fromarray(piece).save(file)
    dataset = sv.DetectionDataset(["coin"], list(images), annotations)
    dataset.as_pascal_voc(str(folder / "JPEGImages"), str(folder / "Annotations"))


def write_palette(folder: Path) -> None:
    image, labels = coins()
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for name, piece in pieces(image).items():
        Image.fromarray(piece).save(folder / f"images/{name}.png")
        label = Image.fromarray((pieces(labels)[name] > 0).astype(np.uint8)).convert("P")
        label.putdata((pieces(labels)[name] > 0).astype(np.uint8).ravel().tolist())
        label.putpalette([40, 40, 40, 230, 180, 40])
        label.save(folder / f"labels/{name}.png")
    (folder / "classes.txt").write_text("table 40 40 40\ncoin 230 180 40\n")


def write_folders(folder: Path) -> None:
    for name, image in (("coins", coins()[0]), ("cat", data.chelsea()), ("cup", data.coffee())):
        (folder / name).mkdir(parents=True)
        for number, piece in pieces(image).items():
            Image.fromarray(piece).save(folder / name / f"{number}.jpg")


@pytest.mark.timeout(900)
def test_photographs_in_three_formats_end_in_a_report(workspace: Workspace, tmp_path: Path) -> None:
    write_voc(tmp_path / "voc")
    write_palette(tmp_path / "palette")
    write_folders(tmp_path / "folders")
    places = {"classify": "folders", "detect": "voc", "segment": "palette"}
    for kind in places.values():
        source, target = tmp_path / kind, tmp_path / f"{kind}-data"
        command = ("python", "-m", "pipelines", "import", kind, str(source), str(target))
        code, output = workspace.run(*command, "--val", "0.25")
        assert code == 0, output
        assert f"Next: elsa finetune --{next(k for k, v in places.items() if v == kind)}" in output
    given = [word for k, v in places.items() for word in (f"--{k}", str(tmp_path / f"{v}-data"))]
    short = ["pretrain.epochs=2", "pretrain.warmup_epochs=0", "detect.epochs=1", "segment.epochs=1"]
    short.append("scaling.num_workers=1")
    changes = [word for change in short for word in ("-S", change)]
    code, output = workspace.run("python", "-m", "pipelines", "finetune", *given, *changes)
    assert code == 0, output
    code, output = workspace.run("dvc", "repro", "report", timeout=800)
    assert code == 0, output[-5000:]

    def held(stage: str) -> dict:
        found: dict = json.loads((workspace.root / f"metrics/{stage}.json").read_text())
        return found

    assert 0 <= held("pretrain")["top1"] <= 100
    assert "bbox_mAP" in held("detect")
    assert "segm_mAP" not in held("detect")  # boxes alone
    assert 0 <= held("segment")["mIoU"] <= 100
    classes = {
        stage: json.loads((workspace.root / f"weights/{stage}/model.json").read_text())["classes"]
        for stage in ("pretrain", "detect", "segment")
    }
    assert classes == {
        "pretrain": ["cat", "coins", "cup"],
        "detect": ["coin"],
        "segment": ["table", "coin"],
    }
    page = (workspace.root / "reports/index.html").read_text()
    assert all(name in page for name in ("cup", "table", "bbox_mAP", "mIoU"))
