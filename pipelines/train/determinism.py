"""Kernels whose results do not change from run to run."""

import os

import torch


def use_deterministic_kernels() -> None:
    """Make torch take deterministic kernels in this process, and raise RuntimeError at an operation
    that has none. Before the first matrix product on a GPU: cuBLAS reads its setting once."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
