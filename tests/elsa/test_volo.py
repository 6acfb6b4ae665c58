"""ELSA-VOLO: what it is made of, and that it works as timm's VOLO does."""

from __future__ import annotations

import pickle

import pytest
import timm
import torch

import elsa

SMALL = {
    "layers": (1, 1, 1, 1),
    "embed_dims": (16, 32, 32, 32),
    "num_heads": (2, 4, 4, 4),
    "stem_hidden_dim": 8,
    "num_classes": 5,
    "img_size": 64,
}


def small(**kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("elsa_volo_d1", **(SMALL | kwargs)).eval()


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size", range(1, 6))
def test_only_the_outlookers_attention_differs_from_timms_volo(size):
    with torch.device("meta"):
        ours = timm.create_model(f"elsa_volo_d{size}")
        theirs = timm.create_model(f"volo_d{size}_224")
    layers = [module for module in ours.modules() if isinstance(module, elsa.ELSA)]
    assert len(layers) == {1: 4, 2: 6, 3: 8, 4: 8, 5: 12}[size]
    assert all((x.lam, x.gamma, x.kernel_size) == (1, 1, 5) for x in layers)

    def rest(model):
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        return {name: s for name, s in shapes.items() if not name.startswith("network.0.")}

    assert rest(ours) == rest(theirs)


def test_d1_has_the_papers_parameter_count():
    with torch.device("meta"):
        assert round(count(timm.create_model("elsa_volo_d1")) / 1e6) == 27


def test_forward_and_every_gradient():
    model = small(use_aux_head=False).train()
    out = model(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, 5)
    out.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_timms_interfaces():
    model = small()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    other = small(drop_path_rate=0.1)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x), model(x))
    maps = small(features_only=True)(x)
    assert [f.shape[1] for f in maps][-1] == 32
    model.reset_classifier(3)
    assert model(x).shape == (1, 3)
    with pytest.raises(NotImplementedError, match=r"torch\.compile"):
        torch.jit.script(model)


@pytest.mark.parametrize("kwargs", [{"lam": 0.5}, {"kernel_size": 4}, {"group_width": 0}])
def test_bad_arguments_are_named(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        small(**kwargs)
