"""Prepare the data sets in their public layouts, with data cards and digests.

`prepare.source: demo` draws them into `data/`. `public` verifies those of section `data` where
they are (archives are unpacked first) and leaves only their manifests in `data/`.
"""

from pathlib import Path
from typing import Any

from pipelines.data import card, images
from pipelines.data import dataset as places
from pipelines.data.checks import DataError
from pipelines.data.demo import draw as demo
from pipelines.data.manifest import MANIFEST, write_json
from pipelines.data.public import archives, verify
from pipelines.params import Params
from pipelines.run.stage import Stage, run_stage


def check(params: Params) -> None:
    if params.prepare.source == "public" and not any(
        getattr(params.data, name) for name in demo.DATASETS
    ):
        raise DataError(
            "prepare.source is public, but data.imagenet, data.coco and data.ade20k are null: set"
            " those you have to their folders (`-S data.imagenet=...`), or take the demo's data"
            " sets with `-S prepare.source=demo`"
        )


def run(stage: Stage, _: Any) -> None:
    root = stage.output("data")
    make = draw if stage.section.source == "demo" else take
    metrics: dict[str, Any] = {}
    for name, manifest in make(stage, root).items():
        stage.tracker.log_dataset(name, manifest["digest"], root / name, "prepared")
        metrics |= {f"{name}_{split}": count for split, count in manifest["counts"].items()}
        metrics[f"{name}_digest"] = manifest["digest"][:12]
        if manifest.get("skipped"):
            metrics[f"{name}_skipped"] = len(manifest["skipped"])
    stage.tracker.log_artifact(root / "cards")
    stage.write_metrics(metrics)


def draw(stage: Stage, root: Path) -> dict[str, dict[str, Any]]:
    """Draw the demo's data sets; their manifests."""
    import ray

    from pipelines.run.display import track
    from pipelines.run.fit import on_this_node

    render = ray.remote(demo.render_shard).options(scheduling_strategy=on_this_node())
    tasks = [render.remote(shard, str(root)) for shard in demo.shards(stage.section)]
    records = [record for shard in track(tasks, "prepare", "shards") for record in shard]
    return demo.finish(stage.section, root, records)


def take(stage: Stage, root: Path) -> dict[str, dict[str, Any]]:
    """Unpack and verify the public data sets that are there; their manifests."""
    from pipelines.run.fit import each

    manifests = {}
    (root / "cards").mkdir(parents=True)
    for name in demo.DATASETS:
        if getattr(stage.params.data, name) is None:
            write_json(root / name / MANIFEST, {"dataset": name, "absent": True}, indent=1)
            continue
        manifests[name] = take_one(stage.params, name, each)
        write_json(root / name / MANIFEST, manifests[name], indent=1)
        card.write_public_card(root, name, manifests[name], places.locate(stage.params, name))
    return manifests


def take_one(params: Params, name: str, each: verify.Each) -> dict[str, Any]:
    """The manifest of data set `name`, unpacked and verified.

    Raises:
        DataError: what is wrong with it.
    """
    given, storage = places.given_place(params, name), places.storage(params)
    unpacked = not images.is_url(given) and archives.found(Path(given), name)
    place = places.locate(params, name)
    if unpacked:
        archives.unpack(Path(given), name, Path(place), each)
    section = params.prepare
    expected = getattr(section, name)
    manifest = verify.verify(name, place, section, expected, storage, each)
    if unpacked:
        # The next time, and for whoever else is given this folder, its sizes are enough.
        write_json(Path(place) / MANIFEST, manifest, indent=1)
    return manifest


if __name__ == "__main__":
    run_stage("prepare", __doc__ or "", run, check)
