"""ELSA vision transformers; importing this package registers the models with timm."""

from .checkpoints import CheckpointError, LoadReport, load_checkpoint, read_state_dict
from .layers import ELSA, ELSABlock
from .swin import ELSASwin, checkpoint_filter_fn

__all__ = [
    "ELSA",
    "CheckpointError",
    "ELSABlock",
    "ELSASwin",
    "LoadReport",
    "checkpoint_filter_fn",
    "load_checkpoint",
    "read_state_dict",
]
