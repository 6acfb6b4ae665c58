"""The trained models as files that run without this project, each compared with its model."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.data.weights import read_description
from pipelines.errors import PipelineError
from pipelines.params import Params
from pipelines.paths import ROOT
from pipelines.run.stage import Stage, StageRun, run_stage
from pipelines.tasks import TASKS
from pipelines.tasks.task import require_operator

if TYPE_CHECKING:
    from pipelines.results.export import Export

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LIBRARIES = {"detect": "mmdet.apis", "segment": "mmseg.apis"}
"""What loads the weights of a task."""


def check(params: Params) -> list[str]:
    """The training stages whose weights are exported, after checking these."""
    require_operator()
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise PipelineError(
            f"{', '.join(missing)} is missing, which writes and runs the files",
            "Install the extra `export`; `make setup` does",
        )
    stages = [task.stage for task in TASKS.values() if task.name in params.tasks]
    for stage in stages:
        read_description(ROOT / "weights" / stage)
    return stages


def preload(params: Params) -> tuple[str, ...]:
    """Nothing where a GPU trains: that processes with one can be forked was never seen."""
    if params.scaling.use_gpu:
        return ()
    libraries = [LIBRARIES[name] for name in params.tasks if name in LIBRARIES]
    return ("pipelines.results.export", *PACKAGES, *libraries)


def write(weights: str, formats: tuple[str, ...], folder: str) -> str | None:
    """Export a folder of weights. Returns, of a model of a kind that is not exported, the reason.

    Raises:
        PipelineError: the weights can't be read.
    """
    from elsa.export import ExportError

    source = f"weights/{Path(weights).name}"
    Path(folder).mkdir(parents=True)
    try:
        _begin(weights, folder).write(formats, source)
    except ExportError as error:
        for file in Path(folder).iterdir():
            file.unlink()
        (Path(folder) / "README.md").write_text(f"{source} is not exported: {error}\n")
        return str(error)
    return None


def measure(weights: str, formats: tuple[str, ...], folder: str, cpus: int) -> dict[str, float]:
    """What the files that `write` wrote measure, by `<file>/<figure>`.

    Raises:
        PipelineError: a file computes something else than the model.
    """
    import torch

    torch.set_num_threads(cpus)
    rows = _begin(weights, folder).compare(formats)
    figures = ("megabytes", "load_s", "ms", "difference")
    found = {f"{row.name}/{figure}": getattr(row, figure) for row in rows for figure in figures}
    return {key: value for key, value in found.items() if value is not None}


def _begin(weights: str, folder: str) -> "Export":
    import elsa
    from elsa.predict import load_predictor
    from pipelines.results.export import begin_export

    try:
        predictor = load_predictor(weights, "cpu")
    except (FileNotFoundError, elsa.CheckpointError) as error:
        raise PipelineError(str(error)) from None
    return begin_export(predictor, None, Path(folder))


def run(stage: StageRun, stages: list[str]) -> None:
    import ray

    from pipelines.run.display import track
    from pipelines.run.session import on_this_node

    folder, here = stage.output("exports"), ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    cpus = int(node["Resources"].get("CPU", 0))
    options = {"scheduling_strategy": on_this_node(), "max_retries": 0}
    work = {
        name: (str(ROOT / "weights" / name), stage.section.formats, str(folder / name))
        for name in stages
    }
    begin = ray.remote(write).options(num_cpus=min(cpus, 1), **options)
    writing = [begin.remote(*one) for one in work.values()]
    reasons = dict(zip(stages, track(writing, "export", "models written"), strict=True))
    for name, reason in reasons.items():
        if reason:
            print(f"export: weights/{name} is not exported: {reason}", flush=True)
    # One at a time, each with all processors of this node: they measure latency.
    end = ray.remote(measure).options(num_cpus=cpus, **options)
    written = [name for name in stages if not reasons[name]]
    measuring = [end.remote(*work[name], cpus or 1) for name in written]
    metrics: dict[str, float] = {}
    for name, found in zip(written, track(measuring, "export", "models compared"), strict=True):
        metrics |= {f"{name}/{key}": value for key, value in found.items()}
    stage.tracker.log_artifact(folder)
    stage.write_metrics(metrics)


STAGE = Stage("export", __doc__ or "", run, check, preload=preload)

if __name__ == "__main__":
    run_stage(STAGE)
