"""What a trained model says of pictures: drawn on them, and in the public formats."""

import csv
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

import elsa
from elsa.predict import Classes, Labels, Objects, Predictor, load_predictor
from pipelines.commands import exported
from pipelines.data.masks import run_lengths
from pipelines.errors import PipelineError

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
HUB = "hf-hub:"
TOP = 5
"""Classes that are told of an image."""
SMALLEST = 480
"""Pixels of the shorter side of a drawn picture, at least about so many."""
MARK = "classes.txt"
"""Every folder of predictions has it."""


@dataclass(frozen=True)
class Weights:
    """Which weights to predict with."""

    place: str
    """A folder that a stage wrote, a model in MLflow (`models:/...`) or on a hub (`hf-hub:...`), or
    a published file."""
    task: str | None = None
    """Of a file: what it is for."""
    recipe: str | None = None
    """Of a file: whose model it is of; None finds the one that fits."""


@dataclass
class Written:
    """What is collected for the file of all pictures."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of a classifier: a row of the CSV each."""
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    """Of a detector, as in COCO's files."""
    failed: list[str] = field(default_factory=list)
    """Pictures that can't be read, and why."""


def find_pictures(given: Iterable[Path]) -> list[tuple[Path, Path]]:
    """The pictures given, and those below the folders given; each with its name in the output.

    Raises:
        PipelineError: there is none, or two have the same name in the output.
    """
    found: dict[Path, Path] = {}
    for place in given:
        if place.is_dir():
            files = sorted(f for f in place.rglob("*") if f.suffix.lower() in PICTURES)
        elif place.is_file():
            files = [place]
        else:
            raise PipelineError(f"{place}: there is no such picture or folder")
        for file in files:
            name = file.relative_to(place if place.is_dir() else file.parent).with_suffix("")
            other = found.setdefault(name, file)
            if other != file:
                raise PipelineError(
                    f"{other} and {file} would both be written as {name}",
                    "Rename one, or predict them apart",
                )
    if not found:
        raise PipelineError(
            f"no pictures there; looked for {', '.join(sorted(PICTURES))}", "Give other folders"
        )
    return [(file, name) for name, file in found.items()]


def open_picture(file: Path) -> Image.Image:
    """The picture upright, in RGB.

    Raises:
        OSError, ValueError, SyntaxError: it does not decode.
    """
    with Image.open(file) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def predict(
    pictures: Iterable[Path], weights: Weights, out: Path, device: str, min_score: float
) -> None:
    """Predict pictures into the folder `out`, which appears whole.

    Raises:
        PipelineError: the weights or a picture can't be read, or `out` holds something else.
    """
    files = find_pictures(pictures)
    if out.exists() and not (out / MARK).is_file():
        raise PipelineError(f"--out {out} exists and holds no predictions", "Name another folder")
    predictor = _predictor(weights, device)
    written = Written()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        staged = Path(scratch) / out.name
        staged.mkdir()
        (staged / MARK).write_text("".join(f"{name}\n" for name in predictor.classes))
        for file, name in _progress(files):
            try:
                image = open_picture(file)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                written.failed.append(f"{file}: {error}")
                continue
            found = predictor(np.asarray(image))
            _collect(written, found, predictor, name, file, image)
            picture = staged / "pictures" / f"{name}.jpg"
            picture.parent.mkdir(parents=True, exist_ok=True)
            draw(image, found, predictor.classes, min_score).save(picture, quality=90)
            if isinstance(found, Labels):
                _write_labels(staged / "labels" / f"{name}.png", found)
        _finish(written, predictor, staged)
        if len(written.failed) < len(files):
            shutil.rmtree(out, ignore_errors=True)
            staged.replace(out)
    _tell(written, predictor, len(files), out)


def _predictor(given: Weights, device: str) -> Predictor:
    """That of an export, too."""
    if exported.is_export(given.place):
        return exported.ExportedPredictor(exported.load(given.place, given.task))
    return load(given, device)


