"""Training of an image classifier: timm's parts in a plain loop, free of Ray.

Runs in one process, or in each process of an initialised `torch.distributed` group. Each
epoch starts from seeds of its own, so it depends on the checkpoint before it and nothing
else: a resumed run repeats an undisturbed one bit for bit on the CPU.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from timm.data import ImageDataset, Mixup, create_loader
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, accuracy, random_seed
from torch import Tensor, nn

import elsa  # noqa: F401  registers the models
from pipelines.data.images import DataPlace, Images
from pipelines.errors import PipelineError
from pipelines.params import Model, Params, Pretrain
from pipelines.run.reporting import Reporter

LARGEST_CONFUSION = 100
"""With more classes than this, no confusion matrix is kept."""

FUSED = ("adam", "adamw", "sgd")
"""Optimizers of torch that update all parameters in one call, far faster on a CPU."""


def build_model(model: Model, num_classes: int, drop_path_rate: float = 0.0) -> nn.Module:
    """The timm model that the `model` section names.

    Raises:
        PipelineError: an unknown name, or arguments that the model refuses.
    """
    try:
        return timm.create_model(
            model.name,
            num_classes=num_classes,
            drop_path_rate=drop_path_rate,
            **model.overrides(),
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise PipelineError(f"model: {model.name} can't be built: {error}") from error


class Part(ImageDataset):
    """The images of `dataset` at `indices`; a transform set here is the data set's."""

    def __init__(self, dataset: Images, indices: list[int]) -> None:
        # A view: what the base class would set up is the data set's own.
        self.dataset, self.indices = dataset, indices

    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        self.dataset.prefetch([self.indices[index] for index in indices])
        return [self[index] for index in indices]


