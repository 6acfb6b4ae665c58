"""Pack ImageNet, or any folder of classes that `prepare` verified, into tar shards.

An object store's address and keys come from the environment (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`), as for every tool that reads it.
"""

from pathlib import Path

from pipelines.data import pack, store
from pipelines.data.dataset import locate
from pipelines.data.manifest import MANIFEST, read_manifest
from pipelines.errors import PipelineError
from pipelines.params import load_params
from pipelines.paths import ROOT


def pack_imagenet(target: str, shard_mb: int, resize: int) -> None:
    """Write the shards.

    Args:
        target: a folder, or an fsspec URL.
        shard_mb: MiB of a shard.
        resize: shorter side in pixels; 0 keeps the images' bytes.

    Raises:
        PipelineError: there is no verified folder to pack.
    """
    params = load_params()
    place = locate(params, "imagenet")
    manifest = read_manifest(ROOT / "data/imagenet" / MANIFEST)
    if params.prepare.source != "public" or store.is_shards(place) or not manifest:
        raise PipelineError(
            "there is no verified folder to pack",
            "Set prepare.source=public and data.imagenet to ImageNet's folder or archives, then"
            " run `dvc repro prepare`",
        )
    target = target.rstrip("/")
    if not store.is_url(target):
        target = str(Path(target).expanduser().resolve())
    from pipelines.run import session

    with session.ray_session(trains=False):
        packed = pack.pack(
            Path(place),
            target,
            manifest,
            session.each,
            shard_bytes=shard_mb * 2**20,
            resize=resize,
        )
    counts = packed["counts"]
    print(
        f"{counts['train']} training and {counts['val']} validation images in"
        f" {store.public_url(target)}; to train on them: -S data.imagenet=..."
    )
