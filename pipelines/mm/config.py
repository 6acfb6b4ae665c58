"""The mmengine config of a training: mmdet's or mmseg's, with what the parameters decide."""

from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.config import config as config_module
from mmengine.config import utils as config_utils
from mmengine.utils import import_modules_from_strings

from pipelines.data.layout import LAYOUTS
from pipelines.errors import PipelineError
from pipelines.mm.model import STRIDES, set_channels, set_classes, set_equal_weights
from pipelines.mm.options import change
from pipelines.mm.own_config import graft, read
from pipelines.mm.tree import dicts_in
from pipelines.params import Detect, Downstream, Model, Segment
from pipelines.paths import ROOT
from pipelines.train.job import Job
from pipelines.train.schedule import micro_batch, scaled_lr

PREDICTIONS = "predictions"
POSITION_TABLE = "relative_position_bias_table"
CONFIGS = Path(__file__).parent / "configs"
# mmengine looks for the distribution `mmsegmentation`, which other distributions provide too;
# by its module mmseg is found whoever provides it.
config_utils.MODULE2PACKAGE["mmseg"] = "mmseg"
_by_metafiles = config_utils._get_external_cfg_path


def _by_place(package_path: str, name: str) -> str:
    """The file of a `_base_` in mmdet or mmseg. mmengine would read all their metafiles for each,
    which takes seconds."""
    file = Path(package_path, ".mim/configs", name)
    return str(file) if file.is_file() else _by_metafiles(package_path, name)


config_module._get_external_cfg_path = _by_place


BASE = {"detect": "mask-rcnn", "segment": "upernet"}
"""Methods whose schedules a config of the user's own is trained by."""
WITH_MASKS = {"faster-rcnn": "mask-rcnn", "cascade-rcnn": "cascade-mask-rcnn"}
"""Methods that are another one without its masks."""


def config_name(stage: str, method: str, schedule: str) -> str:
    """Name of the config of a method and a schedule, in the manner of mmdet and mmseg.

    The backbone's size is not part of it: the parameters choose that.
    """
    neck, data = {"detect": ("_fpn", "_coco"), "segment": ("", "_ade20k-512x512")}[stage]
    suffix = "" if schedule in ("demo", "finetune") else data
    return f"{method}_elsa-swin{neck}_{schedule}{suffix}"


def learns_masks(section: Detect) -> bool:
    """Whether a detector learns masks.

    Raises:
        PipelineError: a config of the user's own can't be read.
    """
    if section.method == "config":
        return read(section.config, "detect").masks
    return "mask" in section.method


def build_config(job: Job, folder: Path) -> Config:
    """The stage's mmengine config with everything that the parameters decide.

    Args:
        folder: where the evaluators write predictions.

    Raises:
        PipelineError: no config for this method and schedule, or one for other classes, or without
            a place for one of `cfg_options`.
    """
    section = job.section
    config = _start(job)
    change(config, section.cfg_options, job.stage)
    masks = job.stage == "detect" and learns_masks(section)
    if job.stage == "detect" and not masks:
        _leave_out_masks(config)
    _set_model(config.model, job)
    _set_data(config, job)
    predictions = folder / PREDICTIONS
    config.val_evaluator = (
        _coco_evaluators(job, predictions, masks)
        if job.stage == "detect"
        else _ade20k_evaluators(predictions)
    )
    config.test_evaluator = config.val_evaluator
    _set_optimizer(config, job)

    config.randomness = {"seed": section.seed}
    if section.deterministic:
        for part in dicts_in(config.model):
            if part.get("type") == "RoIAlign":
                part.use_torchvision = True  # mmcv's backward adds in any order
    hooks = {k: v for k, v in config.get("default_hooks", {}).items() if k != "visualization"}
    config.default_hooks = hooks | {"checkpoint": None}  # ReportHook saves
    config.visualizer.vis_backends = config.vis_backends = []
    config.env_cfg.mp_cfg.mp_start_method = "forkserver"  # a fork of a Ray worker can hang
    config.env_cfg.cudnn_benchmark = False
    return config


def use(config: Config) -> None:
    """Make what a config names known to mmengine, so that it can be built."""
    from mmengine.registry import init_default_scope

    import_modules_from_strings(**config.custom_imports)
    init_default_scope(config.default_scope)


