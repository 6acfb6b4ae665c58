"""Training of an image classifier: timm's parts in a plain loop, free of Ray.

Runs in one process, or in each process of an initialised `torch.distributed` group. Each
epoch starts from seeds of its own, so it depends on the checkpoint before it and nothing
else: a resumed run repeats an undisturbed one bit for bit on the CPU.
"""

import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from timm.data import FastCollateMixup, Mixup, create_transform
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, accuracy, random_seed
from torch import Tensor, nn

from pipelines.data.images import DataPlace, Images
from pipelines.errors import PipelineError
from pipelines.params import Params, Pretrain
from pipelines.results import scores
from pipelines.run.reporter import Reporter
from pipelines.train.cost import (
    BACKWARD_FACTOR,
    EnergyMeter,
    StepClock,
    communication,
    flops_per_image,
    peak_flops,
)
from pipelines.train.evaluation import amp_dtype, predict
from pipelines.train.loading import (
    MicroBatchSampler,
    Part,
    evaluation_loader,
    make_loader,
    split_holdout,
)
from pipelines.train.models import build_model, load_weights
from pipelines.train.resume import Requests, gather, rng_state, set_rng_state

REPORT_EVERY = 10
"""Steps between metrics. A GPU's loss is read as often: each reading stalls the GPU."""

FUSED = ("adam", "adamw", "sgd")
"""Optimizers of torch that update all parameters in one call, far faster on a CPU."""


