"""Whole published detectors and segmentors load, through the full-size configs."""

import pytest
import torch
from safetensors.torch import save_file

import elsa

from .full_size import VARIANTS, build_model

pytestmark = pytest.mark.usefixtures("one_thread")

PUBLISHED = {
    "name": "elsa_swin_tiny",
    "embed_dim": 16,
    "depths": [1, 1, 1, 2],
    "num_heads": [2, 2, 4, 4],
    "kernel_size": 3,
    "group_width": 2,
}


def as_published(state_dict):
    """A whole model of ours in the layout of the authors' files, by its description."""
    inside, published = "backbone.model.model.", {}
    for name, value in state_dict.items():
        if name.endswith("num_batches_tracked"):
            continue  # files of old versions lack it
        name = name.replace(inside, "backbone.")
        stage, _, rest = name.removeprefix("backbone.layers.").partition(".")
        if rest.startswith("downsample."):  # merging closes a stage there, opens one here
            name = f"backbone.layers.{int(stage) - 1}.{rest}"
        elif "backbone.layers.3." in name and ".attn." in name:
            name = name.replace(".qkv.", ".pre_proj.").replace(".attn.proj.", ".attn.post_proj.")
            if ".pre_proj." in name:
                q, k, v = value.chunk(3)
                value = torch.cat((v, q, k))
            elif name.endswith("relative_position_bias_table"):
                name = name.replace("relative_position_bias_table", "rb")
                value = value.t().flip(1)
        published[name] = value.clone()
    for block in range(2):
        published[f"backbone.layers.3.blocks.{block}.attn.relative_id"] = torch.zeros(2401).long()
    published["backbone.layers.3.blocks.1.attn.attn_mask"] = torch.zeros(4, 49, 49)
    return published


def randomise(model):
    generator = torch.Generator().manual_seed(0)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) * 0.1 + 0.01)


@torch.no_grad()
def predictions(model, image):
    """All tensors that the heads give."""
    if hasattr(model, "decode_head"):
        features = model.extract_feat(image)
        return [model.decode_head(features), model.auxiliary_head(features)]
    features = model.extract_feat(image)
    boxes = torch.tensor([[0.0, 3.0, 5.0, 60.0, 66.0], [0.0, 20.0, 8.0, 90.0, 40.0]])
    scores, deltas = model.rpn_head(features)
    found = [*scores, *deltas]
    stages = (
        [(0,), (1,), (2,)] if isinstance(model.roi_head.bbox_head, torch.nn.ModuleList) else [()]
    )
    for stage in stages:
        box = model.roi_head._bbox_forward(*stage, features, boxes)
        mask = model.roi_head._mask_forward(*stage, features, boxes)
        found += [box["cls_score"], box["bbox_pred"], mask["mask_preds"]]
    return found


@pytest.mark.parametrize(("stage", "group"), VARIANTS)
def test_published_detectors_and_segmentors_load_whole(stage, group, make_job, tmp_path):
    job = make_job(stage, model=PUBLISHED, group=group)
    source, model = (build_model(job, tmp_path).eval() for _ in range(2))
    randomise(source)
    weights = as_published(source.state_dict())
    torch.save({"meta": {"epoch": 12}, "state_dict": weights}, tmp_path / "published.pth")
    report = elsa.load_checkpoint(model, tmp_path / "published.pth")
    assert all(name.endswith("num_batches_tracked") for name in report.kept)
    assert sorted(report.dropped) == [
        "backbone.layers.3.blocks.0.attn.relative_id",
        "backbone.layers.3.blocks.1.attn.attn_mask",
        "backbone.layers.3.blocks.1.attn.relative_id",
    ]
    image = torch.rand(1, 3, 90, 100)
    torch.testing.assert_close(
        predictions(model, image), predictions(source, image), rtol=0, atol=0
    )

    save_file(source.state_dict(), tmp_path / "ours.safetensors")
    randomise_again = build_model(job, tmp_path)
    assert elsa.load_checkpoint(randomise_again, tmp_path / "ours.safetensors") == elsa.LoadReport()
    torch.testing.assert_close(randomise_again.state_dict(), source.state_dict())
    # The backbone alone takes the same file.
    backbone = build_model(job, tmp_path).backbone
    elsa.load_checkpoint(backbone, tmp_path / "published.pth")
    torch.testing.assert_close(backbone.state_dict(), source.backbone.state_dict())


def test_a_segmentor_refuses_what_is_not_all_of_it(make_job, tmp_path):
    model = build_model(make_job("segment", model=PUBLISHED), tmp_path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = as_published(model.state_dict())
    del weights["decode_head.bottleneck.conv.weight"], weights["backbone.norm2.bias"]
    weights["decode_head.conv_seg.weight"] = torch.zeros(3, 32, 1, 1)
    weights["decode_head.extra"] = torch.zeros(2)
    torch.save({"state_dict": weights}, tmp_path / "file.pth")
    with pytest.raises(elsa.CheckpointError) as error:
        elsa.load_checkpoint(model, tmp_path / "file.pth")
    for part in (
        "does not fit EncoderDecoder (4 of",
        "missing key decode_head.bottleneck.conv.weight (32, 256, 3, 3)",
        "missing key backbone.norm2.bias (64,)",
        "decode_head.conv_seg.weight is (3, 32, 1, 1) in the file, (150, 32, 1, 1) in the model",
        "unknown key decode_head.extra (2,)",
    ):
        assert part in str(error.value)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)

    classifier = elsa.ELSASwin(embed_dim=16, depths=(1, 1, 1, 2), num_heads=(2, 2, 4, 4))
    save_file(classifier.state_dict(), tmp_path / "classifier.safetensors")
    with pytest.raises(elsa.CheckpointError, match=r"pass model\.backbone"):
        elsa.load_checkpoint(model, tmp_path / "classifier.safetensors")
