"""Public data sets: unpacked safely, verified where they are, read from there, and rejected."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmengine.registry import DefaultScope, init_default_scope
from mmengine.runner import Runner
from PIL import Image

from pipelines import prepare
from pipelines.data import dataset, images
from pipelines.data.demo import draw as demo
from pipelines.data.errors import DataError
from pipelines.data.files import write_json
from pipelines.data.public import verify
from pipelines.data.public.take import take_one
from pipelines.data.store import Dataset
from pipelines.errors import PipelineError
from pipelines.mm import labels, loading  # noqa: F401  which register what configs name
from pipelines.mm.config import build_config
from pipelines.params import Params, compose
from pipelines.tasks import TASKS
from pipelines.train.job import Job

COUNTS = {
    "imagenet": {"classes": 10, "train": 80, "val": 20},
    "coco": {"classes": 10, "train": 9, "val": 5},
    "ade20k": {"classes": 11, "train": 9, "val": 5},
}


def with_data(tmp_path: Path, kind: str, place: Path | str, **changes: Any) -> Params:
    params = compose()
    data = params.data.model_copy(update={kind: str(place), "storage": str(tmp_path / "storage")})
    section = params.prepare.model_copy(update={"source": "public", **changes})
    return params.model_copy(update={"data": data, "prepare": section})


class Calls:
    """Calls in this process, in order; counts them, and can die after some."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.results: list[Any] = []
        self.stop_after = stop_after

    def __call__(self, function: Any, arguments: Any, unit: str, done: Any) -> None:
        for one in arguments:
            if len(self.results) == self.stop_after:
                raise KeyboardInterrupt
            self.results.append(function(*one))
            done(self.results[-1])

    @property
    def worked(self) -> int:
        return sum(result is not None for result in self.results)


def take(tmp_path: Path, kind: str, place: Path | str, each: Any = None, **changes: Any) -> Any:
    return take_one(with_data(tmp_path, kind, place, **changes), kind, each or Calls())


def rejected(tmp_path: Path, kind: str, place: Path | str, *words: str, **changes: Any) -> str:
    with pytest.raises(DataError) as caught:
        take(tmp_path, kind, place, **changes)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", demo.DATASETS)
