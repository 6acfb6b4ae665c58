"""The schema of `params.yaml`: every parameter, its type and what it may be.

It checks values and computes none: what a parameter means is in the code that uses it.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]


DEMO_CLASSES = 11
"""Of the demo's segmentation: ten digits and the background."""
ELSA_ONLY = {"group_width", "lam", "gamma"}
"""Keys of section `model` that mean nothing with another operator."""


class Section(BaseModel):
    """Frozen; an unknown key or a wrong type is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Storage(Section):
    path: str = Field(min_length=1)
    """Ray Train's storage: a folder (relative to the repository) for checkpoints of runs."""
    checkpoint_minutes: Annotated[float, Field(ge=0)]
    """Minutes between checkpoints within an epoch; 0: only at the end of each."""


class Data(Section):
    """Where the public data sets are; used with `prepare.source: public`.

    Each is a folder in the public layout, a folder that holds the public archives, or (ImageNet)
    tar shards of `elsa pack` in a folder or at an fsspec URL (`s3://...`). Null:
    that data set is not there, and the stages that need it say so.
    """

    imagenet: str | None
    coco: str | None
    ade20k: str | None
    storage: str = Field(min_length=1)
    """A folder (relative to the repository) for unpacked archives and notes of what is verified.
    All nodes must see it, and the folders above, at the same path."""


class Scaling(Section):
    num_workers: Positive
    min_workers: NonNegative
    """Pretraining continues with as few workers when nodes are lost, and with more when they are
    back, each time from the last checkpoint; a step's batch and images stay the same. 0: it waits
    for `num_workers`, as all other stages do."""
    use_gpu: bool
    gpus_per_worker: Annotated[float, Field(gt=0, le=1)]
    """Where `use_gpu`: less than 1 lets several trials of a sweep share a GPU."""
    cpus_per_worker: Positive
    max_failures: NonNegative
    wait_s: NonNegative
    """Seconds that a cluster gets to start the nodes for all workers, before the stage ends with
    what is missing. A local Ray does not grow and is never waited for."""

    @model_validator(mode="after")
    def consistent(self) -> "Scaling":
        if self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers={self.min_workers} must not exceed num_workers={self.num_workers}"
            )
        if self.gpus_per_worker < 1 and self.num_workers > 1:
            raise ValueError(
                f"gpus_per_worker={self.gpus_per_worker} lets runs share a GPU, but NCCL rejects"
                f" two workers of one run on the same: set num_workers={self.num_workers} to 1"
            )
        return self


class Loader(Section):
    """How the images reach the workers: they are the same images either way."""

    data_workers: NonNegative
    """Loader processes of each worker; 0 loads in the worker itself."""
    prefetch_factor: Positive
    """Batches that each of the `data_workers` prepares ahead."""
    persistent_workers: bool
    """Keep the `data_workers` from epoch to epoch."""
    pin_memory: bool
    """Page-locked batches, for asynchronous copies to a GPU; no effect on a CPU."""


