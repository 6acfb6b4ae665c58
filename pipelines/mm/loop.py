"""mmengine's epoch loop, made to begin within an epoch and to tell where a pass's time goes."""

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.model import is_model_wrapper
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop

from pipelines.mm.loading import epoch_seed
from pipelines.train.cost import StepClock
from pipelines.train.loading import seed_all
from pipelines.train.resume import gather, rng_state, set_rng_state


def unwrapped(runner: Any) -> torch.nn.Module:
    """The runner's model without `DistributedDataParallel`."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


@LOOPS.register_module()
class ResumableTrainLoop(EpochBasedTrainLoop):
    """Epochs that depend on the checkpoint before them, or within them, and on nothing else.

    Args:
        seed: of everything random in training.

    Attributes:
        clock: the time of the phases `data`, `forward`, `backward` and `optimizer`, of an epoch.
    """

    def __init__(self, *args: Any, seed: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seed = seed
        self.device = next(self.runner.model.parameters()).device
        self.clock = StepClock(self.device)
        self._passes = 0
        self._rng: list[Any] | None = None

    def run(self) -> torch.nn.Module:
        wrapper = self.runner.optim_wrapper
        backward, update = wrapper.backward, wrapper.update_params

        def timed_backward(*args: Any, **kwargs: Any) -> None:
            self.clock.mark("forward")
            backward(*args, **kwargs)
            self.clock.mark("backward")  # with what DDP's all-reduce does not hide behind it

        def timed_update(*args: Any, **kwargs: Any) -> None:
            update(*args, **kwargs)
            self.clock.mark("optimizer")

        wrapper.backward, wrapper.update_params = timed_backward, timed_update
        return super().run()

    def run_epoch(self) -> None:
        first, rng = self._passes, self._rng
        self._passes, self._rng = 0, None
        # Whole steps in each epoch: gradients in between are in no checkpoint.
        passes = len(self.dataloader)
        self.runner.optim_wrapper.initialize_count_status(self.runner.model, first, passes)
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        self.dataloader.batch_sampler.first = first
        self.clock = StepClock(self.device)
        batches = iter(self.dataloader)
        # After the iterator, which draws a number where loader processes do not live on.
        seed = epoch_seed(self.seed, self.epoch, self.runner.rank)
        seed_all(seed)
        torch.cuda.manual_seed(seed)
        if rng:
            set_rng_state(rng[self.runner.rank], self.device)
        for index, batch in enumerate(batches, first):
            self.clock.mark("data")
            self.run_iter(index, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def state_dict(self, passes: int) -> dict[str, Any]:
        """What training resumes from, as `torch.load(weights_only=True)` reads it; on all ranks.

        Args:
            passes: done of the epoch that runs.
        """
        runner, total = self.runner, len(self.dataloader)
        within = passes < total
        return {
            "epoch": self.epoch if within else self.epoch + 1,
            "iter": self.epoch * total + passes,
            "passes": passes if within else 0,
            "rng": gather(rng_state(self.device), runner.world_size) if within else None,
            "model": unwrapped(runner).state_dict(),
            "optim_wrapper": runner.optim_wrapper.state_dict(),
            "param_schedulers": [one.state_dict() for one in runner.param_schedulers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` returned."""
        runner = self.runner
        unwrapped(runner).load_state_dict(state["model"])
        runner.optim_wrapper.load_state_dict(state["optim_wrapper"])
        schedulers = zip(runner.param_schedulers, state["param_schedulers"], strict=True)
        for scheduler, saved in schedulers:
            scheduler.load_state_dict(saved)
        self._epoch, self._iter = state["epoch"], state["iter"]
        self._passes, self._rng = state["passes"], state["rng"]