def _start(job: Job) -> Config:
    """The config of the method and schedule, as it is in its file."""
    section = job.section
    own = section.method == "config"
    method = BASE[job.stage] if own else WITH_MASKS.get(section.method, section.method)
    name = config_name(job.stage, method, section.schedule)
    folder = CONFIGS / job.stage if own else ROOT / section.config
    file = folder / f"{name}.py"
    if not file.is_file():
        raise PipelineError(
            f"{job.stage}.method={section.method}, {job.stage}.schedule={section.schedule}:"
            f" there is no config {name} in {folder}",
            f"Choose a group with `elsa compose {job.stage}=...`",
        )
    # yapf takes seconds for what each checkpoint holds. `fromfile` does not take the argument on.
    found = Config.fromfile(file, import_custom_modules=False)  # `use` does
    config = Config(found.to_dict(), format_python_code=False)
    if own:
        graft(config, read(section.config, job.stage))
        set_equal_weights(config.model, section.num_classes)
    return config


def _leave_out_masks(config: Config) -> None:
    """Make a config of boxes and masks one of boxes alone."""
    if config.model.type == "MaskRCNN":
        config.model.type = "FasterRCNN"
    for key in ("mask_head", "mask_roi_extractor"):
        config.model.get("roi_head", {}).pop(key, None)
    for key in ("train_dataloader", "val_dataloader"):
        for part in dicts_in(config[key]):
            if part.get("type") == "LoadAnnotations":
                part.with_mask = False
            if part.get("type") == "FilterAnnotations":
                part.by_mask = False


def _set_optimizer(config: Config, job: Job) -> None:
    """Optimizer, precision, schedule and length."""
    section = job.section
    wrapper = config.optim_wrapper
    wrapper.optimizer.update(lr=scaled_lr(section), weight_decay=section.weight_decay)
    if not job.params.model.name.startswith("elsa_swin_"):
        # Swin's own runs leave it out; ELSA's decay it, whose name for it their rule misses.
        wrapper.paramwise_cfg.setdefault("custom_keys", {})[POSITION_TABLE] = {"decay_mult": 0.0}
    if section.clip_grad:
        wrapper.clip_grad = {"max_norm": section.clip_grad}
    precision = _precision(section, job.params.scaling.use_gpu)
    if precision:
        if job.stage == "detect":
            from pipelines.mm.float32 import keep_float32  # it imports mmdet

            keep_float32(config)
        # bfloat16 has the range of float32: nothing to scale.
        scale = "dynamic" if precision == "float16" else {"enabled": False}
        wrapper.update(type="AmpOptimWrapper", dtype=precision, loss_scale=scale)

    warmup, decay = config.param_scheduler
    warmup.end = section.warmup_iters
    decay.end = section.epochs
    if isinstance(section, Segment) and not decay.by_epoch:
        decay.begin = 0  # under the warm-up too: they are multiplied
        decay.end = section.epochs * section.epoch_iters
    if "T_max" in decay:
        decay.T_max = section.epochs
    milestones = section.milestones if isinstance(section, Detect) else ()
    if "milestones" in decay:
        decay.milestones = list(milestones)
    elif milestones:
        raise PipelineError(
            f"{job.stage}.milestones={list(milestones)}: schedule {section.schedule} has no steps",
            "Leave them empty",
        )
    if not section.warmup_iters:
        config.param_scheduler = [decay]
    config.train_cfg = {
        "type": "ShareTrainLoop",
        "seed": section.seed,
        "shares": section.shares,
        "max_epochs": section.epochs,
        "val_interval": section.val_interval,
    }


def _precision(section: Downstream, use_gpu: bool) -> str | None:
    """`bfloat16` or `float16` of automatic mixed precision, None for float32."""
    import torch

    if section.amp == "none" or not use_gpu:
        return None
    if section.amp != "auto":
        return section.amp
    native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if native else "float16"


def _set_model(model: ConfigDict, job: Job) -> None:
    section, params = job.section, job.params.model
    backbone: dict[str, Any] = {"drop_path_rate": section.drop_path_rate}
    if params.name.startswith("elsa_swin_"):
        backbone |= {"type": "ELSASwin", "arch": {"name": params.name, **params.overrides()}}
    else:
        backbone |= {"type": "TimmBackbone", "model_name": params.name, **params.overrides()}
    stages, channels = _pyramid(params)
    backbone["out_indices"] = stages
    if section.with_cp:
        backbone["with_cp"] = True
    if job.weights:
        backbone["init_cfg"] = {"type": "Pretrained", "checkpoint": job.weights}
    if "out_indices" in model.backbone:
        backbone["out_indices"] = [stages[i] for i in model.backbone.out_indices]
    if "frozen_stages" in model.backbone:
        backbone["frozen_stages"] = model.backbone.frozen_stages
    model.backbone = ConfigDict(backbone)
    set_channels(model, channels)
    set_classes(model, section.num_classes)
    for part in dicts_in(model):
        if isinstance(section, Segment) and section.class_weights and "loss_decode" in part:
            part.loss_decode.class_weight = list(section.class_weights)
        if part.get("type") == "SyncBN" and not job.params.scaling.use_gpu:
            part.type = "BN"  # synchronised, it has no CPU kernel


