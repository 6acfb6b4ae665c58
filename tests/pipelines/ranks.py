"""Processes that train together, as the workers of a Ray Train run do."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch import multiprocessing


def on_ranks(workers: int, function: Callable[..., None], *args: Any) -> None:
    """Call `function(rank, workers, *args)` in so many processes of one thread each, joined by gloo
    over loopback.

    They are forked by a process that has imported the function's module, for all calls once.
    """
    multiprocessing.set_forkserver_preload([function.__module__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The process that forks may have been started before a test changed the environment.
    environment = dict(os.environ) | {"MASTER_PORT": str(port), "WORLD_SIZE": str(workers)}
    multiprocessing.start_processes(
        _on_rank, (workers, environment, function, args), nprocs=workers, start_method="forkserver"
    )


def _on_rank(
    rank: int,
    workers: int,
    environment: dict[str, str],
    function: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    os.environ |= environment | {
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=workers)
    function(rank, workers, *args)
    torch.distributed.destroy_process_group()
