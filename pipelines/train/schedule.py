"""What the parameters mean for a step of any of the training loops."""

from pipelines.params import Training


def scaled_lr(p: Training) -> float:
    """The learning rate of `batch_size`: `lr` is for a global batch of `base_batch_size`, and
    scales linearly (arXiv 1706.02677)."""
    return p.lr * (p.batch_size / p.base_batch_size)


def micro_batch(p: Training) -> int:
    """Images of a share: of one forward pass."""
    return p.batch_size // p.shares
