"""`elsa import palette`: label images by palette, by colour or by value."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.commands.finetune import look
from pipelines.commands.import_data import Options, import_data
from pipelines.data.errors import DataError

NAMES = ("sky", "roof", "tree")
COLOURS = ((70, 130, 180), (128, 0, 0), (0, 128, 0))
BORDER = (224, 224, 192)


@pytest.fixture
def maps() -> dict[str, np.ndarray]:
    """Index of each pixel's class by image; 255 is VOC's border. Every image has all classes."""
    generator = np.random.default_rng(0)
    found = {}
    for i in range(6):
        values = generator.integers(0, len(NAMES), (20, 30 + i)).astype(np.uint8)
        values[0, : len(NAMES)] = range(len(NAMES))
        values[5, 5:9] = 255
        found[f"view {i}.x"] = values
    return found


def picture(kind: str, values: np.ndarray) -> Image.Image:
    if kind == "values":
        return Image.fromarray(values)
    table = np.full((256, 3), BORDER, np.uint8)
    table[: len(COLOURS)] = COLOURS
    if kind == "colours":
        return Image.fromarray(table[values])
    palette = Image.fromarray(values).convert("P")
    palette.putdata(values.ravel().tolist())
    palette.putpalette(table.ravel().tolist())
    return palette


def source(folder: Path, kind: str, maps: dict[str, np.ndarray], classes: str = "") -> Path:
    """VOC's folders for palettes, ours for the rest."""
    images, labels = (
        ("JPEGImages", "SegmentationClass") if kind == "palette" else ("images", "labels")
    )
    for part in (images, labels):
        (folder / part).mkdir(parents=True)
    for name, values in maps.items():
        Image.new("RGB", values.shape[::-1], (90, 90, 90)).save(folder / images / f"{name}.jpg")
        picture(kind, values).save(folder / labels / f"{name}.png")
    if classes:
        (folder / "labelmap.txt").write_text(classes)
    return folder


CVAT = "# label:color_rgb:parts:actions\n" + "".join(
    f"{name}:{','.join(map(str, colour))}::\n" for name, colour in zip(NAMES, COLOURS, strict=True)
)


@pytest.mark.parametrize(
    ("kind", "classes"),
    [
        ("palette", ""),
        ("palette", "names"),
        ("palette", "cvat"),
        ("colours", ""),
        ("colours", "cvat"),
        ("values", ""),
        ("values", "names"),
    ],
)
def test_each_pixel_keeps_its_class(kind, classes, maps, tmp_path, capsys) -> None:
    text = {"": "", "names": "\n".join(NAMES), "cvat": CVAT}[classes]
    place = tmp_path / "target"
    import_data("palette", source(tmp_path / "in", kind, maps, text), place, Options("0.34", 0, 0))
    assert "3 classes, 4 training images, 2 validation images" in capsys.readouterr().out
    seen = look("segment", place)
    if classes:
        assert tuple(seen.classes) == NAMES
    else:  # in the order of their values
        ordered = sorted("#{:02x}{:02x}{:02x}".format(*colour) for colour in COLOURS)
        expected = ordered if kind == "colours" else ["class 0", "class 1", "class 2"]
        assert list(seen.classes) == expected
    number = {i: i + 1 for i in range(len(NAMES))} | {255: 0}
    if kind == "colours" and not classes:
        number |= {i: sorted(COLOURS).index(COLOURS[i]) + 1 for i in range(len(NAMES))}
    written = sorted(place.glob("annotations/*/*.png"))
    assert len(written) == len(maps)
    for file in written:
        expected_map = np.vectorize(number.get)(maps[file.stem])
        np.testing.assert_array_equal(np.asarray(Image.open(file)), expected_map)
        assert (place / "images" / file.parent.name / f"{file.stem}.jpg").is_file()


def test_tiles_cover_the_images_and_their_labels_alike(maps, tmp_path) -> None:
    folder = source(tmp_path / "in", "palette", maps)
    import_data("palette", folder, tmp_path / "target", Options("0.34", 0, 16))
    pieces = sorted((tmp_path / "target/annotations").glob("*/view 0.x_*.png"))
    total = 0
    for piece in pieces:
        labels = Image.open(piece)
        image = tmp_path / "target/images" / piece.parent.name / piece.name
        assert Image.open(image).size == labels.size
        assert max(labels.size) <= 16
        total += labels.size[0] * labels.size[1]
    assert total == maps["view 0.x"].size


@pytest.mark.parametrize(
    ("kind", "classes", "change", "message"),
    [
        ("colours", "\n".join(NAMES), {}, r"has colours and no palette.*Write each class's colour"),
        ("colours", CVAT.replace("0,128,0", "0,129,0"), {}, r"colours of no class: #008000"),
        ("palette", "sky\nroof", {}, r"values of no class: 2"),
        ("palette", CVAT + "again:128,0,0::", {}, r"'again:128,0,0::' is there twice"),
        ("palette", CVAT + "no colour", {}, r"'no colour' has no colour"),
        ("palette", "sky 0 0 300", {}, r"a colour's parts are 0 to 255"),
        ("palette", "sky", {}, r"1 classes; there must be 2 to 255"),
        ("values", "", {"SegmentationClass": None}, r"has no folder labels or masks"),
        ("values", "", {"labels/view 0.x.png": b"no image"}, r"view 0\.x\.png can't be read"),
        ("values", "", {"labels/other.png": b""}, r"label images without an image: other"),
        ("values", "", {"size": (5, 5)}, r"is 5 x 5 pixels, and its image 30 x 20"),
        ("colours", "", {"photo": True}, r"more than 255 colours.*photographs"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_written(
    kind, classes, change, message, maps, tmp_path
) -> None:
    folder = source(tmp_path / "in", kind, maps, classes)
    for name, content in change.items():
        if name == "size":
            picture(kind, np.zeros(content, np.uint8)).save(folder / "labels/view 0.x.png")
        elif name == "photo":
            noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
            Image.fromarray(noise).save(folder / "labels/view 0.x.png")
        elif content is None:
            (folder / "labels").rename(folder / "elsewhere")
        else:
            (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=r"(?s)" + message):
        import_data("palette", folder, tmp_path / "target", Options("0.34", 0, 0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
