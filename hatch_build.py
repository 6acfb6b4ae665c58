"""Puts a compiled operator into the wheel where ELSA_PREBUILT names its folder (`make wheel`)."""

import json
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FILES = ("elsa_ops.so", "build.json")


class PrebuiltOperator(BuildHookInterface):
    """`ops/prebuilt` in the wheel, and the platform in its name. It is built without torch."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        named = os.environ.get("ELSA_PREBUILT")
        if not named:
            return
        folder = Path(self.root) / named
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise SystemExit(
                f"error: ELSA_PREBUILT={named} has no {missing[0]}. Run `python -m ops.build`"
            )
        sys.path.insert(0, self.root)
        from ops.sources import file_digest, source_digest

        record = json.loads((folder / "build.json").read_text())
        if record["cuda"]:
            raise SystemExit(
                f"error: the operator in {named} has CUDA kernels, which fit one torch alone. "
                "Build it for the CPU: CUDA_VISIBLE_DEVICES= python -m ops.build"
            )
        made_of = (record["source_sha256"], record["library_sha256"])
        if made_of != (source_digest(), file_digest(folder / "elsa_ops.so")):
            raise SystemExit(
                f"error: the operator in {named} is not that of these sources. Run "
                "`python -m ops.build`"
            )
        for name in FILES:
            build_data["force_include"][str(folder / name)] = f"ops/prebuilt/{name}"
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
