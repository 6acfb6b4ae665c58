"""Torch's process group for a local Ray, with nothing that listens beyond loopback."""

import importlib
import socket
from typing import Any

from ray.train.torch import TorchConfig


class LoopbackTorchConfig(TorchConfig):
    """Ray's, but the store through which the workers find each other listens on its address only.

    Torch would bind it on every interface.
    """

    @property
    def backend_cls(self) -> Any:
        return _LoopbackBackend


class _LoopbackBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(bind_store_to_its_address)
        super().on_start(worker_group, backend_config)


def bind_store_to_its_address() -> None:
    """In this process, let torch's rendezvous store listen on the address it is named by."""
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
    original = rendezvous.TCPStore

    def store(host_name: str, port: int, **options: Any) -> Any:
        if options.get("is_master"):
            options["master_listen_fd"] = socket.create_server((host_name, port)).detach()
        return original(host_name=host_name, port=port, **options)

    rendezvous.TCPStore = store