class Model(Section):
    """A timm model by name; the other keys override its own values, null keeps them."""

    name: str = Field(min_length=1)
    embed_dim: Positive | None = None
    depths: tuple[Positive, ...] | None = None
    num_heads: tuple[Positive, ...] | None = None
    operator: Literal["elsa", "window", "depthwise", "dynamic", "local"] | None = None
    """For `elsa_swin_*`: ELSA, or what the paper compares it with, in the same Swin."""
    elsa_stages: tuple[bool, ...] | None = None
    """Which stages use `operator`; the others use shifted-window attention."""
    kernel_size: Positive | None = None
    group_width: Positive | Literal["all"] | None = None
    """Channels per group of ELSA's k x k convolution; all is one group."""
    lam: NonNegative | None = None
    gamma: NonNegative | None = None

    @model_validator(mode="after")
    def consistent(self) -> "Model":
        if self.kernel_size is not None and self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} is even; it must be odd")
        unused = sorted(ELSA_ONLY & self.overrides().keys())
        if unused and self.operator not in (None, "elsa"):
            raise ValueError(
                f"operator={self.operator} has no {', '.join(unused)}; leave it out (null)"
            )
        if self.depths and self.elsa_stages and len(self.depths) != len(self.elsa_stages):
            raise ValueError(
                f"depths has {len(self.depths)} stages and elsa_stages {len(self.elsa_stages)};"
                " they must have equal length"
            )
        if self.depths and self.num_heads and len(self.depths) != len(self.num_heads):
            raise ValueError(
                f"depths has {len(self.depths)} stages and num_heads {len(self.num_heads)};"
                " they must have equal length"
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


class Expected(Section):
    """What a data set must hold; 0 expects nothing in particular."""

    classes: NonNegative
    train: NonNegative
    """Training images."""
    val: NonNegative
    """Validation images."""


class Prepare(Section):
    source: Literal["demo", "public"]
    """`demo` draws the demo's data sets; `public` takes those of section `data`."""
    check: Literal["sizes", "content"]
    """What to do with a data set that carries a manifest of this pipeline: compare names and
    sizes with it, or read and decode every image again."""
    max_corrupt: NonNegative
    """Training images of a data set that may be left out because they do not decode."""
    max_empty_boxes: NonNegative
    """COCO annotations that may be left out because their box has no area."""
    imagenet: Expected
    coco: Expected
    ade20k: Expected
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
    accumulate: Positive
    """Passes that one step's batch is split into, so that fewer or smaller GPUs reach the same
    batch: each takes `batch_size / (scaling.num_workers * accumulate)` images."""
    lr: Rate
    base_batch_size: Positive
    """The global batch that `lr` is for; with another `batch_size` it is scaled linearly."""
    amp: Literal["auto", "none", "bfloat16", "float16"]
    """Precision of training on GPUs; float16 comes with a loss scaler. auto: bfloat16 where the GPU
    has it, else float16; none on a CPU. Detection and segmentation on a CPU are in float32."""
    deterministic: bool
    """Kernels that give the same bits on every run, where torch would else choose faster ones."""
    weight_decay: Annotated[float, Field(ge=0)]
    clip_grad: Annotated[float, Field(ge=0)]
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)]


class Pretrain(Training):
    epochs: NonNegative
    """0 only evaluates `weights`, and hands them on to detection and segmentation."""
    weights: str | None
    """A checkpoint to start from, as a file or a folder that a stage wrote (relative to the
    repository; all nodes must see it). Its classifier is taken where it has as many classes. DVC
    compares the name alone, so give other weights another name. Null: random weights."""
    num_classes: Positive
    img_size: Annotated[int, Field(ge=16)]
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
    train_interpolation: Literal["bicubic", "bilinear", "nearest", "random"]
    """Of the training crops and their RandAugment; random: bilinear or bicubic, image by image."""
    interpolation: Literal["bicubic", "bilinear", "nearest"]
    """Of the evaluated images."""
    crop_pct: Annotated[float, Field(gt=0, le=1)]
    model_ema: bool
    model_ema_decay: Annotated[float, Field(gt=0, lt=1)]
    grad_checkpointing: bool
    """Recompute activations in the backward pass: less memory, about a third more time."""
    channels_last: bool
    compile: bool
    """`torch.compile` of the training step's forward and backward."""
    holdout: Annotated[float, Field(ge=0, lt=0.5)]
    """Share of the training images held out to choose the best epoch. With 0 the validation
    images choose it, as timm does; then the reported accuracy is that of a chosen epoch."""

    @model_validator(mode="after")
    def consistent(self) -> "Pretrain":
        if not self.epochs and not self.weights:
            raise ValueError("epochs=0 trains nothing: set weights to what is to be evaluated")
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs} must be less than epochs={self.epochs}"
            )
        return self


class Downstream(Training):
    method: str
    schedule: str
    num_classes: Positive
    pretrained: bool
    """Start the backbone from the weights of `pretrain`; false starts it from scratch."""
    weights: str | None
    """A checkpoint whose backbone to start from instead: a classifier, a detector or a segmentor,
    published or ours, as a file or a folder that a stage wrote. Its content counts, not its name,
    but DVC compares the name alone."""
    with_cp: bool
    """Recompute the backbone's activations in the backward pass, to save memory."""
    img_size: Annotated[int, Field(ge=32)]
    """Short side of the evaluated images; the config's other sizes scale with it."""
    warmup_iters: NonNegative
    """Optimizer steps."""
    val_interval: Positive
    """Epochs between evaluations; the last epoch is always evaluated."""


