"""Keep an installed package that was compiled here as a wheel, for the next checkout.

    .venv/bin/python pipelines/cluster/keep_wheel.py onedl-mmcv ~/.cache/elsa/wheels/...

mmcv is published as source, and uv compiles it anew, for minutes, whenever the registry's answer
changed. `make setup` looks for the wheel first.
"""

import os
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

LEFT_OUT = ("INSTALLER", "REQUESTED", "direct_url.json", "uv_build.json", "uv_cache.json")
"""What an installer notes beside a wheel's own files."""


def keep(name: str, folder: Path) -> Path:
    """Write the wheel of an installed package, if it is not there yet; its path.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    package = distribution(name)
    tags = (package.read_text("WHEEL") or "").splitlines()
    tag = next(line.partition(": ")[2] for line in tags if line.startswith("Tag: "))
    target = folder / f"{name.replace('-', '_')}-{package.version}-{tag}.whl"
    if target.is_file():
        return target
    files = [
        file
        for file in package.files or []
        if file.name not in LEFT_OUT and file.suffix != ".pyc" and ".." not in file.parts
    ]
    folder.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as wheel:
            for file in files:
                content = Path(str(file.locate())).read_bytes()
                if file.name == "RECORD":
                    kept = {str(one) for one in files}
                    rows = content.decode().splitlines(keepends=True)
                    content = "".join(r for r in rows if r.split(",")[0] in kept).encode()
                wheel.writestr(str(file), content)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    return target


if __name__ == "__main__":
    try:
        keep(sys.argv[1], Path(sys.argv[2]))
    except (PackageNotFoundError, OSError) as error:
        print(f"the wheel is not kept, the next checkout compiles anew: {error}", file=sys.stderr)
