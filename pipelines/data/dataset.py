"""Where a data set is, and whether it is the one that `prepare` drew or verified.

The images of a public data set stay where they are; DVC and the run identity hold only
`data/<name>/manifest.json`. So the same data in another place is the same run.
"""

from __future__ import annotations

from pathlib import Path

from pipelines.data.errors import DataError
from pipelines.data.manifest import MANIFEST, read_manifest
from pipelines.data.public import archives, verify
from pipelines.data.store import Dataset, is_url, public_url
from pipelines.params import Params
from pipelines.paths import ROOT, SHARED


def storage(params: Params) -> Path:
    """`data.storage`, absolute."""
    return (SHARED / Path(params.data.storage).expanduser()).resolve()


def given_place(params: Params, name: str) -> str:
    """`data.<name>`: an absolute path, or a URL.

    Raises:
        DataError: it is null, or a URL of a data set that can't be at one.
    """
    given = getattr(params.data, name)
    if given is None:
        raise DataError(
            f"data.{name} is null",
            "Set it to the folder of that data set or of its archives"
            f" (`-S data.{name}=...`), or take the demo's with `-S prepare.source=demo`",
        )
    if is_url(given):
        if name != "imagenet":
            raise DataError(
                f"data.{name}={public_url(given)} is a URL, which only ImageNet's shards can be at",
                "Set it to a folder that all nodes see",
            )
        return str(given).rstrip("/")
    return str((SHARED / Path(given).expanduser()).resolve())


def locate(params: Params, name: str) -> str:
    """Folder or URL from which the images of data set `name` are read."""
    if params.prepare.source == "demo":
        return str(ROOT / "data" / name)
    given = given_place(params, name)
    if not is_url(given) and archives.found(Path(given), name):
        return str(storage(params) / name)
    return given


def find_dataset(params: Params, name: str, num_classes: int) -> Dataset:
    """The data set that `prepare` verified.

    Args:
        num_classes: that it must have.

    Raises:
        DataError: it is not there, was changed, or has another number of classes.
    """
    place = locate(params, name)
    manifest = read_manifest(ROOT / "data" / name / MANIFEST)
    if manifest is None or manifest["dataset"] != name:
        raise DataError(
            f"data/{name} has no manifest of the data set in {public_url(place)}",
            "Run `dvc repro prepare`",
        )
    classes = tuple(manifest["classes"])
    if len(classes) != num_classes:
        raise DataError(
            f"{name} in {public_url(place)} has {len(classes)} classes, but num_classes is"
            f" {num_classes} in the parameters",
            f"Set num_classes to {len(classes)}",
        )
    if fault := verify.difference(place, manifest):
        drawn = params.prepare.source == "demo"
        raise DataError(
            f"{name} in {public_url(place)} is not what was {'drawn' if drawn else 'verified'}:"
            f" {fault}",
            "Draw it again with `dvc repro prepare`"
            if drawn
            else "Restore it, or verify it again with `dvc repro --force prepare`",
        )
    counts, skipped = dict(manifest["counts"]), tuple(manifest["skipped"])
    boxes_only = manifest.get("without_mask", 0)
    return Dataset(name, place, classes, counts, manifest["digest"], skipped, boxes_only)