def test_a_colleagues_folder_is_verified_where_it_is(
    kind: str,
    public_data: Path,
    copy_public: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    before = sorted(public_data.rglob("*"))
    expected = compose().prepare.coco.model_copy(update=COUNTS[kind])
    manifest = take(tmp_path, kind, public_data / kind, **{kind: expected})
    assert sorted(public_data.rglob("*")) == before, (
        "nothing is written into a folder that was given"
    )
    assert manifest["classes"] == list(demo.CLASSES[kind])
    assert manifest["counts"] == {k: v for k, v in COUNTS[kind].items() if k != "classes"}
    assert str(tmp_path) not in json.dumps(manifest)
    assert str(public_data) not in json.dumps(manifest)
    # Whoever drew these data described them alike.
    assert manifest == json.loads((public_data / f"{kind}.json").read_text())

    # The same data elsewhere has the same manifest, and so the same run identity.
    elsewhere = copy_public(kind)
    assert take(tmp_path, kind, elsewhere) == manifest
    # With the manifest in it nothing is read, until the content is asked for or a size differs.
    write_json(elsewhere / "manifest.json", manifest)
    calls = Calls()
    assert take(tmp_path, kind, elsewhere, calls) == manifest
    assert not calls.results
    monkeypatch.setattr(verify, "VERSION", 2)
    assert take(tmp_path, kind, elsewhere, calls, check="content") == manifest
    assert calls.worked == len(manifest["chunks"])

    # What a training stage does with it.
    params = with_data(tmp_path, kind, elsewhere)
    monkeypatch.setattr(dataset, "ROOT", tmp_path)
    write_json(tmp_path / "data" / kind / "manifest.json", manifest)
    found = dataset.find_dataset(params, kind, COUNTS[kind]["classes"])
    assert found.place == str(elsewhere)
    assert found.digest == manifest["digest"]
    with pytest.raises(DataError, match=r"classes, but num_classes is 3"):
        dataset.find_dataset(params, kind, 3)
    victim = next(
        p
        for p in sorted(elsewhere.rglob("*.*"))
        if p.suffix.lower() == ".jpg" or p.suffix == ".JPEG"
    )
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(DataError, match="is not what was verified"):
        dataset.find_dataset(params, kind, COUNTS[kind]["classes"])
    rejected(tmp_path, kind, elsewhere, "is not as the manifest.json in it says")


def test_a_killed_verification_resumes_where_it_was(public_data: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        take(tmp_path, "imagenet", public_data / "imagenet", Calls(stop_after=7))
    journal = next((tmp_path / "storage/verified").glob("*.jsonl"))
    journal.write_bytes(journal.read_bytes()[:-40])  # the last line was cut short by the kill
    calls = Calls()
    manifest = take(tmp_path, "imagenet", public_data / "imagenet", calls)
    assert calls.worked == len(manifest["chunks"]) - 6
    again = Calls()
    assert take(tmp_path, "imagenet", public_data / "imagenet", again) == manifest
    assert again.worked == 0


def test_corrupt_images_are_listed_and_left_out_within_the_limit(
    copy_public: Callable[[str], Path], tmp_path: Path, capsys: Any
) -> None:
    root = copy_public("imagenet")
    bad = [min((root / "train" / f"digit_{i}").iterdir()) for i in (2, 7)]
    bad[0].write_bytes(bad[0].read_bytes()[:600])
    bad[1].write_bytes(b"an error page")
    rejected(
        tmp_path,
        "imagenet",
        root,
        "2 faults",
        "2 corrupt images, prepare.max_corrupt=0",
        *map(str, bad),
        "(600 bytes)",
        "it is no image, or of an unknown kind (13 bytes)",
    )
    rejected(tmp_path, "imagenet", root, "2 corrupt images", max_corrupt=1)
    manifest = take(tmp_path, "imagenet", root, max_corrupt=2)
    elsewhere = Path(shutil.copytree(root, tmp_path / "elsewhere"))
    assert take(tmp_path, "imagenet", elsewhere, max_corrupt=2) == manifest
    names = [path.relative_to(root).as_posix() for path in bad]
    assert list(manifest["skipped"]) == names
    assert manifest["counts"]["train"] == 78
    assert str(bad[0]) in capsys.readouterr().out
    data = images.Images(str(root), "train", manifest["skipped"])
    assert len(data) == 78
    assert not {data.filename(i, absolute=True) for i in range(78)} & {str(p) for p in bad}
    with pytest.raises(DataError, match=bad[0].name):  # timm would take another in silence
        [image for image, _ in (images.Images(str(root), "train")[i] for i in range(80))]
    # Validation images are what is reported: none may be left out.
    path = min((root / "val/digit_1").iterdir())
    path.write_bytes(b"no image")
    rejected(tmp_path, "imagenet", root, "none of the validation images", str(path), max_corrupt=9)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("coco", ["train2017/*.jpg"]),
        # An image, and the label map of another: both pairs are lost.
        ("ade20k", ["images/training/*.jpg", "annotations/training/*.png"]),
    ],
)
def test_scenes_that_do_not_decode_are_left_out_of_training(
    copy_public: Callable[[str], Path], tmp_path: Path, name: str, bad: list[str]
) -> None:
    root = copy_public(name)
    files = [sorted(root.glob(pattern))[place] for place, pattern in enumerate(bad)]
    for file in files:
        file.write_bytes(file.read_bytes()[:200])
    count = {"coco": 1, "ade20k": 2}[name]
    rejected(tmp_path, name, root, f"{count} corrupt images, prepare.max_corrupt=0", str(files[0]))
    manifest = take(tmp_path, name, root, max_corrupt=count)
    left_out = tuple(file.relative_to(root).as_posix() for file in files)
    assert sorted(manifest["skipped"]) == sorted(left_out)
    assert manifest["counts"]["train"] == 9 - count

    stage = {"coco": "detect", "ade20k": "segment"}[name]
    found = Dataset(name, str(root), tuple(manifest["classes"]), {}, "", left_out)
    job = Job(stage, compose(), found)
    config = build_config(job, tmp_path)
    DefaultScope._instance_dict.clear()
    init_default_scope(config.default_scope)
    loader = Runner.build_dataloader(config.train_dataloader)
    assert len(loader.dataset) == 9 - count
    seen = {loader.dataset[i]["data_samples"].img_path for i in range(len(loader.dataset))}
    stems = {file.stem for file in files}
    assert len(seen) == 9 - count
    assert not {Path(path).stem for path in seen} & stems
    # Validation images are what is reported.
    validation = min(root.glob({"coco": "val2017/*", "ade20k": "images/validation/*"}[name]))
    validation.write_bytes(b"no image")
    rejected(tmp_path, name, root, "none of the validation images", max_corrupt=9)


