"""Prepare the data sets in their public layouts, with data cards and digests."""

from typing import Any

from pipelines.data import demo
from pipelines.run.stage import Stage, run_stage


def run(stage: Stage, _: Any) -> None:
    import ray

    from pipelines.run.launch import on_this_node
    from pipelines.run.reporting import track

    root = stage.output("data")
    render = ray.remote(demo.render_shard).options(scheduling_strategy=on_this_node())
    tasks = [render.remote(shard, str(root)) for shard in demo.shards(stage.section)]
    records = [record for shard in track(tasks, "prepare", "shards") for record in shard]
    manifests = demo.finish(stage.section, root, records)
    metrics: dict[str, Any] = {}
    for name, manifest in manifests.items():
        stage.tracker.log_dataset(name, manifest["digest"], root / name, "prepared")
        metrics |= {f"{name}_{split}": count for split, count in manifest["counts"].items()}
        metrics[f"{name}_digest"] = manifest["digest"][:12]
    stage.tracker.log_artifact(root / "cards")
    stage.write_metrics(metrics)


if __name__ == "__main__":
    run_stage("prepare", __doc__ or "", run)
