"""`elsa predict`: which pictures, what is written, and what is told. The model is a stand-in here;
tests/integration predicts with trained ones."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from elsa.predict import Classes, Labels, Objects
from pipelines.commands import predict as command
from pipelines.commands.predict import Weights
from pipelines.data.store import Dataset
from pipelines.errors import PipelineError
from pipelines.params import compose
from pipelines.tasks import TASKS, Prediction

CLASSES = ("cat", "dog", "a longer name")


class StandIn:
    """Says the same of each picture."""

    classes = CLASSES

    def __init__(self, task: str) -> None:
        self.task = task

    def __call__(self, image: np.ndarray) -> Classes | Objects | Labels:
        height, width, _ = image.shape
        if self.task == "classify":
            return Classes(np.array([1, 0, 2]), np.array([0.7, 0.2, 0.1], np.float32))
        if self.task == "segment":
            return Labels(np.arange(height * width).reshape(height, width) % 3)
        masks = np.zeros((2, height, width), bool)
        masks[:, 2:6, 3:9] = True
        boxes = np.array([[3, 2, 9, 6], [0, 0, width, height]], np.float32)
        return Objects(boxes, np.array([2, 0]), np.array([0.9, 0.4], np.float32), masks)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    (folder / "deeper").mkdir(parents=True)
    Image.new("RGB", (40, 20), "red").save(folder / "one.png")
    Image.new("L", (30, 30)).save(folder / "deeper/one.jpg")
    (folder / "notes.txt").write_text("no picture")
    return folder


def predicted(task: str, pictures: list[Path], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "load", lambda *_: StandIn(task))
    command.predict(pictures, Weights("weights"), out, "cpu", 0.5)


@pytest.mark.parametrize("task", ["classify", "detect", "segment"])
def test_each_task_is_drawn_and_written_in_its_public_format(
    task: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for _ in range(2):  # earlier predictions are replaced
        predicted(task, [pictures], out, monkeypatch)
    drawn = {p.relative_to(out / "pictures").as_posix() for p in out.rglob("pictures/**/*.jpg")}
    assert drawn == {"one.jpg", "deeper/one.jpg"}
    assert np.asarray(Image.open(out / "pictures/one.jpg")).std() > 1
    assert (out / "classes.txt").read_text().splitlines() == list(CLASSES)
    if task == "classify":
        rows = list(csv.DictReader((out / "predictions.csv").open()))
        assert [row["image"] for row in rows] == ["deeper/one.jpg", "one.png"]
        assert (rows[0]["predicted_1"], rows[0]["probability_1"]) == ("dog", "0.700000")
    if task == "detect":
        found = COCO(str(out / "predictions.json"))
        first = found.loadAnns(found.getAnnIds())[0]
        assert found.cats[first["category_id"]]["name"] == "a longer name"
        assert (first["bbox"], first["area"]) == ([3, 2, 6, 4], 24)
        assert found.annToMask(first)[2:6, 3:9].all()
        assert len(found.anns) == 4  # also those that are not sure enough to be drawn
    if task == "segment":
        labels = np.asarray(Image.open(out / "labels/one.png"))
        np.testing.assert_array_equal(labels, np.arange(800).reshape(20, 40) % 3 + 1)


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 20))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "phone.jpg", exif=exif)
    assert command.open_picture(tmp_path / "phone.jpg").size == (20, 40)


def test_pictures_that_do_not_decode_are_named_and_the_others_done(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pictures / "broken.jpg").write_text("nonsense")
    cut = (pictures / "deeper/one.jpg").read_bytes()[:-40]
    (pictures / "cut.jpg").write_bytes(cut)
    with pytest.raises(PipelineError, match=r"(?s)2 of 4 can't be read:.*broken\.jpg.*cut\.jpg"):
        predicted("classify", [pictures], tmp_path / "out", monkeypatch)
    assert len(list((tmp_path / "out").rglob("*/*.jpg"))) == 2
    with pytest.raises(PipelineError, match="1 of 1"):
        predicted("classify", [pictures / "broken.jpg"], tmp_path / "none", monkeypatch)
    assert not (tmp_path / "none").exists()


def test_what_can_not_be_is_told_before_anything_is_predicted(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, message in (
        ([tmp_path / "not there"], "there is no such picture"),
        ([pictures / "deeper", pictures / "deeper/one.jpg"], None),  # the same file twice
        ([pictures, pictures / "deeper"], r"one\.jpg would both be written as one"),
    ):
        if message:
            with pytest.raises(PipelineError, match=message):
                command.find_pictures(given)
        else:
            assert len(command.find_pictures(given)) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(PipelineError, match="no pictures there"):
        command.find_pictures([tmp_path / "empty"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/kept.txt").write_text("mine")
    with pytest.raises(PipelineError, match="holds no predictions"):
        predicted("classify", [pictures], tmp_path / "mine", monkeypatch)
    assert (tmp_path / "mine/kept.txt").is_file()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, r"has no model\.safetensors.*a stage of this version wrote"),
        (
            lambda folder: folder.with_suffix(".pth").write_text("x"),
            "nothing in it says what model",
        ),
    ],
)
def test_weights_that_say_nothing_of_their_model_are_told(make, message, tmp_path: Path) -> None:
    make(tmp_path / "weights")
    given = next(iter(tmp_path.iterdir()), tmp_path / "weights")
    with pytest.raises(PipelineError, match=message):
        command.load(Weights(str(given)), "cpu")


def test_a_registered_model_that_is_not_there_is_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(PipelineError, match=r"models:/none@champion: .*not found"):
        command.load(Weights("models:/none@champion"), "cpu")


@pytest.mark.parametrize("task", ["classify", "detect"])
def test_a_published_file_is_of_the_recipe_that_it_fits(task: str, tmp_path: Path) -> None:
    params = compose(["recipe=swin_tiny" if task == "detect" else "recipe=elsa_swin_tiny"])
    what = Prediction(params, Dataset(TASKS[task].dataset, "", (), {}, ""))
    state = TASKS[task].evaluation_model(what).state_dict()
    torch.save({"state_dict": state}, tmp_path / "published.pth")
    recipe = params.recipe if task == "detect" else None
    predictor = command.load(Weights(str(tmp_path / "published.pth"), task, recipe), "cpu")
    assert len(predictor.classes) == {"classify": 1000, "detect": 80}[task]
    assert predictor.classes[0] == {"classify": "tench, Tinca tinca", "detect": "person"}[task]
    found = predictor(np.zeros((48, 64, 3), np.uint8))
    if task == "classify":
        assert found.probabilities.sum() == pytest.approx(1, abs=1e-4)
    else:
        assert found.masks.shape[1:] == (48, 64)