class Detect(Downstream):
    method: Literal["mask-rcnn", "cascade-mask-rcnn", "faster-rcnn", "cascade-rcnn"]
    """The last two find boxes only, and need no masks in the data."""
    schedule: Literal["1x", "3x", "demo", "finetune"]
    milestones: tuple[Positive, ...]
    """Epochs after which a stepped schedule lowers the learning rate to a tenth."""

    @property
    def masks(self) -> bool:
        """Whether the method predicts masks, and learns from them."""
        return "mask" in self.method


class Segment(Downstream):
    method: Literal["upernet"]
    schedule: Literal["160k", "demo", "finetune"]
    class_weights: tuple[Rate, ...] | None
    """Weight of each class in the loss, in their order; null takes the schedule's, which are
    equal but for the demo's."""
    epoch_iters: NonNegative
    """Optimizer steps that count as an epoch, to evaluate, report and resume at; 0: as many as
    one pass over the images takes."""
    crop_size: Annotated[int, Field(ge=32)]

    @model_validator(mode="after")
    def consistent(self) -> "Segment":
        if self.crop_size > self.img_size:
            raise ValueError(
                f"crop_size={self.crop_size} is larger than img_size={self.img_size};"
                " choose a crop that fits into the image"
            )
        if self.class_weights and len(self.class_weights) != self.num_classes:
            raise ValueError(
                f"class_weights has {len(self.class_weights)} weights for num_classes="
                f"{self.num_classes}; give one for each class, or null"
            )
        if self.schedule == "demo" and self.num_classes != DEMO_CLASSES and not self.class_weights:
            raise ValueError(
                f"schedule=demo weighs the {DEMO_CLASSES} classes of the demo, but num_classes is"
                f" {self.num_classes}; choose segment=upernet_finetune, or give class_weights"
            )
        if self.schedule == "160k" and not self.epoch_iters:
            raise ValueError("epoch_iters=0, but schedule=160k counts steps: choose 1 or more")
        return self


class Sweep(Section):
    space: str = Field(min_length=1)
    """A file of `pipelines/recipes/sweeps/`, or `none`: nothing is swept."""
    seeds: Positive
    """Runs of each point, with `pretrain.seed` and the numbers after it."""
    max_trials: NonNegative
    """The budget: trials, epochs of all trials together, hours. Each 0: no limit. Finished trials
    that are taken over cost nothing."""
    max_epochs: NonNegative
    max_hours: Annotated[float, Field(ge=0)]


class Report(Section):
    samples: Annotated[int, Field(ge=1, le=64)]
    """Validation images drawn with predictions beside the truth."""


class Params(Section):
    """All of `params.yaml`: everything that determines what a pipeline run does."""

    recipe: str
    """Name of the recipe that the values were composed from."""
    tasks: tuple[Literal["classify", "detect", "segment"], ...] = Field(min_length=1)
    """The tasks of the pipeline. The stages of the others write only that they were left out."""
    detect_drop_path_rate: dict[str, Annotated[float, Field(ge=0, lt=1)]]
    """What the groups of `detect` take as their `drop_path_rate`, by their name; it depends on the
    size of the model, so a recipe sets it. No stage reads it."""
    storage: Storage
    data: Data
    scaling: Scaling
    loader: Loader
    model: Model
    prepare: Prepare
    build_op: BuildOp
    pretrain: Pretrain
    detect: Detect
    segment: Segment
    sweep: Sweep
    report: Report

    @model_validator(mode="after")
    def consistent(self) -> "Params":
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks={list(self.tasks)} names a task twice")
        for name in ("pretrain", "detect", "segment"):
            section, workers = getattr(self, name), self.scaling.num_workers
            if section.batch_size % (workers * section.accumulate):
                raise ValueError(
                    f"{name}.batch_size={section.batch_size} is the global batch and must be a"
                    f" multiple of scaling.num_workers={workers} times"
                    f" {name}.accumulate={section.accumulate}"
                )
        if self.segment.deterministic and self.scaling.use_gpu:
            raise ValueError(
                "segment.deterministic=true: torch has no deterministic kernels on GPUs for the"
                " pooling and the loss of UPerNet; use false"
            )
        pretrain = self.pretrain
        micro_batch = pretrain.batch_size // (workers * pretrain.accumulate)
        if (pretrain.mixup or pretrain.cutmix) and micro_batch % 2:
            raise ValueError(
                f"pretrain.mixup and pretrain.cutmix mix pairs, and each forward pass has"
                f" {micro_batch} images (pretrain.batch_size / scaling.num_workers /"
                " pretrain.accumulate); make that an even number"
            )
        return self
