"""Registered models: counts, shapes, gradients, timm's contracts (issue 4)."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

import elsa
from elsa.counterparts import DynamicFilter, LocalAttention
from elsa.swin import WindowBlock

COUNTS = {
    "elsa_swin_tiny": 29_140_978,
    "elsa_swin_small": 52_874_626,
    "elsa_swin_base": 92_682_464,
}
DENSE_COUNTS = {"elsa_swin_tiny": 28_373_322, "elsa_swin_small": 52_106_970}
SMALL = {
    "embed_dim": 16,
    "depths": (1, 1, 1, 2),
    "num_heads": (2, 2, 4, 4),
    "kernel_size": 3,
    "group_width": 2,
    "window_size": 2,
    "num_classes": 5,
    "drop_path_rate": 0.0,
}


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def small(**kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("elsa_swin_micro", **(SMALL | kwargs)).eval()


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    with torch.device("meta"):
        assert count(timm.create_model(name)) == COUNTS[name]


@pytest.mark.parametrize("name", DENSE_COUNTS)
def test_dense_parameter_counts(name):
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True, out_norm=True)
    assert count(model) == DENSE_COUNTS[name]


def test_every_model_is_registered():
    assert {*COUNTS, "elsa_swin_micro"} | {f"elsa_volo_d{i}" for i in range(1, 6)} == set(
        timm.list_models("elsa_*")
    )


@pytest.mark.parametrize("name", [*timm.list_models("elsa_swin_*"), "elsa_volo_d1"])
def test_timms_contract(name, compiled_library):
    """What timm's scripts take for granted of every model, at its own size, on meta tensors."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        cfg = model.pretrained_cfg
        x = torch.empty(2, *cfg["input_size"])
        features = timm.create_model(name, features_only=True)
    weights = model.state_dict()
    classifiers = cfg["classifier"]
    for layer in (classifiers,) if isinstance(classifiers, str) else classifiers:
        assert f"{layer}.weight" in weights
    assert f"{cfg['first_conv']}.weight" in weights
    assert model.num_classes == model.get_classifier().out_features == cfg["num_classes"]

    final = model.forward_features(x)
    assert final.shape[-1] == model.num_features
    if cfg["pool_size"]:
        assert final.shape[1:3] == cfg["pool_size"]
    assert model.forward_head(final).shape == (2, cfg["num_classes"])
    assert model.forward_head(final, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model.forward_head(final).shape == (2, model.num_features)

    height, width = x.shape[-2:]
    info = features.feature_info
    for y, channels, reduction in zip(features(x), info.channels(), info.reduction(), strict=True):
        assert y.shape == (2, channels, -(-height // reduction), -(-width // reduction))


@pytest.mark.parametrize("name", ["elsa_swin_micro", "elsa_swin_tiny"])
def test_forward_and_every_gradient(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).train()
    out = model(torch.randn(2, 3, 64, 64))
    assert out.shape == (2, 7)
    assert out.isfinite().all()
    out.square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize(("lam", "gamma"), [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0.5)])
def test_every_ghost_setting_trains(lam, gamma):
    model = small(lam=lam, gamma=gamma).train()
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("size", [(57, 83), (31, 64), (4, 4), (5, 130), (64, 64)])
def test_any_image_size(size):
    model = small()
    assert model(torch.randn(2, 3, *size)).isfinite().all()
    maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    height, width = size
    for features, info in zip(maps, model.feature_info, strict=True):
        rows, cols = (-(-side // info["reduction"]) for side in (height, width))
        assert features.shape == (1, info["num_chs"], rows, cols)


def test_size_may_change_between_calls():
    model = small()
    a, b = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 40, 88)
    first = model(a)
    model(b)
    torch.testing.assert_close(model(a), first, rtol=0, atol=0)


def test_img_size_does_not_change_the_model():
    x = torch.randn(1, 3, 48, 80)
    torch.testing.assert_close(small(img_size=224)(x), small(img_size=(48, 80))(x))


@pytest.mark.parametrize("out_norm", [False, True])
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (0, 2), (-1,)])
def test_features_only(out_indices, out_norm):
    model = small(features_only=True, out_indices=out_indices, out_norm=out_norm)
    maps = model(torch.randn(2, 3, 64, 96))
    chosen = [i % 4 for i in out_indices]
    assert model.feature_info.channels() == [16 * 2**i for i in chosen]
    assert model.feature_info.reduction() == [4 * 2**i for i in chosen]
    for i, features in zip(chosen, maps, strict=True):
        assert features.shape == (2, 16 * 2**i, 16 // 2**i, 24 // 2**i)
        assert features.is_contiguous()
    sum(f.square().mean() for f in maps).backward()
    assert all(p.grad is not None for p in model.parameters())  # nothing is left unused


def test_out_norm_normalises_each_map():
    plain = small(features_only=True)
    normed = small(features_only=True, out_norm=True)
    normed.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    for raw, features in zip(plain(x), normed(x), strict=True):
        expected = torch.nn.functional.layer_norm(raw.permute(0, 2, 3, 1), raw.shape[1:2])
        torch.testing.assert_close(features, expected.permute(0, 3, 1, 2))


def test_forward_intermediates():
    model = small()
    x = torch.randn(2, 3, 64, 64)
    final, maps = model.forward_intermediates(x)
    assert len(maps) == 4
    torch.testing.assert_close(final, model.forward_features(x))
    torch.testing.assert_close(model.forward_head(final), model(x))
    assert model.forward_head(final, pre_logits=True).shape == (2, model.num_features)

    last = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(last[0], final.permute(0, 3, 1, 2))
    early, picked = model.forward_intermediates(
        x, indices=[0, 1], stop_early=True, output_fmt="NHWC"
    )
    torch.testing.assert_close(early, picked[-1])
    torch.testing.assert_close(picked[1].permute(0, 3, 1, 2), maps[1])
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_prune_intermediate_layers():
    model = small()
    x = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    assert model.prune_intermediate_layers([1]) == [1]
    assert len(model.layers) == 2
    torch.testing.assert_close(model(x), expected[0].permute(0, 2, 3, 1))


def test_reset_classifier():
    model = small()
    x = torch.randn(2, 3, 32, 32)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), torch.nn.Identity)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 1, 1, model.num_features)
    model.reset_classifier(4, "max")
    assert model(x).shape == (2, 4)
    model.bfloat16().reset_classifier(2)  # the new layer follows the model
    assert model(x.bfloat16()).dtype == torch.bfloat16
    assert small(in_chans=1)(x[:, :1]).shape == (2, 5)


