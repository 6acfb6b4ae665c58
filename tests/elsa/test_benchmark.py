"""The table of `python -m elsa.benchmarks.models`; never its timings."""

from __future__ import annotations

import re

import pytest
import timm
import torch

from elsa.benchmarks import models


@pytest.mark.parametrize(
    ("name", "published"),  # GFLOPs as the papers count them: 1 per multiply-add
    [
        ("swin_tiny_patch4_window7_224", 4.5),
        ("elsa_swin_tiny", 4.8),
        ("swin_base_patch4_window7_224", 15.4),
    ],
)
def test_flops_are_near_the_papers(compiled_library, name, published):
    assert models.count_flops(name, 224) / 2e9 == pytest.approx(published, rel=0.02)


def test_flops_by_hand(compiled_library):
    """What stage 1 of a model without anything behind it must take."""
    dim, qk, heads, pixels = 32, 24, 1, 14 * 14
    block = 2 * dim * (2 * qk + dim) + 2 * qk * 8 * 25 + 2 * qk * heads * 25  # pre_proj, attn
    block += 3 * dim * 25 + 2 * dim * dim + 2 * 2 * dim * 4 * dim  # the operator, post_proj, MLP
    with torch.device("meta"):
        model = timm.create_model("elsa_swin_micro", depths=(1,), num_heads=(1,), elsa_stages=(1,))
        images = torch.empty(1, 3, 56, 56)
        with models.FlopCounterMode(display=False) as counter:
            model(images)
    stem, head = 2 * 3 * 16 * dim, 2 * dim * 10
    assert counter.get_total_flops() == pixels * (stem + block) + head


def test_activation_bytes():
    """GELU keeps its input; the weights and the images, one storage in both sizes, do not count."""
    layer = torch.nn.Linear(5, 7)
    images = torch.randn(2, 3, 5)
    kept = models.activation_bytes(lambda x: torch.nn.functional.gelu(layer(x)).sum(), images)
    assert kept == 3 * 7 * 4


def test_table(compiled_library, capsys):
    names = ["elsa_swin_tiny", "swin_tiny_patch4_window7_224"]
    arguments = "--img-size 32 --batch 1 --repetitions 1 --amp bfloat16 --channels-last"
    assert models.main(["--models", *names, *arguments.split()]) == 0
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line]
    rows = {cells[1].strip(): cells for cells in lines}
    assert rows[names[0]][2].strip() == "29.14"
    assert all(float(rows[name][4]) > 0 for name in names)
    assert all(re.search(r"\(\d+\.\d\dx\)", cell) for cell in rows[names[0]][5:7])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--batch 0", "--batch: needs a whole number of at least 1, got '0'"),
        ("--img-size 100", "--img-size: 100 is no multiple of 32"),
        ("--models resnet50", "--models: invalid choice: 'resnet50'"),
        ("--amp half", "--amp: invalid choice"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        models.main(arguments.split())
    assert message in capsys.readouterr().err
