"""What this project takes from Ray without Ray's promise: a new Ray that breaks it fails here."""

import importlib
import inspect
import json

import pytest
from ray.train import UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines.params import compose
from pipelines.run import ray_internals as internals


def parameters(function) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_trainer_hooks_that_we_override_exist() -> None:
    for name in ("_register_sigint_handler", "_create_default_callbacks"):
        assert callable(getattr(TorchTrainer, name, None)), f"Ray's TorchTrainer has no {name}"
    assert parameters(TorchTrainer._register_sigint_handler) == {"self", "controller"}


def test_callbacks_that_we_leave_out_are_still_among_rays_default_ones() -> None:
    source = inspect.getsource(TorchTrainer._create_default_callbacks)
    for callback in {*internals.Trainer.unneeded, *internals.LocalTrainer.unneeded}:
        assert callback.__name__ in source, f"Ray has no default {callback.__name__} any more"


def test_the_torch_backend_can_be_replaced() -> None:
    rays = TorchConfig().backend_cls
    for config in (internals.LoopbackTorchConfig, internals.ResumingTorchConfig):
        assert issubclass(config(backend="gloo").backend_cls, rays)
    for method in (rays.on_start, rays.on_shutdown):
        assert parameters(method) == {"self", "worker_group", "backend_config"}


def test_torchs_store_still_takes_a_listening_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """With it the store listens on the address it is named by, not on all."""
    rendezvous = importlib.import_module("torch.distributed.rendezvous")
    monkeypatch.setattr(rendezvous, "TCPStore", rendezvous.TCPStore)
    internals.bind_store_to_its_address()
    store = rendezvous.TCPStore("127.0.0.1", 0, world_size=1, is_master=True, use_libuv=True)
    store.set("key", "value")
    assert store.get("key") == b"value"


def test_a_checkpoint_can_be_uploaded_as_ray_does() -> None:
    from ray.train.v2._internal.execution.context import TrainContext
    from ray.train.v2._internal.execution.storage import StorageContext

    assert callable(getattr(TrainContext, "get_storage", None))
    assert parameters(StorageContext.persist_current_checkpoint) >= {"checkpoint"}


def test_a_notice_of_preemption_is_where_we_look_for_it() -> None:
    from ray.train.v2._internal.execution.context import TrainContext
    from ray.train.v2._internal.execution.preemption import PreemptionContext, PreemptionInfo
    from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

    assert "preemption_context" in TrainContext.__dataclass_fields__
    assert PreemptionContext().preemption_info is None
    assert PreemptionInfo(None, {"b": [1], "a": [0]}).preempted_node_ids == ["a", "b"]
    assert "preemption_context.preemption_info = " in inspect.getsource(RayTrainWorker)


def test_the_list_of_checkpoints_is_where_and_as_we_read_it() -> None:
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    from ray.train.v2._internal.execution import storage
    from ray.train.v2._internal.execution.checkpoint import checkpoint_manager

    assert internals.CHECKPOINT_LIST == CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    assert "checkpoint_dir_name" in inspect.getsource(checkpoint_manager)
    assert f'f"{internals.CHECKPOINT_PREFIX}{{' in inspect.getsource(storage)
    listed = {"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_a"}]}
    text = json.dumps(listed)
    assert internals.listed_checkpoints(text) == {"checkpoint_a"}
    assert internals.is_whole_list(text)
    assert not internals.is_whole_list(text[:20])


def test_the_controller_and_its_policy_are_as_we_replace_them() -> None:
    """What of them talks to an autoscaler, where workers get an environment of their own, and how a
    controller runs."""
    from ray.train.v2._internal.execution.controller import TrainController
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ScalingPolicy
    from ray.train.v2._internal.execution.worker_group import worker_group
    from ray.train.v2.api import data_parallel_trainer

    for name in vars(internals._LocalScalingPolicy):
        if not name.startswith(("__", "_abc")):
            assert callable(getattr(FixedScalingPolicy, name, None)), f"Ray has no {name}"
    talks = {
        name
        for name, value in vars(ScalingPolicy).items()
        if callable(value) and "resource_request(" in inspect.getsource(value)
    }
    replaced = set(vars(internals._LocalScalingPolicy))
    unused = {"_send_resource_request", "_cancel_resource_request"}  # but by what is replaced
    assert talks - replaced - unused == {"_get_num_workers_for_resource_request"}
    assert callable(worker_group.get_env_vars_to_propagate)
    assert "controller_actor=ray.get_runtime_context().current_actor" in inspect.getsource(
        worker_group
    )
    assert inspect.iscoroutinefunction(TrainController.run)
    source = inspect.getsource(data_parallel_trainer.DataParallelTrainer)
    assert "_initialize_and_run_controller(" in source
    assert "controller.get_result.remote()" in source


@pytest.mark.parametrize(
    ("callbacks", "kind"), [([], "LocalTrainer"), ([UserCallback()], "Trainer")]
)
def test_only_a_run_that_nobody_stops_early_has_its_controller_in_the_driver(
    callbacks: list[UserCallback], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune ends a stopped trial with its process; a controller in it held up all later trials."""
    from pipelines.run import fit

    made = []
    for name in ("LocalTrainer", "Trainer"):
        monkeypatch.setattr(fit, name, lambda *_, _name=name, **__: made.append(_name))
    scaling = compose(["recipe=smoke"]).scaling
    spec = fit.RunSpec("pretrain", "run", "id", scaling, "/tmp", {}, local=True, trial=True)
    fit._trainer(lambda *_: None, None, spec, None, callbacks)
    assert made == [kind]