def test_copies_agree(tmp_path):
    model = small()
    x = torch.randn(1, 3, 40, 40)
    expected = model(x)
    twin = small(drop_path_rate=0.3)
    torch.nn.init.ones_(twin.head.fc.weight)
    twin.load_state_dict(model.state_dict())
    for other in (twin, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    pyramid = small(features_only=True, out_norm=True)
    for other in (copy.deepcopy(pyramid), pickle.loads(pickle.dumps(pyramid))):
        torch.testing.assert_close(other(x), pyramid(x), rtol=0, atol=0)


def test_weight_decay_groups():
    model = small()
    skip, decay = (
        {id(p) for p in group["params"]}
        for group in param_groups_weight_decay(
            model, 0.05, no_weight_decay_list=model.no_weight_decay()
        )
    )
    for name, parameter in model.named_parameters():
        # The ghost heads and the position tables are decayed, as in the published runs.
        assert (id(parameter) in decay) == (parameter.ndim > 1), name
        assert (id(parameter) in skip) == (parameter.ndim <= 1), name
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    assert len(coarse) == 1 + 4 + 1  # stem, stages, norm and head
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert len({g["lr_scale"] for g in groups}) > 3


def test_grad_checkpointing_gives_the_same_gradients():
    model = small().train()
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_drop_path_rises_to_its_rate():
    model = small(drop_path_rate=0.4, depths=(2, 2, 2, 2))
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for s in model.layers for b in s.blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.4, 8))


def test_channels_last_and_autocast():
    model = small()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    torch.testing.assert_close(
        model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)),
        expected,
        rtol=1e-4,
        atol=1e-5,
    )
    with torch.autocast("cpu", torch.bfloat16):
        half = model.train()(x)
    half.float().square().mean().backward()
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.05)
    assert model.bfloat16().eval()(x.bfloat16()).dtype == torch.bfloat16


