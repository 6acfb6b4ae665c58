"""`elsa export`: a model as a file that other runtimes execute, compared with the model itself."""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import elsa.run_exported
from elsa.export import ExportError, example, exportable, write_onnx, write_pt2
from elsa.run_exported import Exported
from pipelines.commands.predict import Weights, load
from pipelines.data.files import write_json
from pipelines.errors import PipelineError

if TYPE_CHECKING:
    from torch import Tensor, nn

WRITERS = {"onnx": write_onnx, "pt2": write_pt2}
RECORD, RUNNER = "export.json", "run.py"
TOLERANCE = 1e-4
"""Largest difference of logits, as a share of the largest of them."""
BATCHES = (1, 3)
"""What the files are compared with the model on: the batch is theirs to vary."""


@dataclass(frozen=True)
class Measured:
    """What a file is like beside the model it was made of."""

    name: str
    megabytes: float | None
    load_s: float | None
    ms: float
    """Of an image, alone in its batch."""
    difference: float
    """Largest, of logits, over the largest of them."""


def export(given: Weights, formats: Sequence[str], size: tuple[int, int] | None, out: Path) -> None:
    """Write the folder `out`, which appears whole, and tell how its files compare.

    Raises:
        PipelineError: the weights can't be read or exported, a file computes something else than
            the model, or `out` holds something else.
    """
    if out.exists() and not (out / RECORD).is_file():
        raise PipelineError(f"--out {out} exists and holds no export", "Name another folder")
    predictor = load(given, "cpu")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        staged = Path(scratch) / out.name
        staged.mkdir()
        try:
            model, described = exportable(predictor, size)
            for kind in formats:
                print(f"writing model.{kind}{' (minutes)' if kind == 'pt2' else ''}", flush=True)
                WRITERS[kind](model, described, staged / f"model.{kind}")
        except ExportError as error:
            raise PipelineError(f"{given.place}: {error}") from error
        rows = compare(model, described["size"], [staged / f"model.{kind}" for kind in formats])
        shutil.copy(elsa.run_exported.__file__, staged / RUNNER)
        write_json(staged / RECORD, {**described, "weights": given.place}, indent=1)
        shutil.rmtree(out, ignore_errors=True)
        staged.replace(out)
    _tell(rows, out)


def compare(model: "nn.Module", size: Sequence[int], files: Sequence[Path]) -> list[Measured]:
    """Run the files and the model on the same images.

    Raises:
        PipelineError: a file's logits are others.
    """
    import torch

    images = [example(size, batch) for batch in BATCHES]
    with torch.inference_mode():
        wanted = [model(one) for one in images]
        rows = [Measured("the model itself", None, None, _ms(lambda: model(images[0])), 0.0)]
    for file in files:
        start = time.perf_counter()
        exported = Exported(file)
        load_s = time.perf_counter() - start
        arrays = [one.numpy() for one in images]
        found = [torch.from_numpy(exported.logits(array)) for array in arrays]
        difference = max(map(_difference, found, wanted))
        if not difference < TOLERANCE:
            raise PipelineError(
                f"{file.name} computes something else than the model: its logits differ by"
                f" {difference:.1e} of the largest, and {TOLERANCE:.0e} is admitted",
                "Report this with the weights' model.json",
            )
        ms = _ms(lambda run=exported.logits, array=arrays[0]: run(array))  # type: ignore[misc]
        rows.append(Measured(file.name, file.stat().st_size / 1e6, load_s, ms, difference))
    return rows


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


def _tell(rows: Sequence[Measured], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "MB", "load, s", "image, ms", "difference", title=str(out))
    for row in rows:
        table.add_row(
            row.name,
            "" if row.megabytes is None else f"{row.megabytes:.1f}",
            "" if row.load_s is None else f"{row.load_s:.2f}",
            f"{row.ms:.1f}",
            f"{row.difference:.0e}" if row.difference else "",
        )
    Console().print(table)
    print(f"Run one: python {out / RUNNER} {out / rows[-1].name} photo.jpg")
