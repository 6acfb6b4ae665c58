"""Training of an image classifier: timm's parts in a plain loop, free of Ray.

Runs in one process, or in each of an initialised `torch.distributed` group. What is drawn follows
from the seed, the epoch, the step and the share alone: on CPUs the weights have the same bits on
any number of workers, and however often the run was interrupted.
"""

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor, nn

from pipelines.errors import PipelineError
from pipelines.train import components
from pipelines.train.agreement import Requests
from pipelines.train.checkpoint import MODEL_CONFIG, read_checkpoint, write_checkpoint
from pipelines.train.cost import (
    BACKWARD_FACTOR,
    EnergyMeter,
    StepClock,
    flops_per_image,
    peak_flops,
)
from pipelines.train.determinism import use_deterministic_kernels
from pipelines.train.distillation import make_objective
from pipelines.train.evaluation import amp_dtype, predict, sums_of_scores
from pipelines.train.job import Job
from pipelines.train.models import build_model, write_config
from pipelines.train.reduction import Reducer
from pipelines.train.scores import scores_of
from pipelines.train.shares import seed_share

if TYPE_CHECKING:
    from pipelines.train.reporter import Reporter

REPORT_EVERY = 10
"""Steps between metrics. A GPU's loss is read as often: each reading stalls the GPU."""


def train(job: Job, device: torch.device, reporter: "Reporter") -> None:
    """Train what is left of a run. What every worker calls."""
    Classifier(job, device, reporter).fit()


@dataclass
class Epoch:
    """What is known of the epoch that runs."""

    index: int
    first: int = 0
    """The step that it begins with: not 0 where a checkpoint was written within it."""
    loss: float = 0.0
    """Of all its steps so far, added up; the same on all ranks."""
    skipped: int = 0
    """Steps whose gradients overflowed in float16."""
    started: float = field(default_factory=time.monotonic)