def load(given: Weights, device: str) -> Predictor:
    """The predictor of the weights.

    Raises:
        PipelineError: there are none, or they can't be read.
    """
    try:
        with weights_folder(given) as folder:
            return load_predictor(folder, device)
    except (FileNotFoundError, elsa.CheckpointError) as error:
        raise PipelineError(
            f"--weights {given.place}: {error}",
            "Give a folder that a stage of this version wrote, such as weights/detect",
        ) from None
    except ModuleNotFoundError as error:
        raise PipelineError(
            f"--weights {given.place} needs {error.name}, which is not installed",
            "Install what README says under `make setup`",
        ) from None


@contextmanager
def weights_folder(given: Weights) -> Iterator[Path]:
    """A folder with the weights and what says whose they are; of a file it is temporary.

    Raises:
        PipelineError: the file, the hub or the store does not have them.
    """
    place = given.place
    folder = Path(place).expanduser()
    if place.startswith("models:/"):
        yield _registered(place)
    elif place.startswith(HUB):
        yield _from_hub(place)
    elif folder.is_file():
        if not given.task:
            raise PipelineError(
                f"--weights {place} is a file, and nothing in it says what model it is of",
                "Add --task, or give the folder that a stage wrote, such as weights/detect",
            )
        from pipelines.commands.complete import complete

        with tempfile.TemporaryDirectory() as scratch:
            complete(folder, given.task, given.recipe, Path(scratch))
            yield Path(scratch)
    else:
        yield folder


