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
from elsa.export import Graph, example, image_graph
from elsa.export_detector import detector_graphs
from elsa.export_onnx import write_onnx
from elsa.export_pt2 import write_pt2
from elsa.predict import Detector, Predictor
from elsa.run_exported import Exported
from pipelines.data.files import write_json
from pipelines.errors import PipelineError

if TYPE_CHECKING:
    from torch import Tensor

FORMATS: dict[str, tuple[str, Callable[..., None]]] = {
    "onnx": ("onnx", write_onnx),
    "pt2": ("pt2", write_pt2),
    "pt2-decomposed": ("decomposed.pt2", partial(write_pt2, decomposed=True)),
}
"""By the format its files' suffix, and what writes one."""
RECORD, RUNNER = "export.json", "run.py"
TOLERANCE = 1e-4
"""Largest difference of results, as a share of the largest of them."""
BATCHES = (1, 3)
"""What a file of images is compared with the model on: the batch is its to vary."""


@dataclass(frozen=True)
class Measured:
    """What a format is like beside the model."""

    name: str
    """Its first file; `eager` is the model in torch."""
    megabytes: float | None
    """Of all its files, without the operator's library."""
    load_s: float | None
    ms: float
    """Of an image, alone in its batch; of a detector with what `run.py` does between its graphs."""
    difference: float | None
    """Largest of results, over the largest of them, in any of its files."""


@dataclass(frozen=True)
class Export:
    """A model as graphs, in a folder of files."""

    predictor: Predictor
    graphs: Sequence[Graph]
    described: dict[str, Any]
    """What a reader of the files must know."""
    folder: Path

    def write(self, formats: Sequence[str], source: str) -> None:
        """Write the model in each format (of `FORMATS`), what runs it, and a record.

        Args:
            source: what the record says that the weights are.

        Raises:
            ExportError: the model can't be exported.
        """
        for kind in formats:
            _, write = FORMATS[kind]
            for graph, file in zip(self.graphs, self._files(kind).values(), strict=True):
                minutes = " (about a minute)" if kind.startswith("pt2") else ""
                print(f"writing {file.name}{minutes}", flush=True)
                write(graph, self.described, file)
        shutil.copy(elsa.run_exported.__file__, self.folder / RUNNER)
        write_json(self.folder / RECORD, {**self.described, "weights": source}, indent=1)

    def compare(self, formats: Sequence[str]) -> list[Measured]:
        """The model itself, then each format as it was written.

        Raises:
            PipelineError: a file computes something else than the model.
        """
        eager = _eager(self.predictor, self.graphs[0], self.described)
        rows = [Measured("eager", None, None, _ms(eager), None)]
        return rows + [_written(self._files(kind), self.graphs, self.described) for kind in formats]

    def _files(self, kind: str) -> dict[str, Path]:
        """By the graph's name."""
        suffix, _ = FORMATS[kind]
        return {graph.name: self.folder / f"{graph.name}.{suffix}" for graph in self.graphs}


def begin_export(predictor: Predictor, size: tuple[int, int] | None, folder: Path) -> Export:
    """The model as graphs, not yet written.

    Args:
        size: (H, W) of the images; None takes that of the model's evaluation.

    Raises:
        ExportError: the model can't be exported.
    """
    if isinstance(predictor, Detector):
        graphs, described = detector_graphs(predictor, size)
    else:
        graphs, described = image_graph(predictor, size)
    return Export(predictor, graphs, described, folder)


def _eager(predictor: Predictor, graph: Graph, described: dict[str, Any]) -> Callable[[], object]:
    """What the model does with an image."""
    import torch

    if isinstance(predictor, Detector):
        return partial(predictor, _picture(described))
    return torch.inference_mode()(partial(graph.module, example(described["size"], 1)))


def _picture(described: dict[str, Any]) -> Any:
    return example(described["size"], 1)[0].permute(1, 2, 0).byte().numpy()


def _written(
    files: dict[str, Path], graphs: Sequence[Graph], described: dict[str, Any]
) -> Measured:
    """A format's files, each compared with the model."""
    from PIL import Image

    start = time.perf_counter()
    exported = Exported(files["model"])
    load_s = time.perf_counter() - start
    difference = max(_difference(exported, graph, described, files) for graph in graphs)
    if exported.task == "detect":
        picture = Image.fromarray(_picture(described))
        ms = _ms(partial(exported.find, picture))
    else:
        ms = _ms(partial(exported.logits, example(described["size"], 1).numpy()))
    megabytes = sum(file.stat().st_size for file in files.values()) / 1e6
    return Measured(files["model"].name, megabytes, load_s, ms, difference)


def _difference(
    exported: Exported, graph: Graph, described: dict[str, Any], files: dict[str, Path]
) -> float:
    """Of a graph's file from its module.

    Raises:
        PipelineError: it is more than rounding.
    """
    import torch

    cases = [graph.arguments]
    if graph.inputs == ("images",):
        cases = [(example(described["size"], batch),) for batch in BATCHES]
    found = []
    for arguments in cases:
        with torch.inference_mode():
            wanted = graph.module(*arguments)
        wanted = [wanted] if torch.is_tensor(wanted) else wanted
        written = exported.run(graph.name, *(one.numpy() for one in arguments))
        pairs = zip(map(torch.from_numpy, written), wanted, strict=True)
        found += [_relative(*pair) for pair in pairs]
    for difference in found:
        if not difference < TOLERANCE:  # one that is no number, too
            raise PipelineError(
                f"{files[graph.name].name} computes something else than the model: its results"
                f" differ by {difference:.1e} of the largest, and {TOLERANCE:.0e} is admitted",
                "Report this with the weights' model.json",
            )
    return max(found)


def _relative(found: "Tensor", wanted: "Tensor") -> float:
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