def test_compile_fullgraph():
    torch._dynamo.reset()
    model = small(elsa_stages=(True, False, False, False))  # both kinds, shifted and not
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for size in (64, 40):  # the second size adds padding and another mask
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_export():
    model = small()
    x = torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_scripting_is_refused():
    with pytest.raises(NotImplementedError, match=r"torch\.export"):
        torch.jit.script(small())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": (3, 2, 4, 4)}, "num_heads must divide"),
        ({"num_heads": (2, 2, 4, 5)}, "num_heads must divide"),
        ({"num_heads": (2, 2, 4)}, "num_heads needs one entry per stage"),
        ({"elsa_stages": (True,)}, "elsa_stages needs one entry per stage"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"group_width": 0}, "group_width must be at least 1"),
        ({"window_size": 0}, "window_size must be at least 1"),
        ({"lam": 0.5}, "lam must be a whole number"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


def test_image_smaller_than_a_patch():
    with pytest.raises(ValueError, match=r"patch_size.*got 3 x 64"):
        small()(torch.randn(1, 3, 3, 64))


def test_all_stages_can_be_either_kind():
    x = torch.randn(1, 3, 64, 64)
    for kind in (True, False):
        model = small(elsa_stages=(kind,) * 4)
        assert model(x).isfinite().all()
        has_elsa = any(isinstance(m, elsa.ELSA) for m in model.modules())
        assert has_elsa == kind


@pytest.mark.parametrize("operator", ["window", "depthwise", "dynamic", "local"])
def test_counterparts_of_elsa_train_in_the_same_swin(operator):
    model = small(operator=operator, kernel_size=5).train()
    model(torch.randn(2, 3, 52, 60)).square().sum().backward()  # maps that are no whole windows
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    stages = [type(stage.blocks[0]) for stage in model.layers]
    assert stages == [WindowBlock if operator == "window" else elsa.ELSABlock] * 3 + [WindowBlock]


def test_dynamic_filter_is_the_decoupled_one():
    """Equation 3 of arXiv 2104.14107, pixel by pixel, and its filters' means and deviations."""
    torch.manual_seed(0)
    layer = DynamicFilter(6, 2, kernel_size=3).double()
    with torch.no_grad():
        for norm in (layer.attn_norm, layer.channel_norm):
            norm.weight.uniform_(0.5, 2)
            norm.bias.uniform_(-1, 1)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    v = layer.pre_proj(x.permute(0, 3, 1, 2))
    spatial = layer.attn(v).unflatten(1, (2, 9))
    channel = layer.channel(v.mean((2, 3))).unflatten(1, (6, 9))
    filters = []
    for raw, norm in ((spatial, layer.attn_norm), (channel, layer.channel_norm)):
        scale, shift = (t.view(1, -1, *[1] * (raw.dim() - 2)) for t in (norm.weight, norm.bias))
        normed = torch.nn.functional.layer_norm(raw.movedim(2, -1), (9,), eps=0).movedim(-1, 2)
        normed = normed * (8 / 9) ** 0.5 * scale + shift  # the deviation of a sample
        torch.testing.assert_close(normed.std(2), scale.squeeze(2).expand_as(normed.std(2)))
        torch.testing.assert_close(normed.mean(2), shift.squeeze(2).expand_as(normed.mean(2)))
        filters.append(normed)
    spatial, channel = filters
    out = torch.zeros_like(v)
    for b, c, y, z in torch.cartesian_prod(*(torch.arange(n) for n in v.shape)).tolist():
        for i in range(9):
            row, column = y + i // 3 - 1, z + i % 3 - 1
            if 0 <= row < 4 and 0 <= column < 5:
                weight = spatial[b, c // 3, i, y, z] * channel[b, c, i]
                out[b, c, y, z] += weight * v[b, c, row, column]
    torch.testing.assert_close(
        layer(x), layer.post_proj(out.permute(0, 2, 3, 1)), rtol=1e-5, atol=1e-5
    )


def test_local_attention_is_attention_masked_to_the_neighbourhood():
    torch.manual_seed(0)
    layer, (height, width) = LocalAttention(8, 2, kernel_size=3).double(), (4, 5)
    x = torch.randn(2, height, width, 8, dtype=torch.float64)
    q, k, v = (
        t.flatten(2).unflatten(1, (2, 4)).transpose(2, 3)  # (B, G, H*W, C/G)
        for t in layer.pre_proj(x.permute(0, 3, 1, 2)).chunk(3, dim=1)
    )
    y, z = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    dy, dx = y[None] - y[:, None], z[None] - z[:, None]  # key minus query
    near = (dy.abs() <= 1) & (dx.abs() <= 1)
    index = ((dy + 1) * 3 + dx + 1).clamp(0, 8)
    bias = layer.relative_position_bias_table[:, index].masked_fill(~near, float("-inf"))
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    expected = mixed.transpose(1, 2).flatten(2).unflatten(1, (height, width))
    torch.testing.assert_close(layer(x), layer.post_proj(expected))


def test_unknown_operator_is_told():
    with pytest.raises(ValueError, match="choose elsa, window, depthwise, dynamic, local"):
        small(operator="conv")
