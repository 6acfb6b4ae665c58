"""Pack ImageNet (or any folder of classes that `prepare` verified) into tar shards.

    python -m pipelines.commands.pack s3://bucket/imagenet --resize 256
    dvc exp run -S data.imagenet=s3://bucket/imagenet

An object store's address and keys come from the environment (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`), as for every tool that reads it.
"""

import argparse
import sys
from pathlib import Path

from pipelines.data import dataset as places
from pipelines.data import images, pack
from pipelines.data.manifest import MANIFEST, read_manifest
from pipelines.errors import PipelineError
from pipelines.params import load_params
from pipelines.paths import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.commands.pack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", help="a folder, or an fsspec URL such as s3://bucket/imagenet")
    parser.add_argument("--shard-mb", type=int, default=256, help="MiB of a shard (default 256)")
    parser.add_argument(
        "--resize", type=int, default=0, help="shorter side in pixels; 0 keeps the images' bytes"
    )
    arguments = parser.parse_args()
    try:
        if arguments.shard_mb < 1 or arguments.resize < 0:
            raise PipelineError("--shard-mb is at least 1 and --resize at least 0")
        params = load_params()
        place = places.locate(params, "imagenet")
        manifest = read_manifest(ROOT / "data/imagenet" / MANIFEST)
        if params.prepare.source != "public" or images.is_shards(place) or not manifest:
            raise PipelineError(
                "there is no verified folder to pack: set prepare.source=public and data.imagenet"
                " to ImageNet's folder or archives, then run `dvc repro prepare`"
            )
        target = arguments.target.rstrip("/")
        if not images.is_url(target):
            target = str(Path(target).expanduser().resolve())
        from pipelines.run import fit as launch

        with launch.ray_session():
            packed = pack.pack(
                Path(place),
                target,
                manifest,
                launch.each,
                shard_bytes=arguments.shard_mb * 2**20,
                resize=arguments.resize,
            )
    except PipelineError as error:
        sys.exit(f"error: pack: {error}")
    counts = packed["counts"]
    print(
        f"{counts['train']} training and {counts['val']} validation images in"
        f" {images.public_url(target)}; to train on them: -S data.imagenet=..."
    )


if __name__ == "__main__":
    main()
