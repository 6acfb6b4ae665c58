"""A trained model written as files that other runtimes execute, each compared with the model."""

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import elsa.run_exported
from elsa.export import ExportError, example, exportable, write_onnx, write_pt2
from elsa.predict import Detector, Predictor
from elsa.run_exported import Exported
from pipelines.data.files import write_json
from pipelines.errors import PipelineError

if TYPE_CHECKING:
    from torch import Tensor

WRITERS = {"onnx": write_onnx, "pt2": write_pt2}
RECORD, RUNNER = "export.json", "run.py"
TOLERANCE = 1e-4
"""Largest difference of results, as a share of the largest of them."""
BATCHES = (1, 3)
"""What the files are compared with the model on: the batch is theirs to vary."""


@dataclass(frozen=True)
class Measured:
    """What a file is like beside the model it was made of."""

    name: str
    """The file; `run.py` is all files of a detector together, `eager` the model in torch."""
    megabytes: float | None
    load_s: float | None
    ms: float | None
    """Of an image, alone in its batch."""
    difference: float | None
    """Largest, of results, over the largest of them."""


def write_export(
    predictor: Predictor,
    formats: Sequence[str],
    size: tuple[int, int] | None,
    source: str,
    folder: Path,
) -> list[Measured]:
    """Write the model in each format, what runs it, and a record; how they compare.

    Args:
        size: (H, W) of the images; None takes that of the model's evaluation.
        source: what the record says that the weights are.

    Raises:
        ExportError: the model can't be exported.
        PipelineError: a file computes something else than it.
    """
    write = write_detector if isinstance(predictor, Detector) else write_files
    described, rows = write(predictor, formats, size, folder)
    shutil.copy(elsa.run_exported.__file__, folder / RUNNER)
    write_json(folder / RECORD, {**described, "weights": source}, indent=1)
    return rows


def write_files(
    predictor: Predictor, formats: Sequence[str], size: tuple[int, int] | None, folder: Path
) -> tuple[dict[str, Any], list[Measured]]:
    """Write a classifier or segmentor, a file for each format, and compare.

    Raises:
        ExportError: it can't be exported.
        PipelineError: a file computes something else.
    """
    import torch

    model, described = exportable(predictor, size)
    images = [example(described["size"], batch) for batch in BATCHES]
    with torch.inference_mode():
        wanted = [model(one) for one in images]
        rows = [Measured("eager", None, None, _ms(lambda: model(images[0])), None)]
    for kind in formats:
        file = folder / f"model.{kind}"
        print(f"writing {file.name}{' (minutes)' if kind == 'pt2' else ''}", flush=True)
        WRITERS[kind](model, described, file)
        start = time.perf_counter()
        exported = Exported(file)
        load_s = time.perf_counter() - start
        arrays = [one.numpy() for one in images]
        found = [torch.from_numpy(exported.logits(array)) for array in arrays]
        difference = _checked(file, max(map(_difference, found, wanted)))
        ms = _ms(partial(exported.logits, arrays[0]))
        rows.append(Measured(file.name, file.stat().st_size / 1e6, load_s, ms, difference))
    return described, rows


def write_detector(
    predictor: Predictor, formats: Sequence[str], size: tuple[int, int] | None, folder: Path
) -> tuple[dict[str, Any], list[Measured]]:
    """Write the graphs of a detector, and compare each.

    Raises:
        ExportError: it can't be exported.
        PipelineError: a file computes something else.
    """
    import torch
    from PIL import Image

    from elsa.export_detector import detector_graphs

    assert isinstance(predictor, Detector)
    if set(formats) != {"onnx"}:
        raise ExportError("a detector is exported as ONNX only")
    graphs, described = detector_graphs(predictor, size)
    rows = []
    for graph in graphs:
        print(f"writing {graph.file}", flush=True)
        graph.write(folder, described)
    start = time.perf_counter()
    exported = Exported(folder / "model.onnx")
    load_s = time.perf_counter() - start
    for graph in graphs:
        with torch.inference_mode():
            wanted = graph.module(*graph.arguments)
        leaves = torch.utils._pytree.tree_leaves(graph.arguments)
        found = exported.run(graph.file, [leaf.numpy() for leaf in leaves])
        pairs = zip(
            map(torch.from_numpy, found), torch.utils._pytree.tree_leaves(wanted), strict=True
        )
        file = folder / graph.file
        difference = _checked(file, max(_difference(*pair) for pair in pairs))
        rows.append(Measured(graph.file, file.stat().st_size / 1e6, None, None, difference))
    picture = example(described["size"], 1)[0].permute(1, 2, 0).byte().numpy()
    whole = _ms(lambda: exported.find(Image.fromarray(picture)))
    rows.append(Measured("run.py", None, load_s, whole, None))
    rows.insert(0, Measured("eager", None, None, _ms(lambda: predictor(picture)), None))
    return described, rows


def _checked(file: Path, difference: float) -> float:
    if not difference < TOLERANCE:
        raise PipelineError(
            f"{file.name} computes something else than the model: its results differ by"
            f" {difference:.1e} of the largest, and {TOLERANCE:.0e} is admitted",
            "Report this with the weights' model.json",
        )
    return difference


def _difference(found: "Tensor", wanted: "Tensor") -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def _ms(run: Callable[[], object], repeats: int = 7) -> float:
    """Median milliseconds, after one run that counts not."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)
