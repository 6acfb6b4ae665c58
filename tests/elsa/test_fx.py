"""FX tracing, as timm's feature extraction does it."""

import pytest
import timm
import torch
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torchvision.models.feature_extraction import NodePathTracer

import elsa  # noqa: F401  registers the models


@pytest.mark.parametrize("operator", ["elsa", "window", "depthwise", "dynamic", "local"])
def test_fx_traces_the_model_as_timm_does(operator):
    torch.manual_seed(0)
    model = timm.create_model("elsa_swin_micro", operator=operator).eval()
    tracer = NodePathTracer(
        leaf_modules=list(get_notrace_modules()), autowrap_functions=list(get_notrace_functions())
    )
    traced = torch.fx.GraphModule(model, tracer.trace(model))
    for size in (56, 48):  # the graph holds no size
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)
