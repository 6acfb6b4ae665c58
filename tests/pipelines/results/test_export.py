"""An exported file is compared with its model before it is kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elsa.export import Graph, any_batch, example
from pipelines.errors import PipelineError
from pipelines.results import export


class Runs:
    """An exported file whose results are off by something."""

    def __init__(self, off: float) -> None:
        self.off = off

    def run(self, graph: str, images: Any) -> list[Any]:
        return [images * np.float32(1 + self.off)]


@pytest.mark.parametrize(("off", "kept"), [(1e-6, True), (1e-3, False), (float("nan"), False)])
def test_what_computes_something_else_is_not_kept(off: float, kept: bool) -> None:
    images = (example((4, 4)),)
    graph = Graph("model", torch.nn.Identity(), images, any_batch(), ("images",), ("logits",))
    arguments: Any = (Runs(off), graph, {"size": [4, 4]}, {"model": Path("model.onnx")})
    if kept:
        assert 0 < export._difference(*arguments) < export.TOLERANCE
    else:
        with pytest.raises(PipelineError, match=r"model\.onnx computes something else"):
            export._difference(*arguments)
