"""A graph compiled by AOTInductor, for the CPU of the machine that writes it.

The operator is the compiled one, whose library then lies beside the file, or decomposed
into torch's own operators: slower, and torch alone runs it.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ops
from ops import library

from .export import ExportError, Graph
from .run_exported import cpu_features

__all__ = ["write_pt2"]


def write_pt2(
    graph: Graph, described: Mapping[str, Any], file: Path, decomposed: bool = False
) -> None:
    """Write a `.pt2` file, in minutes; with the compiled operator also its library beside it.

    Args:
        described: what a reader of the file must know; put into its metadata.
        decomposed: whether the operator is, too.

    Raises:
        ExportError: the model can't be exported or compiled, or the compiled operator is missing.
    """
    from torch._inductor import aoti_compile_and_package

    if not decomposed and not library.use_compiled("cpu", "auto"):
        raise ExportError(f"this file uses the compiled operator. {library.HOW_TO_BUILD}.")
    with ops.use_backend("reference" if decomposed else "compiled"):
        traced = graph.trace()
    targets = {str(node.target).split(".")[0] for node in traced.graph.nodes}
    about = {**described, "inputs": graph.inputs, "outputs": graph.outputs}
    about["needs"] = sorted(targets & {"elsa", "torchvision"})
    about["cpu"] = sorted(cpu_features())
    try:
        with warnings.catch_warnings():  # torch's own, about its own calls
            warnings.simplefilter("ignore", FutureWarning)
            aoti_compile_and_package(
                traced,
                package_path=str(file),
                inductor_configs={"aot_inductor.metadata": {"elsa": json.dumps(about)}},
            )
    except Exception as error:
        raise ExportError(f"torch can't compile the model: {error}") from error
    if "elsa" in about["needs"]:
        built = library.loaded_library()
        assert built is not None
        shutil.copy(built / library.LIBRARY_NAME, file.with_name(library.LIBRARY_NAME))