def split_holdout(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on, and indices held out to choose the best epoch; both sorted."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held = round(count * share)
    return sorted(order[held:]), sorted(order[:held])


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
        self.device, self.reporter = device, reporter
        p = self.params
        random_seed(p.seed, 0)  # the same initial weights on every rank
        self.model = build_model(params.model, p.num_classes, p.drop_path_rate).to(device)
        self.ema = ModelEmaV3(self.model, decay=p.model_ema_decay) if p.model_ema else None
        fused: dict[str, Any] = {"fused": True} if p.opt in FUSED else {}
        self.optimizer = create_optimizer_v2(
            self.model, opt=p.opt, lr=p.lr, weight_decay=p.weight_decay, **fused
        )
        self.train_loader, self.choice_loader, self.val_loader = self._loaders(data)
        if not len(self.train_loader):
            raise PipelineError(
                f"pretrain.batch_size={p.batch_size} is larger than the"
                f" {len(self.train_loader.dataset)} images to train on; lower it"
            )
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer,
            sched=p.sched,
            num_epochs=p.epochs,
            warmup_epochs=p.warmup_epochs,
            warmup_lr=p.warmup_lr,
            min_lr=p.min_lr,
            cooldown_epochs=p.cooldown_epochs,
            step_on_epochs=False,
            updates_per_epoch=len(self.train_loader),
        )
        self.mixup: Mixup | None = None
        self.loss: nn.Module = LabelSmoothingCrossEntropy(p.smoothing)
        if p.mixup > 0 or p.cutmix > 0:
            self.mixup = Mixup(
                mixup_alpha=p.mixup,
                cutmix_alpha=p.cutmix,
                label_smoothing=p.smoothing,
                num_classes=p.num_classes,
            )
            self.loss = SoftTargetCrossEntropy()
        distributed = reporter.world_size > 1
        self.wrapped = (
            nn.parallel.DistributedDataParallel(self.model, gradient_as_bucket_view=True)
            if distributed
            else self.model
        )
        self.start_epoch = 0
        self.best: dict[str, Any] = {"epoch": -1, "top1": -1.0}
        self.history: list[dict[str, float]] = []

    def fit(self) -> None:
        """Train what is left of the epochs, then evaluate the best weights on `val`.

        The last checkpoint holds `best.safetensors` and `result.json` beside the state.
        """
        with self.reporter.checkpoint() as folder:
            if folder:
                self._load(folder)
        for epoch in range(self.start_epoch, self.epochs):
            metrics = self._train_epoch(epoch)
            chosen = self.ema.module if self.ema else self.model
            name = "val" if self.val_loader is self.choice_loader else "holdout"
            scores = self._evaluate(chosen, self.choice_loader)
            metrics |= {f"{name}_{key}": scores[key] for key in ("top1", "top5", "loss")}
            if scores["top1"] > self.best["top1"]:
                weights = {k: v.detach().cpu().clone() for k, v in chosen.state_dict().items()}
                self.best = {"epoch": epoch, "top1": scores["top1"], "weights": weights}
            self.history.append({"epoch": epoch + 1, **metrics})
            result = self._final() if epoch + 1 == self.epochs else None
            self._save(epoch, metrics, result)

    def _final(self) -> dict[str, Any]:
        chosen = deepcopy(self.model)
        chosen.load_state_dict(self.best["weights"])
        scores = self._evaluate(chosen, self.val_loader, confusion=True)
        return {
            **scores,
            "best_epoch": self.best["epoch"] + 1,
            "images_per_second": self.history[-1]["images_per_second"],
            "parameters": sum(p.numel() for p in chosen.parameters()),
        }

    def _loaders(self, data: DataPlace) -> tuple[Any, Any, Any]:
        p, world = self.params, self.reporter.world_size
        train, val_images = data.images("train"), data.images("val")
        kept, held = split_holdout(len(train), p.holdout, p.seed)
        common: dict[str, Any] = {
            "input_size": (3, p.img_size, p.img_size),
            "batch_size": p.batch_size // world,
            "interpolation": p.interpolation,
            "num_workers": p.data_workers,
            "persistent_workers": False,  # workers that live on would carry RNG state over epochs
            "use_prefetcher": self.device.type == "cuda",
            "device": self.device,
        }
        train_loader = create_loader(
            Part(train, kept),
            is_training=True,
            distributed=world > 1,
            scale=(p.scale_min, 1.0),
            hflip=p.hflip,
            color_jitter=p.color_jitter,
            auto_augment=p.aa or None,
            re_prob=p.reprob,
            re_mode="pixel",
            **common,
        )
        rank = self.reporter.rank

        def evaluation(images: Images, indices: list[int]) -> Any:
            # Every rank takes its own images, so none is padded or counted twice.
            mine = Part(images, indices[rank::world])
            return create_loader(mine, is_training=False, crop_pct=p.crop_pct, **common)

        val = evaluation(val_images, list(range(len(val_images))))
        # A data set of its own: it has another transform than the training images.
        return train_loader, evaluation(data.images("train"), held) if held else val, val

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        p, loader = self.params, self.train_loader
        random_seed(p.seed + 1000 * (epoch + 1), self.reporter.rank)
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        self.wrapped.train()
        started, total_loss, images = time.monotonic(), 0.0, 0
        global_batch = p.batch_size // self.reporter.world_size * self.reporter.world_size
        for index, (input, target) in enumerate(loader):
            step = epoch * len(loader) + index
            input, target = input.to(self.device), target.to(self.device)
            if self.mixup:
                input, target = self.mixup(input, target)
            with self._autocast():
                loss = self.loss(self.wrapped(input), target)
            if not torch.isfinite(loss):
                raise PipelineError(
                    f"the loss is {loss.item()} at step {step} (epoch {epoch + 1}); lower"
                    " pretrain.lr, raise pretrain.warmup_epochs or set pretrain.clip_grad"
                )
            self.optimizer.zero_grad()
            loss.backward()
            if p.clip_grad:
                nn.utils.clip_grad_norm_(self.model.parameters(), p.clip_grad)
            self.optimizer.step()
            if self.ema:
                self.ema.update(self.model, step=step)
            self.scheduler.step_update(step + 1)
            total_loss, images = total_loss + loss.item(), images + global_batch
            done = epoch * len(loader) + index + 1
            self.reporter.progress(
                done * global_batch,
                self.epochs * len(loader) * global_batch,
                "img",
                f"epoch {epoch + 1}/{self.epochs} loss {loss.item():.3f}",
            )
            if index % 10 == 0:
                lr = self.optimizer.param_groups[0]["lr"]
                self.reporter.metrics({"step/loss": loss.item(), "step/lr": lr}, step)
        mean_loss = self._sum(torch.tensor([total_loss, len(loader)], dtype=torch.float64))
        return {
            "train_loss": (mean_loss[0] / mean_loss[1]).item(),
            "images_per_second": images / (time.monotonic() - started),
        }

    @torch.inference_mode()
    def _evaluate(self, model: nn.Module, loader: Any, confusion: bool = False) -> dict[str, Any]:
        """Exact scores over all ranks, accuracies in percent."""
        model.eval()
        classes = self.params.num_classes
        sums = torch.zeros(4, dtype=torch.float64)  # top1, top5, loss, images
        matrix = torch.zeros(classes * classes, dtype=torch.float64)
        for input, target in loader:
            input, target = input.to(self.device), target.to(self.device)
            with self._autocast():
                output = model(input).float()
            top1, top5 = accuracy(output, target, topk=(1, min(5, classes)))
            loss = nn.functional.cross_entropy(output, target)
            batch = torch.stack([top1, top5, loss, torch.ones_like(loss)]).double().cpu()
            sums += batch * len(target)
            pairs = target.cpu() * classes + output.argmax(1).cpu()
            matrix += torch.bincount(pairs, minlength=classes * classes)
        sums = self._sum(sums)
        top1, top5, loss = (sums[:3] / sums[3]).tolist()
        scores: dict[str, Any] = {"top1": top1, "top5": top5, "loss": loss}
        if confusion and classes <= LARGEST_CONFUSION:
            scores["confusion"] = self._sum(matrix).long().view(classes, classes).tolist()
        return scores

    def _sum(self, values: Tensor) -> Tensor:
        if self.reporter.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    def _autocast(self) -> Any:
        if self.params.amp == "none":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.params.amp))

    def _save(self, epoch: int, metrics: dict[str, float], result: dict[str, Any] | None) -> None:
        with _temporary_folder() if self.reporter.rank == 0 else nullcontext() as folder:
            if folder:
                best = {k: v for k, v in self.best.items() if k != "weights"}
                save_file(self.best["weights"], str(folder / "best.safetensors"))
                state = {
                    "epoch": epoch,
                    "model": self.model.state_dict(),
                    "ema": self.ema.module.state_dict() if self.ema else None,
                    "optimizer": self.optimizer.state_dict(),
                    "best": best,
                    "history": self.history,
                }
                torch.save(state, folder / "state.pt")
                if result:
                    (folder / "result.json").write_text(
                        json.dumps(result | {"history": self.history}, indent=2)
                    )
            self.reporter.save(metrics, epoch, folder)

    def _load(self, folder: Path) -> None:
        state = torch.load(folder / "state.pt", map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best = {**state["best"], "weights": load_file(str(folder / "best.safetensors"))}
        self.history, self.start_epoch = state["history"], state["epoch"] + 1
        self.scheduler.step_update(self.start_epoch * len(self.train_loader))


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
