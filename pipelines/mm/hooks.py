"""How mmengine's Runner reports, resumes exactly, and keeps what it predicted."""

import io
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, METRICS, MODELS
from PIL import Image
from safetensors.torch import save_file

from pipelines.errors import PipelineError
from pipelines.mm.checkpoint import (
    STATE,
    read_checkpoint,
    write_begun,
    write_history,
    write_state,
)
from pipelines.mm.inference import inference_config
from pipelines.train.agreement import Requests
from pipelines.train.cost import BACKWARD_FACTOR, EnergyMeter, peak_flops

if TYPE_CHECKING:
    from pipelines.train.reporter import Reporter

WEIGHTS = "model.safetensors"
CONFIG, MODEL_CONFIG = "config.py", "inference.py"


class Stopped(Exception):  # noqa: N818  no error: the user's wish, after a checkpoint
    """Training left an epoch because the reporter is stopping."""


@HOOKS.register_module()
class ReportHook(Hook):
    """Reports progress, metrics and checkpoints of a `ShareTrainLoop`.

    Runs on all ranks. Each epoch ends with one `reporter.save`: after the validation where there is
    one. A checkpoint's folder holds `state.pt` (to resume), `history.json` (a row of metrics per
    epoch) and, of an epoch that is not over, `begun.json`. At the end of an epoch `config.py` and
    the evaluators' `predictions` come with it, at the end of the last `model.safetensors` and
    `inference.py`, the config of that model.

    Args:
        reporter: see `pipelines.train.reporter.Reporter`.
        folder: scratch folder of the checkpoint; the evaluators write into its `predictions`.
        resumed: folder of the checkpoint to resume from; None starts.
        checkpoint_minutes: between checkpoints within an epoch; 0 for none.
        interval: iterations between metrics.
        flops: of one image's forward pass, for the MFU; None leaves it out.
        tta: config of a test-time augmentation to evaluate after the last epoch, with
            `model`, `dataloader`, `evaluator` and the suffix of its metrics' names.

    Raises:
        Stopped: the reporter is stopping, and a checkpoint was written.
    """

    priority = "VERY_LOW"  # after the optimizer, the schedulers and the timers

    def __init__(
        self,
        reporter: "Reporter",
        folder: Path,
        resumed: Path | None,
        checkpoint_minutes: float,
        interval: int = 10,
        flops: float | None = None,
        tta: Mapping[str, Any] | None = None,
    ) -> None:
        self.reporter, self.folder, self.resumed = reporter, folder, resumed
        self.minutes, self.interval, self.flops, self.tta = checkpoint_minutes, interval, flops, tta
        self.history: list[dict[str, float]] = []
        self._row: dict[str, float] = {}
        self._epoch: dict[str, Any] = {}
        """Losses and seconds of the epoch that runs, from before a checkpoint within it too."""

    def before_train(self, runner: Any) -> None:
        loop = runner.train_loop
        self._energy = EnergyMeter(loop.device)
        self._requests = Requests(self.reporter, self.minutes, loop.device)
        if not self.resumed:
            return
        kept = read_checkpoint(self.resumed, loop.device)
        loop.load_state_dict(kept.state)
        self.history, self._epoch, self._row = kept.history, kept.epoch, kept.row
        if self._row:  # all but the validation was done
            self.folder.mkdir(parents=True)
            shutil.copy(self.resumed / STATE, self.folder)
            runner.val_loop.run()

    def before_train_epoch(self, runner: Any) -> None:
        self._before = self._epoch or {"losses": [], "seconds": 0.0, "phases": {}}
        self._epoch = {**self._before, "losses": list(self._before["losses"])}
        self._started = time.perf_counter()
        self._requests.kept()

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        steps, images = len(runner.train_dataloader), self._images(runner)
        done = images * (runner.epoch + (batch_idx + 1) / steps)
        self.reporter.progress(
            int(done), images * runner.max_epochs, "img", f"epoch {runner.epoch + 1}"
        )
        loss = float(outputs["loss"])
        if not math.isfinite(loss):
            raise PipelineError(
                f"the loss is {loss} at step {runner.iter + 1} (epoch {runner.epoch + 1}); lower"
                " the stage's lr, raise its warmup_iters or set its clip_grad"
            )
        self._epoch["losses"].append(loss)
        if (runner.iter + 1) % self.interval == 0:
            metrics = {f"train/{name}": float(value) for name, value in outputs.items()}
            metrics["lr"] = runner.optim_wrapper.get_lr()["lr"][0]
            self.reporter.metrics(metrics, runner.iter + 1)
            self._read_clocks(runner)
        # Not each time: the ranks have to agree.
        if batch_idx % self.interval == 0 and batch_idx + 1 < steps:
            stopping, due = self._requests.read()
            if stopping or due:
                self._read_clocks(runner)
                self._write(runner, batch_idx + 1)
                self._keep(stopping)

    def after_train_epoch(self, runner: Any) -> None:
        self._read_clocks(runner)
        steps = len(runner.train_dataloader)
        images_per_second = self._images(runner) / self._epoch["seconds"]
        self._row = {
            "epoch": runner.epoch + 1,
            "loss": float(np.mean(self._epoch["losses"])),
            "images_per_second": images_per_second,
            **{f"{k}_ms": 1000 * v / steps for k, v in self._epoch["phases"].items()},
            **self._gpu(images_per_second),
        }
        self._epoch = {}
        self._write(runner, steps)
        epoch, interval = runner.epoch + 1, runner.train_loop.val_interval
        if epoch % interval and epoch != runner.max_epochs:
            self._save(runner, runner.epoch)
            return
        stopping, due = self._requests.read()
        if stopping or due:
            self._keep(stopping)

    def _read_clocks(self, runner: Any) -> None:
        before, phases = self._before["phases"], runner.train_loop.clock.read()
        self._epoch["phases"] = {k: before.get(k, 0.0) + v for k, v in phases.items()}
        self._epoch["seconds"] = self._before["seconds"] + time.perf_counter() - self._started

    def _gpu(self, images_per_second: float) -> dict[str, float]:
        """Peak memory, energy of all GPUs where they tell, and MFU in percent; empty on CPUs."""
        if not torch.cuda.is_available():
            return {}
        cost = {"max_memory_gib": torch.cuda.max_memory_allocated() / 2**30}
        torch.cuda.reset_peak_memory_stats()
        drawn = torch.tensor([self._energy.read()], dtype=torch.float64, device="cuda")
        if self.reporter.world_size > 1:
            torch.distributed.all_reduce(drawn)
        if math.isfinite(drawn.item()):
            cost["energy_wh"] = drawn.item()
        if self.flops and (peak := peak_flops(torch.cuda.get_device_name())):
            done = BACKWARD_FACTOR * self.flops * images_per_second / self.reporter.world_size
            cost["mfu"] = 100 * done / peak
        return cost

    def _images(self, runner: Any) -> int:
        """Images of one epoch, of all ranks."""
        return len(runner.train_dataloader.batch_sampler.sampler)

    def before_val_epoch(self, runner: Any) -> None:
        self._started = time.perf_counter()

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        if batch_idx % self.interval == 0:
            self._leave_validation()

    def _leave_validation(self) -> None:
        if self._requests.read()[0]:
            self._keep(stopping=True)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        row = self._row | percentages(metrics or {})
        row["val_seconds"] = time.perf_counter() - self._started
        if self.tta and runner.epoch == runner.max_epochs:
            model = MODELS.build(dict(self.tta["model"], module=runner.model))
            found = evaluate(
                runner,
                model,
                self.tta["dataloader"],
                self.tta["evaluator"],
                lambda done, total: self._leave_validation(),
            )
            row |= percentages(found, self.tta["suffix"])
        self._row = row
        self._save(runner, runner.epoch - 1)  # the loop has counted the epoch by now

    def _write(self, runner: Any, steps: int) -> None:
        """The state after so many steps of the epoch, into the scratch folder."""
        state = runner.train_loop.state_dict(steps)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        if self.reporter.rank == 0:
            write_state(self.folder, state)

    def _keep(self, stopping: bool) -> None:
        """A checkpoint of an epoch that is not over, or not validated."""
        kept = None
        if self.reporter.rank == 0:
            kept = Path(tempfile.mkdtemp(dir=self.folder.parent))
            (kept / STATE).hardlink_to(self.folder / STATE)  # the end of the epoch needs it too
            write_begun(kept, self.history, self._epoch, self._row)
        self.reporter.keep(kept)
        self._requests.kept()
        if stopping:
            raise Stopped

    def _save(self, runner: Any, epoch: int) -> None:
        """The checkpoint of an epoch that is over."""
        self.history.append(self._row)
        reported = {name: value for name, value in self._row.items() if name != "epoch"}
        self._row = {}
        if self.reporter.rank == 0:
            write_history(self.folder, self.history)
            runner.cfg.dump(self.folder / CONFIG)
            if epoch + 1 == runner.max_epochs:
                state = runner.model.state_dict()
                weights = {name: value.contiguous() for name, value in state.items()}
                save_file(weights, str(self.folder / WEIGHTS))
                inference_config(runner.cfg).dump(self.folder / MODEL_CONFIG)
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