class Classifier:
    """Model, optimizer, schedule, data and state of one training run.

    Args:
        job: its `params` and `dataset` are used.
        device: where to train.
        reporter: who hears of progress, metrics and checkpoints.
    """

    def __init__(self, job: Job, device: torch.device, reporter: "Reporter") -> None:
        self.job, self.device, self.reporter = job, device, reporter
        p = self.params = job.params.pretrain
        if p.deterministic:
            use_deterministic_kernels()
        random_seed(p.seed, 0)  # the same initial weights on every rank
        self.model = components.make_model(job, device)
        self.memory_format = torch.channels_last if p.channels_last else torch.contiguous_format
        self.ema = ModelEmaV3(self.model, decay=p.model_ema_decay) if p.model_ema else None
        self.optimizer = components.make_optimizer(self.model, p)
        self.amp = amp_dtype(p.amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp is torch.float16)
        mixing = components.make_mixing(p, prefetch=device.type == "cuda")
        self.mixup = mixing.mixup
        self.erase = components.make_erasing(p, device)
        self.loaders = components.make_loaders(job, device, mixing.collate, reporter)
        self.steps = self.loaders.sampler.steps
        self.scheduler, epochs = components.make_scheduler(self.optimizer, p, self.steps)
        self.epochs = epochs if p.epochs else 0  # no cooldown after nothing
        self.reducer = Reducer(self.model, p.shares, reporter.rank, reporter.world_size)
        if p.compile:
            self.model.compile()  # in place: the names of the weights stay
        self.objective = make_objective(self.model, mixing.loss, p, device, job.dataset.classes)
        self.peak = self._peak()
        self.energy = EnergyMeter(device)
        self.requests = Requests(reporter, job.params.storage.checkpoint_minutes, device)
        self.start_epoch = 0
        self.begun: dict[str, Any] | None = None
        """Of an epoch that a checkpoint was written in: what is done of it."""
        self.best: dict[str, Any] = {"epoch": -1, "top1": -1.0}
        self.history: list[dict[str, float]] = []

    def _peak(self) -> float | None:
        """FLOP/s of the GPU, if they are known; then `self.flops` are those of an image."""
        if self.device.type != "cuda":
            return None
        torch.backends.cudnn.benchmark = not self.params.deterministic
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.amp else None
        if peak:
            with torch.device("meta"):
                shape_only = build_model(self.job.params.model, self.params.num_classes)
            self.flops = flops_per_image(shape_only, self.params.img_size)
        return peak

    def fit(self) -> None:
        """Train what is left of the epochs, then evaluate the best weights on `val`.

        The last checkpoint holds `best.safetensors`, `result.json` and `predictions.npz` beside
        the state. Where the reporter is stopping, this returns after a checkpoint.
        """
        with self.reporter.checkpoint() as folder:
            if folder:
                self._load(folder)
        if not self.epochs:
            self._evaluate_only()
        for epoch in range(self.start_epoch, self.epochs):
            metrics = self._train_epoch(epoch)
            if metrics is None:
                return
            chosen = self.ema.module if self.ema else self.model
            name = "val" if self.loaders.val is self.loaders.choice else "holdout"
            found = self._evaluate(chosen, self.loaders.choice)
            metrics |= {f"{name}_{key}": value for key, value in found.items()}
            if found["top1"] > self.best["top1"]:
                self._keep(chosen, epoch, found["top1"])
            self.history.append({"epoch": epoch + 1, **metrics})
            result = self._final() if epoch + 1 == self.epochs else None
            self._save(epoch, metrics, result)

    def _evaluate_only(self) -> None:
        """The result of `pretrain.weights` as they are; epoch 0 is the only row of the history."""
        self._keep(self.model, -1, -1.0)
        result = self._final()
        metrics = {f"val_{k}": result[k] for k in ("top1", "top5", "loss") if k in result}
        self.history.append({"epoch": 0, **metrics})
        self._save(0, metrics, result)

    def _keep(self, model: nn.Module, epoch: int, top1: float) -> None:
        weights = {  # contiguous, as safetensors asks: channels_last has other strides
            k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
            for k, v in model.state_dict().items()
        }
        self.best = {"epoch": epoch, "top1": top1, "weights": weights}

    def _final(self) -> dict[str, Any]:
        """Result of the best weights; on rank 0 with `predictions`."""
        chosen = deepcopy(self.model)
        chosen.load_state_dict(self.best["weights"])
        predictions = predict(self.job, chosen, self.device, self.reporter)
        if predictions is None:
            return {}
        last = self.history[-1] if self.history else {}
        cost = {k: last[k] for k in ("images_per_second",) if k in last}
        if "energy_wh" in last:
            cost["energy_wh"] = sum(row["energy_wh"] for row in self.history)
        return {
            **scores_of(predictions),
            "predictions": predictions,
            "best_epoch": self.best["epoch"] + 1,
            **cost,
            "parameters": sum(p.numel() for p in chosen.parameters()),
        }

    def _train_epoch(self, index: int) -> dict[str, float] | None:
        """Metrics of the epoch; None if it was left after a checkpoint."""
        begun, self.begun = self.begun, None
        epoch = Epoch(index, **(begun or {}))
        sampler = self.loaders.sampler
        sampler.start, sampler.epoch, sampler.own = epoch.first, index, self.reducer.own
        self.model.train()
        components.switch_mixing(self.mixup, index, self.params.mixup_off_epoch)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        clock, batches = StepClock(self.device), iter(self.loaders.train)
        self.requests.kept()
        if not self._run_steps(epoch, batches, clock):
            return None
        self.scheduler.step(index + 1)
        if epoch.skipped == self.steps:
            raise PipelineError(
                f"no step of epoch {index + 1} had finite gradients in float16",
                "Set pretrain.amp=none or lower pretrain.lr",
            )
        return self._epoch_metrics(epoch, clock)

    def _run_steps(self, epoch: Epoch, batches: Iterator[Any], clock: StepClock) -> bool:
        """The steps of an epoch; False if it was left after a checkpoint."""
        cuda, unread = self.device.type == "cuda", []
        for index in range(epoch.first, self.steps):
            step = epoch.index * self.steps + index
            loss, updated = self._step(batches, epoch.index, index, clock)
            unread.append(loss)
            epoch.skipped += not updated
            self.scheduler.step_update(step + 1)
            last = index + 1 == self.steps
            if cuda and index % REPORT_EVERY and not last:
                continue
            losses = torch.stack(unread).tolist()
            unread.clear()
            _check_finite(losses, step, epoch.index)
            for value in losses:
                epoch.loss += value
            clock.read()
            self._report_step(epoch, index, losses[-1])
            if index % REPORT_EVERY == 0 and not last and self._keep_if_asked(epoch, index + 1):
                return False
        return True

    def _report_step(self, epoch: Epoch, index: int, loss: float) -> None:
        step, size = epoch.index * self.steps + index, self.params.batch_size
        self.reporter.progress(
            (step + 1) * size,
            self.epochs * self.steps * size,
            "img",
            f"epoch {epoch.index + 1}/{self.epochs} loss {loss:.3f}",
        )
        if index % REPORT_EVERY == 0:
            lr = self.optimizer.param_groups[0]["lr"]
            self.reporter.metrics({"step/loss": loss, "step/lr": lr}, step)

    def _keep_if_asked(self, epoch: Epoch, done: int) -> bool:
        """Write a checkpoint after `done` steps if one is due; whether training is to stop."""
        stopping, due = self.requests.read()
        if stopping or due:
            now = {"first": done, "loss": epoch.loss, "skipped": epoch.skipped}
            self._save(epoch.index, None, None, now)
            self.requests.kept()
        return stopping

    def _epoch_metrics(self, epoch: Epoch, clock: StepClock) -> dict[str, float]:
        steps = self.steps - epoch.first
        images_per_second = steps * self.params.batch_size / (time.monotonic() - epoch.started)
        seconds = clock.read()
        self.reducer.follow_speed(seconds["forward"] / len(self.reducer.own))
        metrics = {
            "train_loss": epoch.loss / self.steps,
            "images_per_second": images_per_second,
        }
        metrics |= {f"{phase}_ms": 1000 * s / steps for phase, s in seconds.items()}
        if self.scaler.is_enabled():
            metrics["skipped_steps"] = epoch.skipped
        if self.device.type == "cuda":
            drawn = self._sum(torch.tensor([self.energy.read()], dtype=torch.float64)).item()
            if math.isfinite(drawn):  # all GPUs tell
                metrics["energy_wh"] = drawn
            metrics["max_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        if self.peak:
            done = BACKWARD_FACTOR * self.flops * images_per_second / self.reporter.world_size
            metrics["mfu"] = 100 * done / self.peak
        return metrics

    def _step(
        self, batches: Iterator[Any], epoch: int, index: int, clock: StepClock
    ) -> tuple[Tensor, bool]:
        """One optimizer step: its mean loss, still on the device, and whether weights changed."""
        p = self.params
        for share in self.reducer.own:
            input, target = next(batches)
            seed_share(p.seed, epoch, index, share)
            input = self.erase(input.to(self.device, memory_format=self.memory_format))
            target = target.to(self.device)
            if self.mixup:
                input, target = self.mixup(input, target)
            clock.mark("data")
            with self.reducer.share(share) as added_up:
                loss = self._forward(input, target)
                added_up.append(loss)
                clock.mark("forward")
                self.scaler.scale(loss).backward()
            clock.mark("backward")
        (mean_loss,) = self.reducer.finish()
        if self.reporter.world_size > 1:
            clock.mark("communication")  # what the backward pass did not hide
        if p.clip_grad:
            self.scaler.unscale_(self.optimizer)
            components.clip_gradients(self.model, p)
        # float16's scale falls when gradients overflowed, and that step left the weights alone. The
        # schedule advances: it follows the images seen. Without a scaler the scale is always 1.
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        updated = self.scaler.get_scale() >= scale
        if self.ema and updated:
            self.ema.update(self.model, step=epoch * self.steps + index)
        clock.mark("optimizer")
        return mean_loss, updated

    def _forward(self, input: Tensor, target: Tensor) -> Tensor:
        try:
            with self._autocast():
                return self.objective(input, target)
        except Exception as error:
            if not self.params.compile or not type(error).__module__.startswith("torch._"):
                raise
            raise PipelineError(
                f"pretrain.compile: torch can't compile this model here: {error}",
                "Set it to false",
            ) from error

    def _evaluate(self, model: nn.Module, loader: Any) -> dict[str, float]:
        """Exact scores over all ranks, accuracies in percent."""
        workers = self.reporter.world_size
        sums = sums_of_scores(self.params, model, loader, self.device, workers)
        top1, top5, loss = (sums[:3] / sums[3]).tolist()
        return {"top1": top1, "top5": top5, "loss": loss}

    def _sum(self, values: Tensor) -> Tensor:
        if self.reporter.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, self.amp) if self.amp else nullcontext()

    def _save(
        self,
        epoch: int,
        metrics: dict[str, float] | None,
        result: dict[str, Any] | None,
        begun: dict[str, Any] | None = None,
    ) -> None:
        """A checkpoint after `epoch`, or within it after the steps that `begun` tells."""
        with tempfile.TemporaryDirectory(dir=self.reporter.scratch) as place:
            folder = Path(place) if self.reporter.rank == 0 else None
            if folder:
                state = {
                    "epoch": epoch - 1 if begun else epoch,
                    "begun": begun,
                    "model": self.model.state_dict(),
                    "ema": self.ema.module.state_dict() if self.ema else None,
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict(),
                    "best": {k: v for k, v in self.best.items() if k != "weights"},
                    "history": self.history,
                }
                whole = result and result | {"history": self.history}
                write_checkpoint(folder, state, self.best.get("weights"), whole)
                if whole:
                    classes = self.job.dataset.classes
                    write_config(folder / MODEL_CONFIG, self.model, self.params, classes)
            if metrics is None:
                self.reporter.keep(folder)
            else:
                self.reporter.save(metrics, epoch, folder)

    def _load(self, folder: Path) -> None:
        state, weights = read_checkpoint(folder, self.device)
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best = dict(state["best"])
        if weights is not None:
            self.best["weights"] = weights
        self.history, self.start_epoch = state["history"], state["epoch"] + 1
        self.begun = state["begun"]
        if state["scaler"]:  # empty without float16
            self.scaler.load_state_dict(state["scaler"])
        done = self.begun["first"] if self.begun else 0
        self.scheduler.step(self.start_epoch)
        self.scheduler.step_update(self.start_epoch * self.steps + done)


def _check_finite(losses: list[float], last_step: int, epoch: int) -> None:
    for step, loss in enumerate(losses, last_step + 1 - len(losses)):
        if not math.isfinite(loss):
            raise PipelineError(
                f"the loss is {loss} at step {step} (epoch {epoch + 1})",
                "Lower pretrain.lr, raise pretrain.warmup_epochs or set pretrain.clip_grad",
            )
