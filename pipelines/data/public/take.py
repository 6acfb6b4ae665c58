"""One public data set: unpacked where it is in archives, and verified."""

from pathlib import Path
from typing import Any

from pipelines.data import store
from pipelines.data.dataset import given_place, locate, storage
from pipelines.data.files import write_json
from pipelines.data.manifest import MANIFEST
from pipelines.data.public import archives, verify
from pipelines.params import Params


def take_one(params: Params, name: str, each: verify.Each) -> dict[str, Any]:
    """The manifest of data set `name`, unpacked and verified.

    Raises:
        DataError: what is wrong with it.
    """
    given = given_place(params, name)
    unpacked = not store.is_url(given) and archives.found(Path(given), name)
    place = locate(params, name)
    if unpacked:
        archives.unpack(Path(given), name, Path(place), each)
    expected = getattr(params.prepare, name)
    manifest = verify.verify(name, place, params.prepare, expected, storage(params), each)
    if unpacked:
        # The next time, and for whoever else is given this folder, its sizes are enough.
        write_json(Path(place) / MANIFEST, manifest, indent=1)
    return manifest