def test_counts_classes_and_layout(copy_public: Callable[[str], Path], tmp_path: Path) -> None:
    expected = compose().prepare.imagenet
    root = copy_public("imagenet")
    wrong = expected.model_copy(update={"train": 81, "classes": 1000})
    rejected(
        tmp_path,
        "imagenet",
        root,
        "10 classes, 1000 expected",
        "80 training images, 81 expected (prepare.imagenet.train)",
        imagenet=wrong,
    )
    (root / "val/digit_3").rename(root / "val/digit_x")
    rejected(tmp_path, "imagenet", root, "differ in digit_3, digit_x")
    (root / "val/digit_x").rename(root / "val/digit_3")
    for path in (root / "train/digit_4").iterdir():
        path.unlink()
    rejected(tmp_path, "imagenet", root, "train/digit_4 has no images")
    shutil.rmtree(root / "val")
    rejected(tmp_path, "imagenet", root, "no folder val/", "it holds train")
    rejected(tmp_path, "imagenet", tmp_path / "nowhere", "no folder", "nowhere")
    rejected(tmp_path, "coco", "s3://bucket/coco", "only ImageNet's shards")


def edit_coco(root: Path, edit: Callable[[Any], Any]) -> None:
    path = root / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    edit(content)
    write_json(path, content)


def change(part: str, **values: Any) -> Callable[[Any], None]:
    """Of the second entry of a part of the annotations."""
    return lambda content: content[part][1].update(values)


FAULTS: list[tuple[str, Callable[[Any], Any], list[str]]] = [
    ("image id", change("annotations", image_id=777), ["annotation 102", "image_id 777"]),
    ("category", change("annotations", category_id=99), ["annotation 102", "category_id 99"]),
    ("outside", change("annotations", bbox=[90, 5, 20, 10]), ["[90, 5, 20, 10]", "96x96"]),
    ("negative", change("annotations", bbox=[-3, 5, 20, 10]), ["[-3, 5, 20, 10]", "is outside"]),
    ("no box", change("annotations", bbox=None), ["annotation 102", "no bbox"]),
    ("text box", change("annotations", bbox=["3", 5, 6, 10]), ["annotation 102", "no bbox"]),
    ("crowd flag", change("annotations", iscrowd=2), ["annotation 102", "iscrowd 2"]),
    ("area", change("annotations", area=None), ["has area None, not the object's number"]),
    ("mask", change("annotations", segmentation="x"), ["type str, not polygons"]),
    (
        "mask size",
        change("annotations", segmentation={"size": [9, 9], "counts": "x"}),
        ["mask of size [9, 9]"],
    ),
    ("same annotation", change("annotations", id=101), ["annotations has id 101 more than once"]),
    ("same image", change("images", id=1), ["images has id 1 more than once"]),
    ("no id", change("annotations", id=None), ["annotations", "a whole number as id"]),
    ("no file", change("images", file_name="009.jpg"), ["image 2", "train2017/009.jpg"]),
    ("wrong size", change("images", width=40), ["image 2", "40x96", "96x96"]),
    ("no images", lambda content: content.pop("images"), ["'images' is missing"]),
    ("empty", lambda content: content.update(annotations=[]), ["has no annotations"]),
    ("unlisted", lambda content: content["images"].pop(), ["000000000009.jpg", "no entry"]),
]


@pytest.mark.parametrize(("edit", "words"), [pytest.param(*f[1:], id=f[0]) for f in FAULTS])
def test_faulty_coco_annotations(
    copy_public: Callable[[str], Path], tmp_path: Path, edit: Callable[[Any], Any], words: list[str]
) -> None:
    root = copy_public("coco")
    edit_coco(root, edit)
    rejected(tmp_path, "coco", root, "instances_train2017.json", *words)