def default_device() -> str:
    """A GPU if torch sees one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _from_hub(place: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(place.removeprefix(HUB)))
    except Exception as error:  # of whichever HTTP library the hub's client has
        raise PipelineError(
            f"--weights {place}: {error}", "Log in by `hf auth login` if it is private"
        ) from error


def _registered(uri: str) -> Path:
    from pipelines.run.tracking import download_model

    folder = download_model(uri)
    for file in folder.rglob("model.safetensors"):
        return file.parent
    return folder


def _progress(files: list[tuple[Path, Path]]) -> Iterator[tuple[Path, Path]]:
    from rich.progress import track

    yield from track(files, description="predict", transient=True)


def draw(
    image: Image.Image, found: Classes | Objects | Labels, classes: tuple[str, ...], score: float
) -> Image.Image:
    """The picture with what was found on it, objects from `score` on; small ones are enlarged."""
    from elsa.mm import palette

    colors = palette(len(classes))
    scale = max(1, SMALLEST // min(image.size))
    picture = image.resize((image.width * scale, image.height * scale))
    if isinstance(found, Classes):
        pairs = zip(found.labels[:3], found.probabilities[:3], strict=True)
        return _captioned(picture, [(f"{classes[i]} {p:.2f}", colors[i]) for i, p in pairs])
    if isinstance(found, Labels):
        painted = Image.fromarray(np.array(colors, np.uint8)[found.labels])
        blended = Image.blend(picture, painted.resize(picture.size, Image.Resampling.NEAREST), 0.5)
        labels, counts = np.unique(found.labels, return_counts=True)
        present = labels[np.argsort(-counts)][:8]
        return _captioned(blended, [(classes[i], colors[i]) for i in present])
    shown = np.flatnonzero(found.scores >= score)[::-1]  # the surest on top
    masks = found.masks if found.masks is not None else ()
    for i in shown[: len(shown) if len(masks) else 0]:
        mask = Image.fromarray(masks[i].astype(np.uint8) * 110).resize(picture.size)
        picture.paste(Image.new("RGB", picture.size, colors[found.labels[i]]), mask=mask)
    pen = ImageDraw.Draw(picture)
    for i in shown:
        left, top, right, bottom = (scale * float(v) for v in found.boxes[i])
        color = colors[found.labels[i]]
        width = max(2, min(picture.size) // 250)
        pen.rectangle((left, top, right, bottom), outline=color, width=width)
        _write(pen, (left, top), f"{classes[found.labels[i]]} {found.scores[i]:.2f}", color)
    return picture


def _captioned(image: Image.Image, names: list[tuple[str, tuple[int, int, int]]]) -> Image.Image:
    """The image above names, each on its color."""
    height = max(14, image.height // 30)
    rows: list[list[tuple[str, tuple[int, int, int]]]] = [[]]
    left = 4.0
    for name in names:
        width = ImageDraw.Draw(image).textlength(name[0], font_size=height) + height
        if left + width > image.width and rows[-1]:
            rows.append([])
            left = 4.0
        rows[-1].append(name)
        left += width
    tall = len(rows) * (height + 8)
    picture = Image.new("RGB", (image.width, image.height + tall), "white")
    picture.paste(image)
    pen = ImageDraw.Draw(picture)
    for number, row in enumerate(rows, 1):
        left = 4.0
        for text, color in row:
            bottom = image.height + number * (height + 8) - 4
            left += _write(pen, (left, bottom), text, color, height) + height
    return picture


def _write(
    pen: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    color: tuple[int, int, int],
    height: int = 14,
) -> float:
    """Write white on a color above and to the right of a corner, within the image; the width."""
    width = pen.textlength(text, font_size=height)
    left = max(0.0, min(corner[0], pen.im.size[0] - width - 2))
    top = max(0.0, corner[1] - height - 2)
    pen.rectangle((left, top, left + width + 2, top + height + 2), fill=color)
    pen.text((left + 1, top), text, fill="white", font_size=height)
    return width


def _collect(
    written: Written,
    found: Classes | Objects | Labels,
    predictor: Predictor,
    name: Path,
    file: Path,
    image: Image.Image,
) -> None:
    """Keep what goes into the file of all pictures."""
    if isinstance(found, Classes):
        row = {"image": f"{name}{file.suffix}"}
        pairs = zip(found.labels[:TOP], found.probabilities[:TOP], strict=True)
        for i, (label, probability) in enumerate(pairs, 1):
            row[f"predicted_{i}"] = predictor.classes[label]
            row[f"probability_{i}"] = f"{probability:.6f}"
        written.rows.append(row)
    if isinstance(found, Objects):
        number = len(written.images) + 1
        size = {"width": image.width, "height": image.height}
        written.images.append({"id": number, "file_name": f"{name}{file.suffix}", **size})
        for index in range(len(found.scores)):
            one = _annotation(found, index)
            written.annotations.append(
                {"id": len(written.annotations) + 1, "image_id": number, **one}
            )


def _annotation(found: Objects, index: int) -> dict[str, Any]:
    """An object as COCO has it; categories count from 1."""
    left, top, right, bottom = (round(float(v), 2) for v in found.boxes[index])
    box = [left, top, round(right - left, 2), round(bottom - top, 2)]
    area = box[2] * box[3]
    one: dict[str, Any] = {"category_id": int(found.labels[index]) + 1, "bbox": box, "iscrowd": 0}
    if found.masks is not None:
        area = int(found.masks[index].sum())
        one["segmentation"] = run_lengths(found.masks[index])
    return {**one, "area": area, "score": round(float(found.scores[index]), 6)}


def _write_labels(file: Path, found: Labels) -> None:
    """Labels as in ADE20K's files: the first class is 1."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kind = np.uint8 if found.labels.max() < 255 else np.uint16
    Image.fromarray((found.labels + 1).astype(kind)).save(file)


def _finish(written: Written, predictor: Predictor, folder: Path) -> None:
    if predictor.task == "classify" and written.rows:
        with (folder / "predictions.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(written.rows[0]))
            writer.writeheader()
            writer.writerows(written.rows)
    if predictor.task == "detect":
        categories = [{"id": i, "name": name} for i, name in enumerate(predictor.classes, 1)]
        content = {
            "images": written.images,
            "categories": categories,
            "annotations": written.annotations,
        }
        (folder / "predictions.json").write_text(json.dumps(content))


def _tell(written: Written, predictor: Predictor, count: int, out: Path) -> None:
    for row in written.rows[:10]:
        print(f"{row['image']}: {row['predicted_1']} {float(row['probability_1']):.2f}")
    done = count - len(written.failed)
    what = {
        "classify": "pictures/, predictions.csv",
        "detect": "pictures/, predictions.json (COCO's format)",
        "segment": "pictures/, labels/ (PNG, the first class of classes.txt is 1)",
    }[predictor.task]
    if done:
        print(f"{done} pictures in {out}: {what}")
    if written.failed:
        shown = "\n  ".join(written.failed[:10])
        raise PipelineError(f"{len(written.failed)} of {count} can't be read:\n  {shown}")
