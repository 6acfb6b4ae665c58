"""Parameters: one typed schema, from a recipe and the overrides in `params.yaml`.

`params.yaml` names a recipe and lists every key; a key that is null there takes the
recipe's value, any other value overrides it. So both `dvc exp run -S pretrain.epochs=2`
and an edit of the file work the same way.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML, YAMLError

from pipelines.errors import PipelineError

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "pipelines" / "recipes"

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]


class ParamsError(PipelineError):
    """A parameter that the schema refuses; names the key and what is allowed."""


class Section(BaseModel):
    """Frozen; an unknown key or a wrong type is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Storage(Section):
    path: str = Field(min_length=1)
    """Ray Train's storage: a folder (relative to the repository) for checkpoints of runs."""


class Scaling(Section):
    num_workers: Positive
    use_gpu: bool
    cpus_per_worker: Positive
    max_failures: NonNegative


class Model(Section):
    """A timm model by name; the other keys override its own values, null keeps them."""

    name: str = Field(min_length=1)
    embed_dim: Positive | None = None
    depths: tuple[Positive, ...] | None = None
    num_heads: tuple[Positive, ...] | None = None
    kernel_size: Positive | None = None
    group_width: Positive | None = None
    lam: NonNegative | None = None
    gamma: NonNegative | None = None

    @model_validator(mode="after")
    def consistent(self) -> "Model":
        if self.kernel_size is not None and self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} is even; it must be odd")
        if self.depths and self.num_heads and len(self.depths) != len(self.num_heads):
            raise ValueError(
                f"depths has {len(self.depths)} stages and num_heads {len(self.num_heads)};"
                " they must be as many"
            )
        if self.embed_dim and self.num_heads:
            for stage, heads in enumerate(self.num_heads):
                channels = self.embed_dim * 2**stage
                if channels % heads:
                    raise ValueError(
                        f"num_heads={heads} does not divide the {channels} channels of stage"
                        f" {stage + 1}; choose a divisor"
                    )
        return self

    def overrides(self) -> dict[str, Any]:
        """Keyword arguments for `timm.create_model` beside the name."""
        return {k: v for k, v in self.model_dump(exclude={"name"}).items() if v is not None}


class Prepare(Section):
    seed: NonNegative
    digits_per_class: Annotated[int, Field(ge=10, le=500, multiple_of=5)]
    image_size: Annotated[int, Field(ge=28)]
    train_variants: Positive
    scene_size: Annotated[int, Field(ge=96)]
    train_scenes: Positive
    val_scenes: Positive
    max_digits: Annotated[int, Field(ge=3, le=12)]


class BuildOp(Section):
    tolerance: Rate
    """Largest error against the float64 reference that the check accepts (float32)."""


class Training(Section):
    """What the three training stages share; `batch_size` is global, over all workers."""

    seed: NonNegative
    epochs: Positive
    batch_size: Positive
    lr: Rate
    weight_decay: Annotated[float, Field(ge=0)]
    clip_grad: Annotated[float, Field(ge=0)]
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)]
    data_workers: NonNegative
    """Loader processes of each worker; 0 loads in the worker itself."""


class Pretrain(Training):
    num_classes: Positive
    img_size: Annotated[int, Field(ge=16)]
    accumulate: Positive
    """Micro-batches of each optimizer step, so that fewer or smaller GPUs reach `batch_size`: each
    forward pass takes `batch_size / (scaling.num_workers * accumulate)` images."""
    lr_base_size: Positive | None
    """The rule of the learning rate: `lr` belongs to this global batch and scales linearly with
    `batch_size`; `warmup_lr` and `min_lr` stay. null takes `lr` as given."""
    opt: str
    sched: Literal["cosine", "step", "poly", "tanh"]
    sched_on_updates: bool
    """The schedule moves with every step; false moves it once per epoch, timm's default."""
    warmup_epochs: NonNegative
    warmup_lr: Rate
    min_lr: Rate
    cooldown_epochs: NonNegative
    smoothing: Annotated[float, Field(ge=0, lt=1)]
    mixup: Annotated[float, Field(ge=0)]
    cutmix: Annotated[float, Field(ge=0)]
    aa: str
    """timm's auto-augment policy, such as `rand-m9-mstd0.5-inc1`; empty for none."""
    reprob: Fraction
    color_jitter: Annotated[float, Field(ge=0)]
    hflip: Fraction
    scale_min: Annotated[float, Field(gt=0, le=1)]
    interpolation: Literal["bicubic", "bilinear", "nearest", "random"]
    crop_pct: Annotated[float, Field(gt=0, le=1)]
    model_ema: bool
    model_ema_decay: Annotated[float, Field(gt=0, lt=1)]
    amp: Literal["auto", "none", "bfloat16", "float16"]
    """Autocast's type. auto: on a GPU bfloat16 if it has it, else float16; none on a CPU. float16
    comes with a loss scaler."""
    grad_checkpointing: bool
    """Recompute activations in the backward pass: less memory, about a third more time."""
    channels_last: bool
    compile: bool
    """`torch.compile` of the training step's forward and backward."""
    prefetch_factor: Positive
    """Batches that each of the `data_workers` prepares ahead."""
    persistent_workers: bool
    """Keep the `data_workers` from epoch to epoch. The images are the same either way."""
    pin_memory: bool
    """Page-locked batches, for asynchronous copies to a GPU; nothing on a CPU."""
    holdout: Annotated[float, Field(ge=0, lt=0.5)]
    """Share of the training images held out to choose the best epoch. With 0 the validation
    images choose it, as timm does; then the reported accuracy is that of a chosen epoch."""

    @model_validator(mode="after")
    def consistent(self) -> "Pretrain":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs} must be less than epochs={self.epochs}"
            )
        return self

    def scaled_lr(self) -> float:
        """The learning rate of `batch_size`, by the rule of `lr_base_size`."""
        return self.lr * self.batch_size / self.lr_base_size if self.lr_base_size else self.lr

    def micro_batch(self, workers: int) -> int:
        """Images of one forward pass on one of `workers`."""
        return self.batch_size // (workers * self.accumulate)


