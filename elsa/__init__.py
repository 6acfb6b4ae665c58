"""ELSA vision transformers; importing this package registers the models with timm."""

from .checkpoints import CheckpointError, LoadReport, load_checkpoint, read_state_dict
from .dropin import replace_window_attention
from .layers import ELSA, ELSABlock
from .swin import ELSASwin, checkpoint_filter_fn
from .volo import ELSAVOLO

__all__ = [
    "ELSA",
    "ELSAVOLO",
    "CheckpointError",
    "ELSABlock",
    "ELSASwin",
    "LoadReport",
    "checkpoint_filter_fn",
    "load_checkpoint",
    "read_state_dict",
    "replace_window_attention",
]
