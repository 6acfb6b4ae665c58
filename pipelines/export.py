"""The trained models as files that run without this project, each compared with its model."""

from importlib.util import find_spec
from pathlib import Path

from pipelines.data.weights import read_description
from pipelines.errors import PipelineError
from pipelines.params import Params
from pipelines.paths import ROOT
from pipelines.run.stage import Stage, StageRun, run_stage
from pipelines.tasks import TASKS
from pipelines.tasks.task import require_operator

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


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


def write(weights: str, formats: tuple[str, ...], folder: str) -> dict[str, float] | str:
    """Export a folder of weights.

    Returns:
        what its files measure, by `<file>/<figure>`; of a model of a kind that is not exported the
        reason.

    Raises:
        PipelineError: the weights can't be read, or a file computes something else than the model.
    """
    import elsa
    from elsa.export import ExportError
    from elsa.predict import load_predictor
    from pipelines.results.export import write_export

    try:
        predictor = load_predictor(weights, "cpu")
    except (FileNotFoundError, elsa.CheckpointError) as error:
        raise PipelineError(str(error)) from None
    source = f"weights/{Path(weights).name}"
    Path(folder).mkdir(parents=True)
    try:
        rows = write_export(predictor, formats, None, source, Path(folder))
    except ExportError as error:
        for file in Path(folder).iterdir():
            file.unlink()
        (Path(folder) / "README.md").write_text(f"{source} is not exported: {error}\n")
        return str(error)
    figures = ("megabytes", "load_s", "ms", "difference")
    found = {f"{row.name}/{figure}": getattr(row, figure) for row in rows for figure in figures}
    return {key: value for key, value in found.items() if value is not None}


def run(stage: StageRun, stages: list[str]) -> None:
    import ray

    from pipelines.run.display import track
    from pipelines.run.session import on_this_node

    folder, here = stage.output("exports"), ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    # One at a time, each with all processors of this node: they measure latency.
    cpus = node["Resources"].get("CPU", 0)
    task = ray.remote(max_retries=0)(write)
    task = task.options(scheduling_strategy=on_this_node(), num_cpus=cpus)
    waiting = [
        task.remote(str(ROOT / "weights" / name), stage.section.formats, str(folder / name))
        for name in stages
    ]
    metrics: dict[str, float] = {}
    for name, found in zip(stages, track(waiting, "export", "models"), strict=True):
        if isinstance(found, str):
            print(f"export: weights/{name} is not exported: {found}", flush=True)
        else:
            metrics |= {f"{name}/{key}": value for key, value in found.items()}
    stage.tracker.log_artifact(folder)
    stage.write_metrics(metrics)


STAGE = Stage("export", __doc__ or "", run, check)

if __name__ == "__main__":
    run_stage(STAGE)
