"""`elsa export`: a model as a file that other runtimes execute, compared with the model itself."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from elsa.export import ExportError
from pipelines.commands.predict import Weights, load
from pipelines.errors import PipelineError
from pipelines.results.export import RECORD, RUNNER, Measured, begin_export


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
            exported = begin_export(predictor, size, staged)
            exported.write(formats, given.place)
        except ExportError as error:
            raise PipelineError(f"{given.place}: {error}") from error
        rows = exported.compare(formats)
        shutil.rmtree(out, ignore_errors=True)
        staged.replace(out)
    _tell(rows, out)


def _tell(rows: Sequence[Measured], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "MB", "load, s", "image, ms", "difference", title=str(out))
    for row in rows:
        table.add_row(
            row.name,
            "" if row.megabytes is None else f"{row.megabytes:.1f}",
            "" if row.load_s is None else f"{row.load_s:.2f}",
            "" if row.ms is None else f"{row.ms:.1f}",
            "" if row.difference is None else f"{row.difference:.0e}",
        )
    Console().print(table)
    file = next(row.name for row in rows if row.name.startswith("model."))
    print(f"Run it: python {out / RUNNER} {out / file} photo.jpg")