def test_annotations_of_other_categories_or_cut_short(
    copy_public: Callable[[str], Path], tmp_path: Path
) -> None:
    root = copy_public("coco")
    path = root / "annotations/instances_val2017.json"
    whole = path.read_text()
    path.write_text(whole.replace('"name":"digit_4"', '"name":"cat"', 1))
    assert path.read_text() != whole
    rejected(tmp_path, "coco", root, path.name, "not the 10 of the training annotations")
    path.write_text(whole[:1000])
    rejected(tmp_path, "coco", root, path.name, "not valid JSON")
    path.unlink()
    rejected(tmp_path, "coco", root, f"has no annotations/{path.name}")


def test_boxes_without_masks_are_told_and_only_for_methods_without_them(
    copy_public: Callable[[str], Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    root = copy_public("coco")
    edit_coco(root, lambda c: [a.pop("segmentation") for a in c["annotations"][:3]])
    manifest = take(tmp_path, "coco", root)
    assert manifest["without_mask"] == 3
    assert "prepare: 3 of " in capsys.readouterr().out

    monkeypatch.setattr(dataset, "ROOT", tmp_path)
    write_json(tmp_path / "data/coco/manifest.json", manifest)
    params = with_data(tmp_path, "coco", root)
    with pytest.raises(PipelineError, match=r"3 annotations of .*detect\.method=faster-rcnn"):
        TASKS["detect"].find_dataset(params)
    boxes = params.detect.model_copy(update={"method": "faster-rcnn"})
    found = TASKS["detect"].find_dataset(params.model_copy(update={"detect": boxes}))
    assert found.without_mask == 3


def test_empty_boxes_of_coco_have_a_limit(
    copy_public: Callable[[str], Path], tmp_path: Path
) -> None:
    """COCO 2017 has two (annotations 918 and 2206849); mmdet leaves them out."""
    root = copy_public("coco")
    edit_coco(root, lambda c: c["annotations"][1].update(bbox=[3, 5, 4, 0.0]))
    edit_coco(root, lambda c: c["annotations"][0].update(bbox=[80.5, 5, 16, 9]))  # rounded: half px
    rejected(tmp_path, "coco", root, "annotation 102", "empty bbox", "prepare.max_empty_boxes=0")
    assert take(tmp_path, "coco", root, max_empty_boxes=1)["counts"]["train"] == 9


def test_faulty_label_maps(copy_public: Callable[[str], Path], tmp_path: Path) -> None:
    root = copy_public("ade20k")
    (root / "classes.txt").write_text("\n".join(demo.CLASSES["ade20k"][:-1]))
    rejected(tmp_path, "ade20k", root, "14 faults", "has label 11; allowed: 0 (ignored) to 10")
    (root / "classes.txt").write_text("\n".join(demo.CLASSES["ade20k"]))
    for path in (root / "annotations/validation").iterdir():
        Image.new("L", (96, 96)).save(path)
    rejected(tmp_path, "ade20k", root, "no val images with ground truth")
    Image.new("L", (96, 50), 1).save(path)
    rejected(tmp_path, "ade20k", root, path.name, "is 96x50, its image")
    path.unlink()
    rejected(tmp_path, "ade20k", root, "no counterpart", path.stem)
    (root / "classes.txt").unlink()
    shutil.copy(min((root / "annotations/validation").iterdir()), path)
    rejected(tmp_path, "ade20k", root, "write the names of the classes into it")


def test_the_first_stage_tells_what_is_impossible(public_data: Path, tmp_path: Path) -> None:
    params = with_data(tmp_path, "coco", public_data / "coco")
    with pytest.raises(
        DataError, match=r"no data for classify, segment: data\.imagenet, data\.ade"
    ):
        prepare.check(params)
    params = params.model_copy(update={"tasks": ("detect",)})
    prepare.check(params)
    other = params.detect.model_copy(update={"num_classes": 3})
    with pytest.raises(DataError, match=r"has 10 classes, but detect\.num_classes is 3"):
        prepare.check(params.model_copy(update={"detect": other}))


def test_nothing_given(tmp_path: Path) -> None:
    params = with_data(tmp_path, "coco", tmp_path)
    with pytest.raises(DataError, match=r"data.imagenet is null. Set it"):
        dataset.locate(params, "imagenet")
    none = params.model_copy(update={"data": params.data.model_copy(update={"coco": None})})
    with pytest.raises(DataError, match=r"data.imagenet, data.coco and data.ade20k are null"):
        prepare.check(none)
