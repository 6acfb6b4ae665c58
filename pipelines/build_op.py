"""Compile the ELSA operator on every node that will run it, and check it against the reference."""

from typing import Any

from pipelines.errors import PipelineError
from pipelines.paths import ROOT
from pipelines.run.stage import Stage, run_stage


def build_and_check(folder: str, tolerance: float) -> tuple[dict[str, Any], dict[str, float]]:
    """Build into `folder` on this node, load and check; the build record and the largest errors.

    Raises:
        PipelineError: no compiler, a failed build, or float32 errors above `tolerance`.
    """
    from ops import load_library
    from ops.build import BuildError, build, check, devices, withdraw

    try:
        record = build(folder)
    except BuildError as error:
        raise PipelineError(str(error)) from None
    try:
        load_library(folder)
        errors = {
            f"{device}/{key.replace(' ', '/')}": value
            for device in devices()
            for key, value in check(device).items()
        }
        largest = max(value for key, value in errors.items() if "/float32/" in key)
        if largest > tolerance:
            raise PipelineError(
                f"the float32 operator differs from the reference by {largest:.3g}, more than"
                f" build_op.tolerance={tolerance:.3g}"
            )
    except BaseException:  # an interrupt too: nobody checked this library
        withdraw(folder)
        raise
    return record, errors


def check_library() -> None:
    """Refuse a library that this machine's torch or processor can't use.

    Raises:
        PipelineError: not built, or built for something else; says what differs.
    """
    from ops import StaleLibraryError
    from ops.library import verify

    try:
        verify(ROOT / "build/op")
    except (FileNotFoundError, StaleLibraryError) as error:
        raise PipelineError(str(error)) from None


def run(stage: Stage, _: Any) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from pipelines.run.display import track

    here = ray.get_runtime_context().get_node_id()
    staged, elsewhere = stage.output("build/op"), ROOT / "build/op"
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and "CPU" in node["Resources"]]
    task = ray.remote(max_retries=0)(build_and_check)
    tasks = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            str(staged if node == here else elsewhere), stage.section.tolerance
        )
        for node in nodes
    ]
    results = dict(zip(nodes, track(tasks, "build_op", "nodes"), strict=True))
    record, errors = results[here]
    stage.tracker.log_dict(record, "build.json")
    stage.tracker.log_artifact(staged / "build.json")
    stage.write_metrics({"nodes": len(nodes), **errors})


if __name__ == "__main__":
    run_stage("build_op", __doc__ or "", run)
