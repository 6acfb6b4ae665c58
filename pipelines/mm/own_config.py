"""A config of the user's own for mmdet or mmseg: its model over the project's backbone and data.

The data, their augmentation, the optimizer's kind, the schedule and the evaluation are those of the
parameters and of their `schedule`; `cfg_options` changes what they leave open.
"""

from dataclasses import dataclass
from typing import Any

from mmengine.config import Config, ConfigDict

from pipelines.errors import PipelineError
from pipelines.mm.model import STRIDES, takers
from pipelines.mm.tree import dicts_in
from pipelines.paths import ROOT

TAKEN = ("model", "optim_wrapper.paramwise_cfg")
KNOWN = {"custom_imports", "default_scope"}


@dataclass(frozen=True)
class OwnConfig:
    """What is taken from the file."""

    model: ConfigDict
    paramwise_cfg: ConfigDict | None
    """Rates and decays of the optimizer by parameter; None takes the schedule's."""
    imports: tuple[str, ...]
    """Modules that register what the model names."""
    masks: bool
    """Of a detector: it learns masks."""
    left: tuple[str, ...]
    """The file's other keys, which the parameters and their schedule decide."""

    @property
    def told(self) -> str:
        """What is taken and what is not, for a person."""
        taken = TAKEN if self.paramwise_cfg is not None else TAKEN[:1]
        return (
            f"taken are {' and '.join(taken)} ({self.model.type}), with another backbone, the"
            f" normalisation of its images, and the classes of the data; not taken are"
            f" {', '.join(self.left)}"
        )


def read(given: str, stage: str) -> OwnConfig:
    """Read a config file with `_base_`s of any kind.

    Args:
        given: the file, relative to the repository.

    Raises:
        PipelineError: there is none, it can't be read, is of another library, or has no model
            whose backbone can be replaced.
    """
    file, where = ROOT / given, f"{stage}.config={given}"
    if not file.is_file():
        raise PipelineError(f"{where}: there is no such file", "Correct the path")
    scope = {"detect": "mmdet", "segment": "mmseg"}[stage]
    try:
        config = Config.fromfile(file)
        if "read_base()" in file.read_text():  # it has classes where others have their names
            config = Config(_named(config.to_dict(), scope))
    except Exception as error:  # the file is code: it can raise anything
        raise PipelineError(f"{where} can't be read: {error}", "Correct it") from error
    if config.get("default_scope", scope) != scope:
        raise PipelineError(
            f"{where} is a config of {config.default_scope}, and this stage trains with {scope}",
            f"Choose a config of {scope}",
        )
    model = config.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("backbone"), dict):
        kind = model.get("type") if isinstance(model, dict) else None
        raise PipelineError(
            f"{where} has no model.backbone to replace{f': its model is {kind}' if kind else ''}",
            "Choose a config of a detector or segmentor with a backbone of its own",
        )
    loaded = (p for p in dicts_in(config.get("train_dataloader", {})) if "type" in p)
    masks = any(
        str(p.type).endswith("LoadAnnotations") and bool(p.get("with_mask")) for p in loaded
    )
    paramwise = config.get("optim_wrapper", {}).get("paramwise_cfg")
    imports = tuple(config.get("custom_imports", {}).get("imports", ()))
    left = tuple(sorted(k for k in config.keys() - {"model"} - KNOWN if _counts(config[k])))
    return OwnConfig(model, paramwise, imports, masks, left)


def _named(value: Any, scope: str) -> Any:
    """The value with types by the names that they are registered under, not by their modules."""
    if isinstance(value, list | tuple):
        return type(value)(_named(one, scope) for one in value)
    if not isinstance(value, dict):
        return value
    found = {key: _named(one, scope) for key, one in value.items()}
    kind = found.get("type")
    if isinstance(kind, str) and kind.count(".") > 1:
        library, name = kind.split(".")[0], kind.split(".")[-1]
        if library in (scope, "mmcv", "mmengine"):
            found["type"] = name
        elif library.startswith("mm"):
            found["type"] = f"{library}.{name}"
    return found


def _counts(value: Any) -> bool:
    """Whether a key is mmengine's, and no variable of the file."""
    return isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)
    )


def graft(config: Config, own: OwnConfig) -> None:
    """Put the model into the config of a schedule, over a backbone of this project's."""
    ours, model = config.model, own.model
    model.setdefault("data_preprocessor", ConfigDict(type=ours.data_preprocessor.type))
    for key in ("mean", "std", "bgr_to_rgb"):  # the backbone's weights know no other
        model.data_preprocessor[key] = ours.data_preprocessor[key]
    # They pad to the size of one data set's images.
    model.data_preprocessor.pop("batch_augments", None)
    for key in ("pretrained", "init_cfg"):
        model.pop(key, None)
    taken = [t.in_channels for t in takers(model) if isinstance(t.in_channels, list | tuple)]
    outputs = max(map(len, taken), default=len(STRIDES))
    model.backbone = ConfigDict(out_indices=tuple(range(len(STRIDES)))[-outputs:])
    config.model = model
    config.custom_imports.imports.extend(own.imports)
    if own.paramwise_cfg is not None:
        config.optim_wrapper.paramwise_cfg = own.paramwise_cfg
