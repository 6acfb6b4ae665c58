"""ELSA in place of the window attention of timm's Swin."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock

import elsa

SWIN = {"img_size": 64, "embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 4)}


def swin(**kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    name = "swin_tiny_patch4_window7_224"
    return timm.create_model(name, num_classes=5, **(SWIN | kwargs)).eval()


def test_only_the_chosen_attention_is_replaced():
    model = swin()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blocks = [block for layer in model.layers for block in layer.blocks]
    assert elsa.replace_window_attention(model, stages=(0, 2), kernel_size=3) is model
    after = [block for layer in model.layers for block in layer.blocks]
    kept = [old is new for old, new in zip(blocks, after, strict=True)]
    assert kept == [False, True, False, False, True]
    for name, value in model.state_dict().items():
        if ".attn." not in name:
            assert torch.equal(value, before[name]), name
    attention = model.layers[2].blocks[1].attn
    assert (attention.num_heads, attention.kernel_size, attention.dim) == (4, 3, 64)


def test_it_trains_and_takes_any_size():
    model = elsa.replace_window_attention(swin(strict_img_size=False)).train()
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.set_input_size(img_size=(96, 64))
    assert model.eval()(torch.randn(1, 3, 96, 64)).shape == (1, 5)


def test_all_stages_replaced_is_elsa_swin_all_over():
    """Swapping every stage gives the network of ELSA-Swin with ELSA in all stages."""
    model = elsa.replace_window_attention(swin(), stages=range(4), group_width=8)
    ours = timm.create_model(
        "elsa_swin_tiny",
        num_classes=5,
        elsa_stages=(True,) * 4,
        **{key: SWIN[key] for key in ("embed_dim", "depths", "num_heads")},
        group_width=8,
    ).eval()
    ours.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), model(x))


def test_dtype_and_device_follow_the_model():
    model = elsa.replace_window_attention(swin().double(), stages=(1,))
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_what_cannot_be_replaced_is_refused_and_the_model_left_as_it_was():
    with pytest.raises(TypeError, match="ELSASwin"):
        elsa.replace_window_attention(timm.create_model("elsa_swin_micro"))
    model = swin()
    with pytest.raises(ValueError, match="no stage 4; allowed: 0 to 3"):
        elsa.replace_window_attention(model, stages=(0, 4))
    with pytest.raises(ValueError, match="kernel_size"):
        elsa.replace_window_attention(model, kernel_size=4)
    blocks = [block for layer in model.layers for block in layer.blocks]
    assert all(isinstance(block, SwinTransformerBlock) for block in blocks)
    elsa.replace_window_attention(model, stages=(1,))
    with pytest.raises(ValueError, match="stage 1 has no window attention"):
        elsa.replace_window_attention(model, stages=(1,))
