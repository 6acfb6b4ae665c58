"""mmengine's Runner inside a Ray Train worker: parameters to config, and the run itself."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.config import utils as config_utils

from pipelines.errors import PipelineError
from pipelines.mm.hooks import CHECKPOINT, HISTORY, PREDICTIONS, ReportHook
from pipelines.params import Downstream, Params
from pipelines.run.reporting import RayReporter, Reporter

CONFIGS = Path(__file__).parent / "configs"
REPORT_INTERVAL = 10
# mmengine looks for the distribution `mmsegmentation`, which other distributions provide too;
# by its module mmseg is found whoever provides it.
config_utils.MODULE2PACKAGE["mmseg"] = "mmseg"


@dataclass(frozen=True)
class Job:
    """What a worker needs to train a detector or a segmentor."""

    stage: str
    """`detect` or `segment`."""
    params: Params
    data: str
    """Folder of the data set."""
    classes: tuple[str, ...]
    weights: str | None
    """File with the backbone's weights; None starts from scratch."""

    @property
    def section(self) -> Downstream:
        """The stage's own parameters."""
        return getattr(self.params, self.stage)


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    reporter = RayReporter(config["reporting"])
    try:
        train(config["job"], reporter)
    finally:
        reporter.close()


def train(job: Job, reporter: Reporter) -> None:
    """Train and validate, from the reporter's checkpoint if there is one.

    One call per process: mmengine's logger, message hub and visualizer are singletons.
    """
    import torch
    from mmengine.runner import Runner

    work = Path(tempfile.mkdtemp(prefix=f"{job.stage}-"))
    try:
        with reporter.checkpoint() as found:
            folder = work / "checkpoint"
            config = build_config(job, folder, reporter.world_size)
            config.work_dir = str(work / "runner")
            config.experiment_name = work.name
            history = []
            if found:
                history = json.loads((found / HISTORY).read_text())
                config.load_from, config.resume = str(found / CHECKPOINT), True
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            if distributed:
                config.launcher = "pytorch"
                cuda = torch.cuda.is_available()
                config.model_wrapper_cfg = {
                    "type": "MMDistributedDataParallel",
                    # mmengine would name a device, which DDP refuses on a CPU.
                    "device_ids": [torch.cuda.current_device()] if cuda else None,
                    "broadcast_buffers": False,
                    "gradient_as_bucket_view": True,
                }
            runner = Runner.from_cfg(config)
            runner.register_hook(
                ReportHook(
                    reporter,
                    folder,
                    job.section.seed,
                    history,
                    REPORT_INTERVAL,
                    _test_time_augmentation(config),
                )
            )
            runner.train()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def config_names() -> list[str]:
    """Names of the configs that can be chosen."""
    return sorted(path.stem for path in CONFIGS.glob("*.py"))


def build_config(job: Job, folder: Path, workers: int) -> Config:
    """The stage's mmengine config with everything that the parameters decide.

    Args:
        folder: where the evaluators write predictions.
        workers: how many processes share the global batch.

    Raises:
        PipelineError: no such config, or one that is for another task or other classes.
    """
    section = job.section
    if section.config not in config_names():
        raise PipelineError(
            f"{job.stage}.config: {section.config!r} is unknown; choose one of"
            f" {', '.join(config_names())}"
        )
    config = Config.fromfile(CONFIGS / f"{section.config}.py")
    scope = {"detect": "mmdet", "segment": "mmseg"}[job.stage]
    if config.get("default_scope") != scope:
        raise PipelineError(
            f"{job.stage}.config: {section.config} is a config of {config.get('default_scope')},"
            f" this stage needs one of {scope}"
        )
    _set_model(config.model, job)
    _set_data(config, job, workers)
    evaluators = {"detect": _coco_evaluators, "segment": _ade20k_evaluators}[job.stage]
    config.val_evaluator = evaluators(job, folder / PREDICTIONS)
    config.test_evaluator = config.val_evaluator

    config.optim_wrapper.optimizer.update(lr=section.lr, weight_decay=section.weight_decay)
    if section.clip_grad:
        config.optim_wrapper.clip_grad = {"max_norm": section.clip_grad}
    warmup, decay = config.param_scheduler
    warmup.end = section.warmup_iters
    decay.end = section.epochs
    if "T_max" in decay:
        decay.T_max = section.epochs
    if not section.warmup_iters:
        config.param_scheduler = [decay]
    config.train_cfg.update(max_epochs=section.epochs, val_interval=section.val_interval)

    config.randomness = {"seed": section.seed}
    hooks = {k: v for k, v in config.get("default_hooks", {}).items() if k != "visualization"}
    config.default_hooks = hooks | {"checkpoint": None}  # ReportHook saves
    config.visualizer.vis_backends = config.vis_backends = []
    config.env_cfg.mp_cfg.mp_start_method = "spawn"  # a fork of a Ray worker can hang
    config.env_cfg.cudnn_benchmark = False
    return config


