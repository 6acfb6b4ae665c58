"""Training of an image classifier: timm's parts in a plain loop, free of Ray.

Runs in one process, or in each of an initialised `torch.distributed` group. Each epoch starts from
seeds of its own: a resumed run repeats an undisturbed one bit for bit on the CPU.
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
from torch.nn.parallel import DistributedDataParallel

from pipelines.errors import PipelineError
from pipelines.train import components
from pipelines.train.checkpoint import MODEL_CONFIG, read_checkpoint, write_checkpoint
from pipelines.train.cost import (
    BACKWARD_FACTOR,
    EnergyMeter,
    StepClock,
    communication,
    flops_per_image,
    peak_flops,
)
from pipelines.train.determinism import use_deterministic_kernels
from pipelines.train.distillation import make_objective
from pipelines.train.evaluation import amp_dtype, predict, sums_of_scores
from pipelines.train.job import Job
from pipelines.train.models import build_model, write_config
from pipelines.train.resume import Requests, gather, resume_random, rng_state
from pipelines.train.scores import scores_of

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
    first: int
    """The step that it begins with: not 0 where a checkpoint was written within it."""
    loss: float = 0.0
    """Of all its steps so far, added up."""
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
        scaling = job.params.scaling
        # What a step's images are split for; where pretraining is elastic, fewer may run.
        self.planned = scaling.num_workers if scaling.min_workers else reporter.world_size
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
        self.loaders = components.make_loaders(job, self.planned, device, mixing.collate, reporter)
        self.steps = self.loaders.sampler.steps
        self.scheduler, epochs = components.make_scheduler(self.optimizer, p, self.steps)
        self.epochs = epochs if p.epochs else 0  # no cooldown after nothing
        self.wrapped = self.model
        if reporter.world_size > 1:
            self.wrapped = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        if p.compile:
            self.wrapped.compile()  # in place: the names of the weights stay
        self.objective = make_objective(self.wrapped, mixing.loss, p, device, job.dataset.classes)
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
        predictions = predict(self.job, chosen, self.device, self.reporter, self.planned)
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
        random_seed(self.params.seed + 1000 * (index + 1), self.reporter.rank)
        begun, self.begun = self.begun, None
        epoch = Epoch(index, begun["step"] if begun else 0)
        self.loaders.sampler.start, self.loaders.sampler.epoch = epoch.first, index
        self.wrapped.train()
        components.switch_mixing(self.mixup, index, self.params.mixup_off_epoch)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        clock, batches = StepClock(self.device), iter(self.loaders.train)
        if begun:
            epoch.skipped = begun["skipped"]
            epoch.loss = resume_random(begun, self.params.seed, index, self.reporter, self.device)
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
            loss, updated = self._step(batches, step, clock)
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
            ranks = gather((epoch.loss, rng_state(self.device)), self.reporter.world_size)
            now = {"step": done, "ranks": ranks, "skipped": epoch.skipped}
            self._save(epoch.index, None, None, now)
            self.requests.kept()
        return stopping

    def _epoch_metrics(self, epoch: Epoch, clock: StepClock) -> dict[str, float]:
        steps = self.steps - epoch.first
        images_per_second = steps * self.params.batch_size / (time.monotonic() - epoch.started)
        mean_loss = self._sum(torch.tensor([epoch.loss, self.steps], dtype=torch.float64))
        metrics = {
            "train_loss": (mean_loss[0] / mean_loss[1]).item(),
            "images_per_second": images_per_second,
        }
        metrics |= {f"{phase}_ms": 1000 * s / steps for phase, s in clock.read().items()}
        metrics |= communication(self.wrapped, metrics["backward_ms"])
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

    def _step(self, batches: Iterator[Any], step: int, clock: StepClock) -> tuple[Tensor, bool]:
        """One optimizer step: its mean loss, still on the device, and whether weights changed."""
        p, shares = self.params, len(self.loaders.sampler.shares)
        # DDP takes the mean over the workers, and their shares may differ by one.
        weight = self.planned * p.accumulate / self.reporter.world_size
        self.optimizer.zero_grad()
        mean_loss = torch.zeros((), device=self.device)
        for micro in range(shares):
            input, target = next(batches)
            input = input.to(self.device, memory_format=self.memory_format)
            target = target.to(self.device)
            if self.mixup:
                input, target = self.mixup(input, target)
            clock.mark("data")
            with nullcontext() if micro + 1 == shares else self._no_sync():
                loss = self._forward(input, target) / weight
                clock.mark("forward")
                self.scaler.scale(loss).backward()
            mean_loss += loss.detach()
            clock.mark("backward")  # with what DDP's all-reduce does not hide behind it
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
            self.ema.update(self.model, step=step)
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
        found = sums_of_scores(self.job.params.pretrain, model, loader, self.device)
        sums = self._sum(found)
        top1, top5, loss = (sums[:3] / sums[3]).tolist()
        return {"top1": top1, "top5": top5, "loss": loss}

    def _sum(self, values: Tensor) -> Tensor:
        if self.reporter.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, self.amp) if self.amp else nullcontext()

    def _no_sync(self) -> Any:
        """Within it, gradients stay on their worker."""
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            return self.wrapped.no_sync()
        return nullcontext()

    def _save(
        self,
        epoch: int,
        metrics: dict[str, float] | None,
        result: dict[str, Any] | None,
        begun: dict[str, Any] | None = None,
    ) -> None:
        """A checkpoint after `epoch`, or within it after the steps that `begun` tells."""
        writes = self.reporter.rank == 0
        with tempfile.TemporaryDirectory() if writes else nullcontext() as scratch:
            folder = Path(scratch) if scratch else None
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
        done = self.begun["step"] if self.begun else 0
        self.scheduler.step(self.start_epoch)
        self.scheduler.step_update(self.start_epoch * self.steps + done)


def _check_finite(losses: list[float], last_step: int, epoch: int) -> None:
    for step, loss in enumerate(losses, last_step + 1 - len(losses)):
        if not math.isfinite(loss):
            raise PipelineError(
                f"the loss is {loss} at step {step} (epoch {epoch + 1})",
                "Lower pretrain.lr, raise pretrain.warmup_epochs or set pretrain.clip_grad",
            )
