"""How mmengine's Runner reports, resumes exactly, and keeps what it predicted."""

import io
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import FUNCTIONS, HOOKS, METRICS, MODELS
from PIL import Image
from safetensors.torch import save_file

from pipelines.errors import PipelineError
from pipelines.train.cost import EnergyMeter

CHECKPOINT = "checkpoint.pth"
WEIGHTS = "model.safetensors"
HISTORY = "history.json"
CONFIG = "config.py"
PREDICTIONS = "predictions"


@FUNCTIONS.register_module()
def seed_workers_by_loader(worker_id: int) -> None:
    """Leave the seeds of a data worker as the loader set them.

    The loader draws them from the main process's generator, which `ReportHook` reseeds each
    epoch; mmengine's own function would give every epoch the same augmentations.
    """


def epoch_seed(seed: int, epoch: int, rank: int) -> int:
    """A seed for everything random in one epoch on one rank."""
    return int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])


@HOOKS.register_module()
class ReportHook(Hook):
    """Reports progress, metrics and checkpoints; an epoch depends on its checkpoint alone.

    Runs on all ranks. Each epoch ends with one `reporter.save`: after the validation where
    there is one. The checkpoint's folder holds `checkpoint.pth` (mmengine's, to resume),
    `model.safetensors`, `history.json` (a row of metrics per epoch), `config.py` and what the
    evaluators wrote to `predictions`.

    Args:
        reporter: see `pipelines.run.reporting.Reporter`.
        folder: scratch folder of the checkpoint; the evaluators write into its `predictions`.
        history: rows of the epochs before the checkpoint that is resumed.
        interval: iterations between metrics.
        tta: config of a test-time augmentation to evaluate after the last epoch, with
            `model`, `dataloader`, `evaluator` and the suffix of its metrics' names.
    """

    priority = "VERY_LOW"  # after the optimizer, the schedulers and the timers

    def __init__(
        self,
        reporter: Any,
        folder: Path,
        seed: int,
        history: Sequence[Mapping[str, float]] = (),
        interval: int = 10,
        tta: Mapping[str, Any] | None = None,
    ) -> None:
        self.reporter, self.folder, self.seed = reporter, folder, seed
        self.history: list[dict[str, float]] = [dict(row) for row in history]
        self.interval, self.tta = interval, tta
        self._energy: EnergyMeter | None = None
        self._row: dict[str, float] = {}
        self._losses: list[float] = []
        self._started = 0.0

    def before_train(self, runner: Any) -> None:
        self._energy = EnergyMeter(next(runner.model.parameters()).device)

    def before_train_epoch(self, runner: Any) -> None:
        seed = epoch_seed(self.seed, runner.epoch, runner.rank)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        # Whole steps in each epoch: gradients in between are in no checkpoint.
        runner.optim_wrapper.initialize_count_status(runner.model, 0, len(runner.train_dataloader))
        self._losses, self._started = [], time.perf_counter()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        iterations, images = len(runner.train_dataloader), self._images(runner)
        done = images * (runner.epoch + min(1.0, (batch_idx + 1) / iterations))
        self.reporter.progress(
            int(done), images * runner.max_epochs, "img", f"epoch {runner.epoch + 1}"
        )
        loss = float(outputs["loss"])
        if not math.isfinite(loss):
            raise PipelineError(
                f"the loss is {loss} at step {runner.iter + 1} (epoch {runner.epoch + 1}); lower"
                " the stage's lr, raise its warmup_iters or set its clip_grad"
            )
        self._losses.append(loss)
        if (runner.iter + 1) % self.interval == 0:
            metrics = {f"train/{name}": float(value) for name, value in outputs.items()}
            metrics["lr"] = runner.optim_wrapper.get_lr()["lr"][0]
            self.reporter.metrics(metrics, runner.iter + 1)

    def after_train_epoch(self, runner: Any) -> None:
        seconds = time.perf_counter() - self._started
        self._row = {
            "epoch": runner.epoch + 1,
            "loss": float(np.mean(self._losses)),
            "images_per_second": self._images(runner) / seconds,
            **self._cost(runner),
        }
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        runner.save_checkpoint(str(self.folder), CHECKPOINT)
        if self.reporter.rank == 0:
            state = unwrapped(runner).state_dict()
            weights = {name: value.contiguous() for name, value in state.items()}
            save_file(weights, str(self.folder / WEIGHTS))
        epoch, interval = runner.epoch + 1, runner.train_loop.val_interval
        if epoch % interval and epoch != runner.max_epochs:
            self._save(runner, runner.epoch)

    def _cost(self, runner: Any) -> dict[str, float]:
        """Milliseconds of a pass, and of waiting for its images; on GPUs memory and energy."""
        passes, logged = len(runner.train_dataloader), runner.message_hub
        cost = {
            f"{name}_ms": 1000 * float(logged.get_scalar(f"train/{key}").mean(passes))
            for name, key in (("data", "data_time"), ("pass", "time"))
        }
        if torch.cuda.is_available():
            cost["max_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
            assert self._energy
            drawn = torch.tensor([self._energy.read()], dtype=torch.float64, device="cuda")
            if self.reporter.world_size > 1:
                torch.distributed.all_reduce(drawn)
            if math.isfinite(drawn.item()):  # all GPUs tell
                cost["energy_wh"] = drawn.item()
        return cost

    def _images(self, runner: Any) -> int:
        """Images of one epoch, of all ranks."""
        return len(runner.train_dataloader.batch_sampler.sampler) * self.reporter.world_size

    def before_val_epoch(self, runner: Any) -> None:
        self._started = time.perf_counter()

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self._row |= percentages(metrics or {})
        self._row["val_seconds"] = time.perf_counter() - self._started
        if self.tta and runner.epoch == runner.max_epochs:
            self._row |= percentages(evaluate_tta(runner, self.tta), self.tta["suffix"])
        self._save(runner, runner.epoch - 1)  # the loop has counted the epoch by now

    def _save(self, runner: Any, epoch: int) -> None:
        self.history.append(self._row)
        if self.reporter.rank == 0:
            (self.folder / HISTORY).write_text(json.dumps(self.history, indent=1))
            runner.cfg.dump(self.folder / CONFIG)
        reported = {name: value for name, value in self._row.items() if name != "epoch"}
        self.reporter.save(reported, epoch, self.folder if self.reporter.rank == 0 else None)


def percentages(metrics: Mapping[str, Any], suffix: str = "") -> dict[str, float]:
    """Metrics of mmdet and mmseg as percentages from 0 to 100, under plain names.

    CocoMetric counts from 0 to 1, and says -1 where no object has the size.
    """
    found = {}
    for name, value in metrics.items():
        group, _, plain = name.rpartition("/")
        if isinstance(value, Real) and (number := float(value)) >= 0:  # numpy's types too
            found[plain + suffix] = round(100 * number, 4) if group == "coco" else number
    return found


def evaluate_tta(runner: Any, tta: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of the runner's model under test-time augmentation, by all ranks together."""
    model = MODELS.build(dict(tta["model"], module=unwrapped(runner)))
    return evaluate(runner, model, tta["dataloader"], tta["evaluator"])


@torch.no_grad()
def evaluate(
    runner: Any,
    model: Any,
    dataloader: Any,
    evaluator: Any,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Metrics of `model`, by all ranks together, each image counted once.

    Args:
        dataloader, evaluator: their configs.
        progress: gets the images done so far, and all.
    """
    model.eval()
    loader = runner.build_dataloader(dataloader, seed=runner.seed)
    judge = Evaluator(evaluator)
    judge.dataset_meta = loader.dataset.metainfo
    done, total = 0, len(loader.dataset)
    for batch in loader:
        samples = model.test_step(batch)
        judge.process(data_samples=samples, data_batch=batch)
        done += len(samples) * runner.world_size
        progress(min(done, total), total)
    return judge.evaluate(total)


def unwrapped(runner: Any) -> torch.nn.Module:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


@METRICS.register_module()
class MaskImages(BaseMetric):
    """Writes predicted label maps as PNG files, on rank 0 whatever rank predicted them.

    Labels are those of the annotation files: from 1 where 0 means ignored.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(collect_device="gpu")  # by messages, not by files that ranks share
        self.folder = Path(folder)

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        for sample in data_samples:
            labels = sample["pred_sem_seg"]["data"].squeeze(0).cpu().numpy()
            labels = labels + int(bool(sample.get("reduce_zero_label")))
            buffer = io.BytesIO()
            Image.fromarray(labels.astype(np.uint8)).save(buffer, "PNG")
            self.results.append((Path(sample["img_path"]).stem, buffer.getvalue()))

    def compute_metrics(self, results: list[tuple[str, bytes]]) -> dict[str, float]:
        self.folder.mkdir(parents=True, exist_ok=True)
        for stem, data in results:
            (self.folder / f"{stem}.png").write_bytes(data)
        return {}