def _set_model(model: ConfigDict, job: Job) -> None:
    section, params = job.section, job.params.model
    backbone: dict[str, Any] = {"drop_path_rate": section.drop_path_rate}
    if params.name.startswith("elsa_swin_"):
        backbone |= {"type": "ELSASwin", "arch": {"name": params.name, **params.overrides()}}
    else:
        backbone |= {"type": "TimmBackbone", "model_name": params.name, **params.overrides()}
    channels = _channels(backbone)
    if job.weights:
        backbone["init_cfg"] = {"type": "Pretrained", "checkpoint": job.weights}
    for key in ("out_indices", "frozen_stages", "with_cp"):
        if key in model.backbone:
            backbone[key] = model.backbone[key]
    model.backbone = ConfigDict(backbone)
    (model.neck if "neck" in model else model.decode_head).in_channels = channels
    if "auxiliary_head" in model:
        model.auxiliary_head.in_channels = channels[model.auxiliary_head.in_index]
    for part in _dicts(model):
        if "num_classes" in part:
            part.num_classes = section.num_classes
        if part.get("class_weight") and len(part.class_weight) != section.num_classes:
            raise PipelineError(
                f"{job.stage}.config: {section.config} weighs {len(part.class_weight)} classes,"
                f" but {job.stage}.num_classes is {section.num_classes}; use another config"
            )


def _channels(backbone: dict[str, Any]) -> list[int]:
    import torch
    from mmengine.registry import MODELS

    import pipelines.mm  # noqa: F401  registers the backbones

    with torch.device("meta"):
        return MODELS.build(dict(backbone)).out_channels


def _set_data(config: Config, job: Job, workers: int) -> None:
    section = job.section
    loader = {
        "num_workers": section.data_workers,
        "persistent_workers": False,  # new ones each epoch, seeded by the epoch
        "worker_init_fn": {"type": "seed_workers_by_loader"},
    }
    config.train_dataloader.update(batch_size=section.batch_size // workers, **loader)
    config.val_dataloader.update(loader)
    for dataloader in (config.train_dataloader, config.val_dataloader):
        dataloader.dataset.update(data_root=job.data, metainfo={"classes": job.classes})
    size = (section.img_size, section.img_size)
    crop = getattr(section, "crop_size", section.img_size)
    for key in ("train_dataloader", "val_dataloader", "tta_pipeline"):
        for part in _dicts(config.get(key, {})):
            if "scale" in part:
                part.scale = size
            if "scale_factor" in part:  # of the test-time augmentation: relative to img_size
                side = round(section.img_size * part.pop("scale_factor"))
                part.scale = (side, side)
            if "crop_size" in part:
                part.crop_size = (crop, crop)
    if job.stage == "segment":
        config.model.data_preprocessor.size = (crop, crop)
    config.test_dataloader = config.val_dataloader


def _coco_evaluators(job: Job, predictions: Path) -> list[dict[str, Any]]:
    return [
        {
            "type": "CocoMetric",
            "ann_file": f"{job.data}/annotations/instances_val2017.json",
            "metric": ["bbox", "segm"],
            "outfile_prefix": str(predictions / "coco"),
            "collect_device": "gpu",  # by messages, not by files that ranks share
        }
    ]


def _ade20k_evaluators(job: Job, predictions: Path) -> list[dict[str, Any]]:
    return [
        {"type": "IoUMetric", "iou_metrics": ["mIoU"], "collect_device": "gpu"},
        {"type": "MaskImages", "folder": str(predictions)},
    ]


def _test_time_augmentation(config: Config) -> dict[str, Any] | None:
    """What `ReportHook` evaluates after the last epoch, for configs that have `tta_model`."""
    if "tta_model" not in config or config.default_scope != "mmseg":
        return None
    loader = config.val_dataloader.to_dict()
    loader["dataset"]["pipeline"] = config.tta_pipeline
    evaluator = [e for e in config.val_evaluator if e["type"] != "MaskImages"]
    return {
        "model": config.tta_model.to_dict(),
        "dataloader": loader,
        "evaluator": evaluator,
        "suffix": "_ms_flip",
    }


def _dicts(value: Any) -> Iterator[ConfigDict]:
    """All dicts inside a config, at any depth."""
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _dicts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _dicts(item)
