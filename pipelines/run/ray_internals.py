"""Everything that this project takes from Ray Train without Ray's promise to keep it.

`local_ray` has the same of Ray itself, which a driver needs before Ray Train and torch.

Each function or class names the private parts that it touches, and why. `tests/pipelines/run/
test_ray_internals.py` holds each of them, so an upgrade of Ray shows what it broke.
"""

import asyncio
import importlib
import json
import re
import socket
from contextlib import suppress
from typing import Any

import ray.train
from ray.exceptions import OutOfMemoryError
from ray.runtime_context import RuntimeContext
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import worker_group

CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"
"""Ray Train's file of the checkpoints that it knows, in the folder of a run."""
CHECKPOINT_PREFIX = "checkpoint_"
"""How Ray Train's folders of checkpoints are called; the rest is the time, so they sort by it."""


def listed_checkpoints(text: str) -> set[str]:
    """Names of the checkpoints in `CHECKPOINT_LIST`; cut short, it still gives some, or none."""
    # Of the file's many keys, those of the names.
    return set(re.findall(r'"checkpoint_dir_name": ?"([^"/]+)"', text))


def is_whole_list(text: str) -> bool:
    """Whether `CHECKPOINT_LIST` was written to its end."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def persist_checkpoint(
    context: Any, checkpoint: "ray.train.Checkpoint", name: str
) -> "ray.train.Checkpoint":
    """Upload a checkpoint into the run's storage, as Ray itself does.

    Touches `get_storage().persist_current_checkpoint` of the train context: an upload function of
    our own gets the checkpoint before it is uploaded, and has no other way to.
    """
    uploaded: ray.train.Checkpoint = context.get_storage().persist_current_checkpoint(
        checkpoint, name
    )
    return uploaded


def drained_nodes() -> list[str]:
    """Nodes of this worker's run that are about to be taken away, by the start of their ids.

    Touches the train context's `preemption_context`: Ray's own `get_preemption_info` waits for all
    workers each time.
    """
    found = get_train_context().preemption_context.preemption_info
    return [node[:8] for node in found.preempted_node_ids] if found else []


class Trainer(TorchTrainer):
    """Ray's, without what no run of ours needs.

    Overrides `_register_sigint_handler`: the driver's signals stay ours, as Ray would end an
    interrupted driver with code 0, which DVC takes for success. Overrides
    `_create_default_callbacks`: our data don't come from Ray Data, whose manager is a process per
    run.
    """

    unneeded: tuple[type, ...] = (DatasetsCallback,)

    def _register_sigint_handler(self, controller: Any) -> None:
        pass

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        return [one for one in callbacks if not isinstance(one, self.unneeded)]


class _LocalScalingPolicy(FixedScalingPolicy):
    """Ray's, without asking an autoscaler for nodes: that is a process, and seconds of each start.

    Overrides all that talks to it.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass

    async def before_controller_shutdown(self) -> None:
        pass

    def before_controller_abort(self) -> None:
        pass


class LocalTrainer(Trainer):
    """For a Ray that ends with this driver, and whose processes have the driver's environment.

    The controller runs in this process: as an actor it is one process more that imports torch,
    before any worker starts. Nobody else waits for a dead controller's resources, and there is no
    node to wait for. Overrides `_initialize_and_run_controller`; replaces
    `get_env_vars_to_propagate`, as workers with a runtime environment start twice, and
    `RuntimeContext.current_actor`, of which the workers get a handle that ours don't use.
    """

    unneeded = (DatasetsCallback, PlacementGroupCleanerCallback)

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        policy = arguments["scaling_policy"]
        if type(policy) is FixedScalingPolicy:
            arguments["scaling_policy"] = _LocalScalingPolicy(policy.scaling_config)
        worker_group.get_env_vars_to_propagate = dict
        RuntimeContext.current_actor = property(lambda context: None)  # type: ignore[method-assign, assignment]
        controller = TrainController(**arguments)
        asyncio.run(controller.run())
        return controller.get_result()


class ResumingTorchConfig(TorchConfig):
    """Ray's, but training also resumes where Ray has ended workers for lack of memory.

    The end of the other workers meets an error then that Ray's controller does not expect. Touches
    `TorchConfig.backend_cls` and the `on_shutdown` of its class.
    """

    @property
    def backend_cls(self) -> Any:
        return _ResumingBackend


class _ResumingBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        with suppress(OutOfMemoryError):
            super().on_shutdown(worker_group, backend_config)


class LoopbackTorchConfig(ResumingTorchConfig):
    """The store through which the workers find each other listens on loopback only.

    Torch would bind it on every interface. Touches the `on_start` of the backend's class.
    """

    @property
    def backend_cls(self) -> Any:
        return _LoopbackBackend


class _LoopbackBackend(_ResumingBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(bind_store_to_its_address)
        super().on_start(worker_group, backend_config)


def bind_store_to_its_address() -> None:
    """In this process, let torch's rendezvous store listen on the address it is named by.

    Replaces `torch.distributed.rendezvous.TCPStore`.
    """
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
    original = rendezvous.TCPStore

    def store(host_name: str, port: int, **options: Any) -> Any:
        if options.get("is_master"):
            options["master_listen_fd"] = socket.create_server((host_name, port)).detach()
        return original(host_name=host_name, port=port, **options)

    rendezvous.TCPStore = store
