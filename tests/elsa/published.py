"""The authors' checkpoint layout from its description (`shared/elsa.md`), apart from the package.

Nothing here uses `elsa`: the shapes are derived from the paper's table and the stage-4 block is
written out plainly, so that the conversion is tested against an independent account of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

VARIANTS = {
    "tiny": {"dim": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24), "width": 4},
    "small": {"dim": 96, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24), "width": 8},
    "base": {"dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32), "width": 8},
}
TOY = {"dim": 16, "depths": (1, 1, 1, 2), "heads": (2, 2, 4, 4), "width": 2}


def shapes(variant: dict, kernel: int = 7, classes: int = 1000) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a published classification model."""
    out: dict[str, tuple[int, ...]] = {}

    def affine(name: str, *weight: int, bias: bool = True) -> None:
        out[f"{name}.weight"] = weight
        if bias:
            out[f"{name}.bias"] = weight[:1]

    affine("patch_embed.proj", variant["dim"], 3, 4, 4)
    affine("patch_embed.norm", variant["dim"])
    for i, (depth, heads) in enumerate(zip(variant["depths"], variant["heads"], strict=True)):
        dim = variant["dim"] * 2**i
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            affine(f"{block}.norm1", dim)
            if i < 3:
                width = variant["width"]
                qk = (dim // 3 * 2 + width - 1) // width * width
                out[f"{block}.attn.ghost_head"] = (1, dim, kernel, kernel)
                affine(f"{block}.attn.pre_proj", 2 * qk + dim, dim, 1, 1)
                affine(f"{block}.attn.attn.0", qk, width, kernel, kernel)
                affine(f"{block}.attn.attn.2", kernel * kernel * heads, qk, 1, 1)
            else:
                out[f"{block}.attn.rb"] = (heads, 169)
                out[f"{block}.attn.relative_id"] = (2401,)
                affine(f"{block}.attn.pre_proj", 3 * dim, dim)
            affine(f"{block}.attn.post_proj", dim, dim)
            affine(f"{block}.norm2", dim)
            affine(f"{block}.mlp.fc1", 4 * dim, dim)
            affine(f"{block}.mlp.fc2", dim, 4 * dim)
        if i < 3:
            affine(f"layers.{i}.downsample.reduction", 2 * dim, 4 * dim, bias=False)
            affine(f"layers.{i}.downsample.norm", 4 * dim)
    affine("norm", dim)
    affine("head", classes, dim)
    return out


def random_weights(variant: dict, **kwargs) -> dict[str, Tensor]:
    """A random published state dict; large position tables, so that their order matters."""
    generator = torch.Generator().manual_seed(0)
    out = {}
    for name, shape in shapes(variant, **kwargs).items():
        if name.endswith("relative_id"):
            out[name] = torch.zeros(shape, dtype=torch.long)
        else:
            scale = 1.0 if name.endswith(".rb") else 0.1
            out[name] = torch.randn(shape, generator=generator) * scale
    return out


def stage4_block(weights: dict[str, Tensor], prefix: str, x: Tensor, shift: int) -> Tensor:
    """The authors' stage-4 block, (B, H, W, C), by loops over the 7 x 7 windows.

    Rows v, q, k; the table (heads, 169) is indexed by key minus query. The map is padded to whole
    windows, rolled by `shift`; keys from across the seam are shut out.
    """

    def norm(name: str, y: Tensor) -> Tensor:
        w, b = weights[f"{prefix}.{name}.weight"], weights[f"{prefix}.{name}.bias"]
        return (y - y.mean(-1, keepdim=True)) / (
            y.var(-1, False, keepdim=True) + 1e-5
        ).sqrt() * w + b

    def linear(name: str, y: Tensor) -> Tensor:
        return y @ weights[f"{prefix}.{name}.weight"].t() + weights[f"{prefix}.{name}.bias"]

    table = weights[f"{prefix}.attn.rb"]
    heads, dim = table.shape[0], x.shape[-1]
    cells = [(r, c) for r in range(7) for c in range(7)]
    bias = torch.empty(heads, 49, 49)
    for a, (query_r, query_c) in enumerate(cells):
        for b, (key_r, key_c) in enumerate(cells):
            bias[:, a, b] = table[:, (key_r - query_r + 6) * 13 + (key_c - query_c + 6)]

    batch, height, width, _ = x.shape
    y = F.pad(norm("norm1", x), (0, 0, 0, -width % 7, 0, -height % 7))
    rows, cols = y.shape[1:3]
    y = torch.roll(y, (-shift, -shift), (1, 2))
    # Where each rolled cell came from: -1 for the part that wrapped round.
    home_r = torch.tensor([0] * (rows - shift) + [-1] * shift)
    home_c = torch.tensor([0] * (cols - shift) + [-1] * shift)
    out = torch.empty_like(y)
    for top in range(0, rows, 7):
        for left in range(0, cols, 7):
            window = y[:, top : top + 7, left : left + 7].reshape(batch, 49, dim)
            v, q, k = linear("attn.pre_proj", window).view(batch, 49, 3, heads, -1).unbind(2)
            logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / (dim // heads) ** 0.5 + bias
            home = [(home_r[top + r].item(), home_c[left + c].item()) for r, c in cells]
            apart = torch.tensor([[a != b for b in home] for a in home])
            attn = logits.masked_fill(apart, float("-inf")).softmax(-1)
            mixed = torch.einsum("bhqk,bkhd->bqhd", attn, v).reshape(batch, 49, dim)
            out[:, top : top + 7, left : left + 7] = linear("attn.post_proj", mixed).view(
                batch, 7, 7, dim
            )
    out = torch.roll(out, (shift, shift), (1, 2))[:, :height, :width]
    x = x + out
    return x + linear("mlp.fc2", F.gelu(linear("mlp.fc1", norm("norm2", x))))
