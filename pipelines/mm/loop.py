"""mmengine's epoch loop, over steps of shares: it can begin within an epoch, and tells its time."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop
from torch import Tensor

from pipelines.train.cost import StepClock
from pipelines.train.reduction import Reducer
from pipelines.train.shares import seed_share


@LOOPS.register_module()
class ShareTrainLoop(EpochBasedTrainLoop):
    """Epochs that depend on the checkpoint before them, or within them, and on nothing else.

    An iteration is an optimizer step. Each of its shares has seeds of its own, and gradients are
    added in one order, so the number of workers leaves no trace but where SyncBN is.

    Args:
        seed: of everything random in training.
        shares: of a step.

    Attributes:
        clock: the time of the phases `data`, `forward`, `backward`, `optimizer` and, with several
            workers, `communication`, of an epoch.
    """

    def __init__(self, *args: Any, seed: int, shares: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        runner = self.runner
        self.seed = seed
        self.device = next(runner.model.parameters()).device
        self.reducer = Reducer(runner.model, shares, runner.rank, runner.world_size)
        self.synchronised = any(
            isinstance(module, torch.nn.SyncBatchNorm) for module in runner.model.modules()
        )
        self.clock = StepClock(self.device)
        self._first = 0

    def run_epoch(self) -> None:
        first, self._first = self._first, 0
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        sampler = self.dataloader.batch_sampler
        sampler.first, sampler.own = first, self.reducer.own
        self.clock = StepClock(self.device)
        batches = iter(self.dataloader)
        for step in range(first, len(self.dataloader)):
            self.run_iter(step, batches)
        if not self.synchronised:  # there every worker has one share
            seconds = self.clock.read()["forward"]
            self.reducer.follow_speed(seconds / len(self.reducer.own))
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def run_iter(self, idx: int, batches: Iterator[Any]) -> None:  # type: ignore[override]
        """One step of the optimizer."""
        runner, model, wrapper = self.runner, self.runner.model, self.runner.optim_wrapper
        runner.call_hook("before_train_iter", batch_idx=idx, data_batch=None)
        for share in self.reducer.own:
            batch = next(batches)
            self.clock.mark("data")
            seed_share(self.seed, self.epoch, idx, share)
            with self.reducer.share(share) as added_up:
                with wrapper.optim_context(model):
                    data = model.data_preprocessor(batch, True)
                    losses = model._run_forward(data, mode="loss")
                loss, values = model.parse_losses(losses)
                added_up += [torch.as_tensor(v, device=self.device) for v in values.values()]
                self.clock.mark("forward")
                wrapper.backward(loss)
            self.clock.mark("backward")
        means = self.reducer.finish()
        if runner.world_size > 1:
            self.clock.mark("communication")  # what the backward pass did not hide
        wrapper.step()
        wrapper.zero_grad()
        self.clock.mark("optimizer")
        outputs: dict[str, Tensor] = dict(zip(values, means, strict=True))
        runner.call_hook("after_train_iter", batch_idx=idx, data_batch=None, outputs=outputs)
        self._iter += 1

    def state_dict(self, steps: int) -> dict[str, Any]:
        """What training resumes from, as `torch.load(weights_only=True)` reads it.

        Args:
            steps: done of the epoch that runs.
        """
        runner, total = self.runner, len(self.dataloader)
        within = steps < total
        return {
            "epoch": self.epoch if within else self.epoch + 1,
            "iter": self.epoch * total + steps,
            "steps": steps if within else 0,
            "model": runner.model.state_dict(),
            "optim_wrapper": runner.optim_wrapper.state_dict(),
            "param_schedulers": [one.state_dict() for one in runner.param_schedulers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` returned."""
        runner = self.runner
        runner.model.load_state_dict(state["model"])
        runner.optim_wrapper.load_state_dict(state["optim_wrapper"])
        schedulers = zip(runner.param_schedulers, state["param_schedulers"], strict=True)
        for scheduler, saved in schedulers:
            scheduler.load_state_dict(saved)
        self._epoch, self._iter, self._first = state["epoch"], state["iter"], state["steps"]