class Classifier:
    """Model, optimizer, schedule, data and state of one training run.

    Args:
        params: sections `model` and `pretrain` are used.
        data: where the images are, as a folder or as shards.
        device: where to train.
        reporter: who hears of progress, metrics and checkpoints.
    """

    def __init__(
        self, params: Params, data: DataPlace, device: torch.device, reporter: Reporter
    ) -> None:
        self.params: Pretrain = params.pretrain
        # What a step's images are split for; where pretraining is elastic, fewer may run.
        self.planned = (
            params.scaling.num_workers if params.scaling.min_workers else reporter.world_size
        )
        self.data, self.device, self.reporter = data, device, reporter
        p = self.params
        random_seed(p.seed, 0)  # the same initial weights on every rank
        self.model = build_model(params.model, p.num_classes, p.drop_path_rate).to(device)
        if p.weights:
            load_weights(self.model, p)
        self.memory_format = torch.channels_last if p.channels_last else torch.contiguous_format
        if p.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if p.grad_checkpointing:
            _checkpoint_gradients(self.model, params.model.name)
        self.ema = ModelEmaV3(self.model, decay=p.model_ema_decay) if p.model_ema else None
        fused: dict[str, Any] = {"fused": True} if p.opt in FUSED else {}
        self.optimizer = create_optimizer_v2(
            self.model, opt=p.opt, lr=p.scaled_lr(), weight_decay=p.weight_decay, **fused
        )
        self.amp = amp_dtype(p.amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp is torch.float16)
        mixup = {
            "mixup_alpha": p.mixup,
            "cutmix_alpha": p.cutmix,
            "label_smoothing": p.smoothing,
            "num_classes": p.num_classes,
        }
        mixes = p.mixup > 0 or p.cutmix > 0
        # As in timm's script: where batches are prefetched they are mixed as they are collated.
        self.prefetch = device.type == "cuda"
        self.mixup = Mixup(**mixup) if mixes and not self.prefetch else None
        collate = FastCollateMixup(**mixup) if mixes and self.prefetch else None
        self.loss: nn.Module = (
            SoftTargetCrossEntropy() if mixes else LabelSmoothingCrossEntropy(p.smoothing)
        )
        self.train_loader, self.choice_loader, self.val_loader = self._loaders(data, collate)
        self.steps = self.sampler.steps
        if not self.steps:
            raise PipelineError(
                f"pretrain.batch_size={p.batch_size} is larger than the"
                f" {len(self.train_loader.dataset)} images to train on; lower it"
            )
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer,
            sched=p.sched,
            num_epochs=max(p.epochs, 1),
            warmup_epochs=p.warmup_epochs,
            warmup_lr=p.warmup_lr,
            min_lr=p.min_lr,
            cooldown_epochs=p.cooldown_epochs,
            step_on_epochs=not p.sched_on_updates,
            updates_per_epoch=self.steps,
        )
        self.epochs = self.epochs if p.epochs else 0  # no cooldown after nothing
        distributed = reporter.world_size > 1
        self.wrapped = (
            nn.parallel.DistributedDataParallel(self.model, gradient_as_bucket_view=True)
            if distributed
            else self.model
        )
        if p.compile:
            self.wrapped.compile()  # in place: the names of the weights stay
        self.peak: float | None = None
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            self.peak = peak_flops(torch.cuda.get_device_name(device)) if self.amp else None
        if self.peak:
            with torch.device("meta"):
                shape_only = build_model(params.model, p.num_classes)
            self.flops = flops_per_image(shape_only, p.img_size)
        self.energy = EnergyMeter(device)
        self.requests = Requests(reporter, params.storage.checkpoint_minutes, device)
        self.start_epoch = 0
        self.begun: dict[str, Any] | None = None
        """Of an epoch that a checkpoint was written in: what is done of it."""
        self.best: dict[str, Any] = {"epoch": -1, "top1": -1.0}
        self.history: list[dict[str, float]] = []

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
            name = "val" if self.val_loader is self.choice_loader else "holdout"
            found = self._evaluate(chosen, self.choice_loader)
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
        predictions = predict(
            self.params, chosen, self.data, self.device, self.reporter, self.planned
        )
        if predictions is None:
            return {}
        last = self.history[-1] if self.history else {}
        cost = {k: last[k] for k in ("images_per_second",) if k in last}
        if "energy_wh" in last:
            cost["energy_wh"] = sum(row["energy_wh"] for row in self.history)
        return {
            **scores.accuracy(predictions),
            "predictions": predictions,
            "best_epoch": self.best["epoch"] + 1,
            **cost,
            "parameters": sum(p.numel() for p in chosen.parameters()),
        }

    def _loaders(self, data: DataPlace, collate: Any) -> tuple[Any, Any, Any]:
        p, reporter = self.params, self.reporter
        train, val_images = data.images("train"), data.images("val")
        kept, held = split_holdout(len(train), p.holdout, p.seed)
        train.transform = create_transform(
            p.img_size,
            is_training=True,
            scale=(p.scale_min, 1.0),
            hflip=p.hflip,
            color_jitter=p.color_jitter,
            auto_augment=p.aa or None,
            interpolation=p.interpolation,
            re_prob=p.reprob,
            re_mode="pixel",
            use_prefetcher=self.prefetch,
        )
        part = Part(train, kept, p.seed)
        # One worker has it too: then a step has the same images on any number of workers.
        self.sampler = MicroBatchSampler(
            len(part), p, self.planned, reporter.rank, reporter.world_size, p.data_workers > 0
        )
        train_loader = make_loader(
            p,
            part,
            self.device,
            {"re_prob": p.reprob, "re_mode": "pixel"},
            batch_sampler=self.sampler,
            persistent_workers=p.persistent_workers and p.data_workers > 0,
            collate_fn=collate,
        )

        def evaluation(images: Images, indices: list[int]) -> Any:
            own = indices[reporter.rank :: reporter.world_size]
            return evaluation_loader(p, images, own, p.micro_batch(self.planned), self.device)

        val = evaluation(val_images, list(range(len(val_images))))
        # A data set of its own: it has another transform than the training images.
        return train_loader, evaluation(data.images("train"), held) if held else val, val

    def _train_epoch(self, epoch: int) -> dict[str, float] | None:
        """Metrics of the epoch; None if it was left after a checkpoint."""
        p, cuda = self.params, self.device.type == "cuda"
        random_seed(p.seed + 1000 * (epoch + 1), self.reporter.rank)
        begun, self.begun = self.begun, None
        first = self.sampler.start = begun["step"] if begun else 0
        self.sampler.epoch = epoch
        self.wrapped.train()
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        started, total_loss, skipped = time.monotonic(), 0.0, 0
        unread: list[Tensor] = []
        clock, batches = StepClock(self.device), iter(self.train_loader)
        if begun:  # after the iterator, which draws a number too
            skipped = begun["skipped"]
            total_loss = self._go_on(begun, epoch)
        steps = self.steps - first
        self.requests.kept()
        for index in range(first, self.steps):
            step = epoch * self.steps + index
            loss, updated = self._step(batches, step, clock)
            unread.append(loss)
            skipped += not updated
            self.scheduler.step_update(step + 1)
            if cuda and index % REPORT_EVERY and index + 1 < self.steps:
                continue
            losses = torch.stack(unread).tolist()
            unread.clear()
            self._check_finite(losses, step, epoch)
            for value in losses:
                total_loss += value
            clock.read()
            self.reporter.progress(
                (step + 1) * p.batch_size,
                self.epochs * self.steps * p.batch_size,
                "img",
                f"epoch {epoch + 1}/{self.epochs} loss {losses[-1]:.3f}",
            )
            if index % REPORT_EVERY == 0:
                lr = self.optimizer.param_groups[0]["lr"]
                self.reporter.metrics({"step/loss": losses[-1], "step/lr": lr}, step)
            if index % REPORT_EVERY == 0 and index + 1 < self.steps:
                stopping, due = self.requests.read()
                if stopping or due:
                    ranks = gather((total_loss, rng_state(self.device)), self.reporter.world_size)
                    now = {"step": index + 1, "ranks": ranks, "skipped": skipped}
                    self._save(epoch, None, None, now)
                    self.requests.kept()
                if stopping:
                    return None
        self.scheduler.step(epoch + 1)
        if skipped == self.steps:
            raise PipelineError(
                f"no step of epoch {epoch + 1} had finite gradients in float16; set"
                " pretrain.amp=none or lower pretrain.lr"
            )
        images_per_second = steps * p.batch_size / (time.monotonic() - started)
        mean_loss = self._sum(torch.tensor([total_loss, self.steps], dtype=torch.float64))
        metrics = {
            "train_loss": (mean_loss[0] / mean_loss[1]).item(),
            "images_per_second": images_per_second,
        }
        metrics |= {f"{phase}_ms": 1000 * s / steps for phase, s in clock.read().items()}
        metrics |= communication(self.wrapped, metrics["backward_ms"])
        if self.scaler.is_enabled():
            metrics["skipped_steps"] = skipped
        if cuda:
            drawn = self._sum(torch.tensor([self.energy.read()], dtype=torch.float64)).item()
            if math.isfinite(drawn):  # all GPUs tell
                metrics["energy_wh"] = drawn
            metrics["max_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        if self.peak:
            done = BACKWARD_FACTOR * self.flops * images_per_second / self.reporter.world_size
            metrics["mfu"] = 100 * done / self.peak
        return metrics

    def _go_on(self, begun: Mapping[str, Any], epoch: int) -> float:
        """Take over the random state of an epoch that was left; the losses so far, added up."""
        rank, world = self.reporter.rank, self.reporter.world_size
        losses, states = zip(*begun["ranks"], strict=True)
        if len(losses) == world:
            set_rng_state(states[rank], self.device)
            return losses[rank]
        # On another number of workers nothing can be repeated; but nothing may be drawn twice.
        entropy = [self.params.seed, epoch, begun["step"]]
        random_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0] // 2), rank)
        return sum(losses) / len(losses)

    def _step(self, batches: Iterator[Any], step: int, clock: StepClock) -> tuple[Tensor, bool]:
        """One optimizer step: its mean loss, still on the device, and whether weights changed."""
        p, shares = self.params, len(self.sampler.shares)
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
            nn.utils.clip_grad_norm_(self.model.parameters(), p.clip_grad)
        # float16's scale falls when gradients overflowed, and that step left the weights alone. The
        # schedule goes on: it follows the images seen. Without a scaler the scale is always 1.
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
                return self.loss(self.wrapped(input), target)
        except Exception as error:
            if not self.params.compile or not type(error).__module__.startswith("torch._"):
                raise
            raise PipelineError(
                f"pretrain.compile: torch can't compile this model here: {error}\nSet it to false"
            ) from error

    def _check_finite(self, losses: list[float], last_step: int, epoch: int) -> None:
        for step, loss in enumerate(losses, last_step + 1 - len(losses)):
            if not math.isfinite(loss):
                raise PipelineError(
                    f"the loss is {loss} at step {step} (epoch {epoch + 1}); lower pretrain.lr,"
                    " raise pretrain.warmup_epochs or set pretrain.clip_grad"
                )

    @torch.inference_mode()
    def _evaluate(self, model: nn.Module, loader: Any) -> dict[str, float]:
        """Exact scores over all ranks, accuracies in percent."""
        model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)  # top1, top5, loss, images
        for input, target in loader:
            input = input.to(self.device, memory_format=self.memory_format)
            target = target.to(self.device)
            with self._autocast():
                output = model(input).float()
            top1, top5 = accuracy(output, target, topk=(1, min(5, self.params.num_classes)))
            loss = nn.functional.cross_entropy(output, target)
            sums += torch.stack([top1, top5, loss, torch.ones_like(loss)]).double() * len(target)
        sums = self._sum(sums)
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
        with _temporary_folder() if self.reporter.rank == 0 else nullcontext() as folder:
            if folder:
                best = {k: v for k, v in self.best.items() if k != "weights"}
                if "weights" in self.best:
                    save_file(self.best["weights"], str(folder / "best.safetensors"))
                state = {
                    "epoch": epoch - 1 if begun else epoch,
                    "begun": begun,
                    "model": self.model.state_dict(),
                    "ema": self.ema.module.state_dict() if self.ema else None,
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict(),
                    "best": best,
                    "history": self.history,
                }
                torch.save(state, folder / "state.pt")
                if result:
                    np.savez(folder / "predictions.npz", **result.pop("predictions"))
                    (folder / "result.json").write_text(
                        json.dumps(result | {"history": self.history}, indent=2)
                    )
            if metrics is None:
                self.reporter.keep(folder)
            else:
                self.reporter.save(metrics, epoch, folder)

    def _load(self, folder: Path) -> None:
        state = torch.load(folder / "state.pt", map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best = dict(state["best"])
        if (folder / "best.safetensors").is_file():
            self.best["weights"] = load_file(str(folder / "best.safetensors"))
        self.history, self.start_epoch = state["history"], state["epoch"] + 1
        self.begun = state["begun"]
        if state["scaler"]:  # empty without float16
            self.scaler.load_state_dict(state["scaler"])
        done = self.begun["step"] if self.begun else 0
        self.scheduler.step(self.start_epoch)
        self.scheduler.step_update(self.start_epoch * self.steps + done)


def _checkpoint_gradients(model: nn.Module, name: str) -> None:
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:
        raise PipelineError(
            f"pretrain.grad_checkpointing: {name} does not support it; set it to false"
        ) from error


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