def _pyramid(model: Model) -> tuple[list[int], list[int]]:
    """Those of a model's maps that have the strides of necks and heads, and their channels.

    Raises:
        PipelineError: it has no such maps, or timm has no such model.
    """
    import timm
    import torch

    import elsa  # noqa: F401  registers its models

    try:
        with torch.device("meta"):
            made: Any = timm.create_model(
                model.name, features_only=True, feature_cls="getter", **model.overrides()
            )
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError) as error:
        raise PipelineError(f"model: {model.name} makes no backbone: {error}") from error
    found = [info["reduction"] for info in made.feature_info.info]
    if not set(STRIDES) <= set(found):
        raise PipelineError(
            f"model.name={model.name} has maps with strides {', '.join(map(str, found))}, and"
            f" detection and segmentation take {', '.join(map(str, STRIDES))}",
            "Choose a model whose maps get smaller from stage to stage",
        )
    stages = [max(i for i, stride in enumerate(found) if stride == wanted) for wanted in STRIDES]
    return stages, [made.feature_info.info[stage]["num_chs"] for stage in stages]


def _set_data(config: Config, job: Job) -> None:
    section, given = job.section, job.params.loader
    loader: dict[str, Any] = {
        "num_workers": given.data_workers,
        "pin_memory": given.pin_memory and job.params.scaling.use_gpu,
    }
    if given.data_workers:
        loader["persistent_workers"] = given.persistent_workers
        loader["prefetch_factor"] = given.prefetch_factor
    else:
        loader["persistent_workers"] = False
    config.train_dataloader.update(batch_size=micro_batch(section), **loader)
    config.val_dataloader.update(loader)
    for dataloader in (config.train_dataloader, config.val_dataloader):
        dataloader.dataset.update(
            data_root=job.dataset.place, metainfo={"classes": job.dataset.classes}
        )
    _set_sizes(config, job)
    config.test_dataloader = config.val_dataloader
    training = config.train_dataloader
    training.sampler = {
        "type": "StepSampler",
        "batch_size": section.batch_size,
        "steps": section.epoch_iters if isinstance(section, Segment) else 0,
        "seed": section.seed,
    }
    training.batch_sampler = {
        "type": "ShareSampler",
        "shares": section.shares,
        "seed": section.seed,
        "inner": training.get("batch_sampler"),
    }
    training.dataset = {
        "type": "TrainingDataset",
        "dataset": training.dataset,
        "left_out": [f"{job.dataset.place}/{name}" for name in job.dataset.skipped],
    }


def _set_sizes(config: Config, job: Job) -> None:
    """Scale all sizes of the pipelines so that the evaluated image's short side is `img_size`."""
    section = job.section
    crop = (section.crop_size,) * 2 if isinstance(section, Segment) else None
    pipeline = config.val_dataloader.dataset.pipeline
    evaluated = next(part.scale for part in pipeline if part.type == "Resize")

    def scaled(size: tuple[int, int], factor: float = 1.0) -> tuple[int, ...]:
        return tuple(round(side * factor * section.img_size / min(evaluated)) for side in size)

    parts = [
        part
        for key in ("train_dataloader", "val_dataloader", "tta_pipeline")
        for part in dicts_in(config.get(key, {}))
    ]
    for part in parts:
        if "scale_factor" in part:  # of the test-time augmentation: relative to the evaluated size
            part.scale = scaled(evaluated, part.pop("scale_factor"))
        elif "scale" in part:
            part.scale = scaled(part.scale)
        if "scales" in part:
            part.scales = [scaled(scale) for scale in part.scales]
        if "crop_size" in part:
            part.crop_size = crop or scaled(part.crop_size)
    if crop:
        config.model.data_preprocessor.size = crop


def _coco_evaluators(job: Job, predictions: Path, masks: bool) -> list[dict[str, Any]]:
    return [
        {
            "type": "CocoMetric",
            "ann_file": f"{job.dataset.place}/{LAYOUTS['coco'].annotations['val']}",
            "metric": ["bbox", "segm"] if masks else ["bbox"],
            "outfile_prefix": str(predictions / "coco"),
            "collect_device": "gpu",  # by messages, not by files that ranks share
        }
    ]


def _ade20k_evaluators(predictions: Path) -> list[dict[str, Any]]:
    return [
        {"type": "IoUMetric", "iou_metrics": ["mIoU"], "collect_device": "gpu"},
        {"type": "MaskImages", "folder": str(predictions)},
    ]


def test_time_augmentation(config: Config) -> dict[str, Any] | None:
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
