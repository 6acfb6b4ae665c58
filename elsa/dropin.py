"""ELSA in place of the (shifted) window attention of timm's Swin Transformers, stage by stage.

The paper's claim (arXiv 2112.12786, section 4): the attention can be swapped and the rest of
the recipe kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock

from .layers import ELSABlock

__all__ = ["replace_window_attention"]

M = TypeVar("M", bound=SwinTransformer)


class _Replacement(ELSABlock):
    """Takes over the norms, MLP and stochastic depth of a Swin block."""

    def __init__(self, block: Any, **elsa: Any) -> None:
        dim = block.norm1.normalized_shape[0]
        super().__init__(dim, block.attn.num_heads, **elsa)
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.drop_path1, self.drop_path2 = block.drop_path1, block.drop_path2
        reference = next(block.attn.parameters())
        self.attn.to(device=reference.device, dtype=reference.dtype)
        self.train(block.training)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to set: ELSA runs at any size. timm's stages call this."""


def replace_window_attention(model: M, stages: Iterable[int] = (0, 1, 2), **elsa: Any) -> M:
    """Replace the attention of a timm Swin Transformer by ELSA, in place.

    Norms, MLPs and stochastic depth stay, with their weights; the attention gets new weights.

    Args:
        model: a `timm.models.SwinTransformer`, such as `swin_tiny_patch4_window7_224`.
        stages: which stages, from 0; the paper leaves the last one as it is.
        **elsa: arguments of `ELSA`, such as `kernel_size`, `group_width`, `lam`, `gamma`.

    Returns:
        The model.

    Raises:
        TypeError: not a Swin Transformer of timm.
        ValueError: no such stage, one that was replaced before, or arguments `ELSA` rejects.
    """
    if not isinstance(model, SwinTransformer):
        raise TypeError(
            f"replace_window_attention needs a timm SwinTransformer, got {type(model).__name__}"
        )
    chosen = sorted(set(stages))
    replaced: list[tuple[Any, list[_Replacement]]] = []
    for index in chosen:
        if not 0 <= index < len(model.layers):
            raise ValueError(
                f"stages: there is no stage {index}; allowed: 0 to {len(model.layers) - 1}"
            )
        blocks: Any = model.layers[index].blocks
        if not all(isinstance(block, SwinTransformerBlock) for block in blocks):
            raise ValueError(f"stages: stage {index} has no window attention to replace")
        replaced.append((blocks, [_Replacement(block, **elsa) for block in blocks]))
    for blocks, new in replaced:  # only once all could be made
        for position, block in enumerate(new):
            blocks[position] = block
    return model