class Downstream(Training):
    num_classes: Positive
    config: str = Field(min_length=1)
    """An mmengine config under `pipelines/mm/configs`, without `.py`."""
    img_size: Annotated[int, Field(ge=32)]
    warmup_iters: NonNegative
    val_interval: Positive
    """Epochs between evaluations; the last epoch is always evaluated."""


class Detect(Downstream):
    pass


class Segment(Downstream):
    crop_size: Annotated[int, Field(ge=32)]

    @model_validator(mode="after")
    def consistent(self) -> "Segment":
        if self.crop_size > self.img_size:
            raise ValueError(
                f"crop_size={self.crop_size} is larger than img_size={self.img_size};"
                " choose a crop that fits into the image"
            )
        return self


class Report(Section):
    samples: Annotated[int, Field(ge=1, le=64)]
    """Validation images drawn with predictions beside the truth."""


class Params(Section):
    """Everything that determines a pipeline run. One field per section of `params.yaml`."""

    recipe: str
    storage: Storage
    scaling: Scaling
    model: Model
    prepare: Prepare
    build_op: BuildOp
    pretrain: Pretrain
    detect: Detect
    segment: Segment
    report: Report

    @model_validator(mode="after")
    def consistent(self) -> "Params":
        for name in ("pretrain", "detect", "segment"):
            batch_size, workers = getattr(self, name).batch_size, self.scaling.num_workers
            if batch_size % workers:
                raise ValueError(
                    f"{name}.batch_size={batch_size} is the global batch and must be a multiple"
                    f" of scaling.num_workers={workers}"
                )
        pretrain = self.pretrain
        if pretrain.batch_size % (workers * pretrain.accumulate):
            raise ValueError(
                f"pretrain.batch_size={pretrain.batch_size} is the global batch and must be a"
                f" multiple of scaling.num_workers={workers} x pretrain.accumulate="
                f"{pretrain.accumulate}"
            )
        micro_batch = pretrain.micro_batch(workers)
        if (pretrain.mixup or pretrain.cutmix) and micro_batch % 2:
            raise ValueError(
                f"pretrain.mixup and pretrain.cutmix mix pairs, and each forward pass has"
                f" {micro_batch} images (pretrain.batch_size / scaling.num_workers /"
                " pretrain.accumulate); make that an even number"
            )
        return self


def recipe_names() -> list[str]:
    """Names of the recipes that can be chosen."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_params(recipe: str | None = None, path: Path = ROOT / "params.yaml") -> Params:
    """Resolved parameters.

    Args:
        recipe: a recipe alone, without the overrides of `path`; None reads `path`.
        path: the file with `recipe` and the overrides.

    Raises:
        ParamsError: a file that is missing or not YAML, an unknown recipe or key, a wrong
            type, a value out of range, or an inconsistent set.
    """
    overrides: dict[str, Any] = {} if recipe else _read(path)
    name = recipe or overrides.pop("recipe", None)
    if name not in recipe_names():
        raise ParamsError(f"recipe: {name!r} is unknown; choose one of {', '.join(recipe_names())}")
    resolved = _merge(_read(RECIPES / f"{name}.yaml"), overrides)
    resolved["recipe"] = name
    try:
        # JSON mode is strict about types and still takes a list for a tuple.
        return Params.model_validate_json(json.dumps(resolved), strict=True)
    except ValidationError as error:
        raise ParamsError(_explain(error, name)) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        data = YAML(typ="safe").load(path.read_text())
    except FileNotFoundError:
        raise ParamsError(
            f"{path.name} is missing: restore it with `git checkout {path.name}`"
        ) from None
    except YAMLError as error:
        raise ParamsError(f"{path.name} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ParamsError(f"{path.name} must map section names to sections")
    return data


def _merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`overrides` over `base`; null keeps the value of `base`."""
    merged = dict(base)
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merged[key] = _merge(base[key], value)
        elif value is not None:
            merged[key] = value
        elif key not in base:
            merged[key] = None
    return merged


def _explain(error: ValidationError, recipe: str) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "params"
        section: Any = Params
        for part in item["loc"][:-1]:
            field = section.model_fields.get(part) if hasattr(section, "model_fields") else None
            section = field.annotation if field else None
        if item["type"] == "extra_forbidden":
            known = ", ".join(section.model_fields) if hasattr(section, "model_fields") else ""
            lines.append(f"{key}: unknown key; known here: {known}")
        elif item["type"] == "missing":
            lines.append(f"{key}: missing, neither in params.yaml nor in recipe {recipe}")
        else:
            given = "" if isinstance(item["input"], dict) else f" (given: {item['input']!r})"
            lines.append(f"{key}: {item['msg'].removeprefix('Value error, ')}{given}")
    return "params.yaml, recipe " + recipe + ":\n  " + "\n  ".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.params",
        description="Print the resolved parameters as JSON.",
    )
    parser.add_argument(
        "recipe",
        nargs="?",
        help=f"a recipe alone ({', '.join(recipe_names())}); without it, params.yaml as it stands",
    )
    try:
        params = load_params(parser.parse_args().recipe)
    except ParamsError as error:
        sys.exit(f"error: {error}")
    print(params.model_dump_json(indent=2))


if __name__ == "__main__":
    main()
