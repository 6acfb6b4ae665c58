"""The config of a trained model alone, for the tools of mmdet and mmseg, on any machine."""

from copy import deepcopy
from typing import Any

from mmengine.config import Config

from pipelines.data.layout import LAYOUTS
from pipelines.mm.tree import dicts_in

KEPT = (
    "default_scope",
    "default_hooks",
    "env_cfg",
    "log_level",
    "log_processor",
    "visualizer",
    "vis_backends",
    "model",
    "tta_model",
    "tta_pipeline",
    "test_cfg",
    "test_dataloader",
)
"""Keys of a training's config that prediction and evaluation use."""
OURS = "LabelMapDataset"
PUBLIC = {
    "type": "BaseSegDataset",
    "img_suffix": ".jpg",
    "seg_map_suffix": ".png",
    "reduce_zero_label": True,
}
"""mmseg's own in its place, for images as ADE20K and the demo have them."""
EVALUATORS = ("CocoMetric", "IoUMetric")
IN_FLOAT32 = "Float32"
"""Prefix of the heads of mixed precision, which compute as the plain ones do without it."""
PLAIN = {"Float32RoIExtractor": "SingleRoIExtractor"}
"""Of those that are not named so after the plain one."""


def inference_config(config: Config) -> Config:
    """What is needed to predict and to evaluate: no training, no paths of this machine.

    Its data are in `data/<data set>`, as the demo's are from the root of the repository.
    """
    kept = {key: deepcopy(config[key]) for key in KEPT if config.get(key) is not None}
    imports = dict.fromkeys(["elsa.mm", *config.custom_imports.imports])  # each once
    theirs = [name for name in imports if not name.startswith("pipelines.")]
    kept["custom_imports"] = {"imports": theirs, "allow_failed_imports": False}
    dataset = {"mmdet": "coco", "mmseg": "ade20k"}[config.default_scope]
    kept["model"].backbone.pop("init_cfg", None)
    for part in dicts_in(kept["model"]):
        if str(part.get("type", "")).startswith(IN_FLOAT32):
            part.type = PLAIN.get(part.type, part.type.removeprefix(IN_FLOAT32))
    kept["test_dataloader"].dataset.data_root = f"data/{dataset}"
    if kept["test_dataloader"].dataset.type == OURS:
        kept["test_dataloader"].dataset.update(PUBLIC)
    kept["test_dataloader"].update(num_workers=0, persistent_workers=False)
    kept["test_dataloader"].pop("prefetch_factor", None)
    kept["test_pipeline"] = deepcopy(kept["test_dataloader"].dataset.pipeline)  # mmseg looks here
    evaluators = [one for one in config.test_evaluator if one["type"] in EVALUATORS]
    kept["test_evaluator"] = [_evaluator(one, dataset) for one in evaluators]
    kept["work_dir"] = "work_dirs"
    return Config(kept, format_python_code=False)


def _evaluator(config: Any, dataset: str) -> dict[str, Any]:
    left_out = ("outfile_prefix", "collect_device")
    found = {key: value for key, value in config.items() if key not in left_out}
    if "ann_file" in found:
        found["ann_file"] = f"data/{dataset}/{LAYOUTS[dataset].annotations['val']}"
    return found
