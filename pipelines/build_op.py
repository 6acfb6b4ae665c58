"""Compile the ELSA operator on every node that will run it, and check it against the reference."""

from typing import Any

from pipelines.errors import PipelineError
from pipelines.paths import ROOT
from pipelines.run.stage import Stage, StageRun, run_stage


def build_and_check(folder: str, tolerance: float) -> tuple[dict[str, Any], dict[str, float]]:
    """Build into `folder` on this node, load and check; the build record and the largest errors.

    Raises:
        PipelineError: no compiler, a failed build, or float32 errors above `tolerance`.
    """
    from ops.build import BuildError, build_checked

    try:
        return build_checked(folder, tolerance)
    except BuildError as error:
        raise PipelineError(str(error)) from None


def run(stage: StageRun, _: None) -> None:
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


STAGE = Stage("build_op", __doc__ or "", run)

if __name__ == "__main__":
    run_stage(STAGE)
