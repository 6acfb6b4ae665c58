"""mmengine's Runner as a training loop: in one process, or in each of torch's process group."""

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.runner import Runner

import pipelines.mm.loading
import pipelines.mm.loop  # noqa: F401  both register what `build_config` names
from pipelines.mm.config import build_config, test_time_augmentation, use
from pipelines.mm.hooks import ReportHook, Stopped
from pipelines.mm.start import StartHook, find_start
from pipelines.train.determinism import use_deterministic_kernels
from pipelines.train.job import Job
from pipelines.train.loading import begin_loader_processes

if TYPE_CHECKING:
    from pipelines.train.reporter import Reporter

REPORT_INTERVAL = 10


def train(job: Job, device: torch.device, reporter: "Reporter") -> None:
    """Train and validate, from the reporter's checkpoint if there is one.

    Where the reporter is stopping, this returns after a checkpoint. One call per process:
    mmengine's logger, message hub and visualizer are singletons, and it chooses the device itself.
    """
    if job.section.deterministic:
        use_deterministic_kernels()
    work = Path(tempfile.mkdtemp(prefix=f"{job.stage}-", dir=reporter.scratch))
    try:
        with reporter.checkpoint() as found:
            folder = work / "checkpoint"
            config = build_config(job, folder)
            runner = make_runner(config, work)
            hook = ReportHook(
                reporter,
                folder,
                found,
                job.params.storage.checkpoint_minutes,
                interval=REPORT_INTERVAL,
                flops=job.flops,
                tta=test_time_augmentation(config),
            )
            runner.register_hook(hook)
            if job.weights and not found and job.section.init_from == "model":
                start = find_start(job, config.model, config.default_scope)
                runner.register_hook(StartHook(start))
            with suppress(Stopped):
                runner.train()
    finally:
        shutil.rmtree(work, ignore_errors=True)


class ShareRunner(Runner):
    """mmengine's Runner without `DistributedDataParallel`: the training loop adds gradients."""

    def wrap_model(self, model_wrapper_cfg: Any, model: torch.nn.Module) -> torch.nn.Module:
        if not self.distributed:
            return super().wrap_model(model_wrapper_cfg, model)
        return model.to(get_device())


def make_runner(config: Config, work: Path) -> Any:
    """mmengine's Runner below `work`, one of `torch.distributed`'s processes where it runs."""
    config.work_dir = str(work / "runner")
    config.experiment_name = work.name
    use(config)
    if config.default_scope == "mmseg":
        import pipelines.mm.labels  # noqa: F401  which takes mmseg
    loaders = (config.get(f"{part}_dataloader") for part in ("train", "val", "test"))
    if any(loader.num_workers for loader in loaders if loader):
        begin_loader_processes(__name__, f"{config.default_scope}.datasets")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        config.launcher = "pytorch"
    return ShareRunner.from_cfg(config)
