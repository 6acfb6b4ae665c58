"""The schema of `params.yaml`: every parameter, its type and what it may be.

It checks values and computes none: what a parameter means is in the code that uses it.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipelines.schema.training import Detect, Pretrain, Segment
from pipelines.schema.values import NonNegative, Positive, Rate, Section

ELSA_ONLY = {"group_width", "lam", "gamma"}
"""Keys of section `model` that mean nothing with another operator."""


class Storage(Section):
    path: str = Field(min_length=1)
    """Ray Train's storage: a folder (relative to the repository) for checkpoints of runs."""
    checkpoint_minutes: Annotated[float, Field(ge=0)]
    """Minutes between checkpoints within an epoch; 0: only at the end of each."""
    keep_checkpoints: NonNegative
    """The last so many are kept; 0: all, for `elsa verify`."""


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
    """Training continues with as few workers when nodes are lost, and with more when they are
    back, each time from the last checkpoint, to the same result. 0: it waits for `num_workers`;
    so do models with SyncBN on GPUs, which is over one share of every worker."""
    use_gpu: bool
    gpus_per_worker: Annotated[float, Field(gt=0, le=1)]
    """Where `use_gpu`: less than 1 lets several trials of a sweep share a GPU."""
    cpus_per_worker: Positive
    max_failures: NonNegative
    wait_s: NonNegative
    """Seconds that a cluster gets to start the nodes for all workers, before the stage ends with
    what is missing. A local Ray does not grow and is never waited for."""
    hang_s: NonNegative
    """Seconds without a sign of progress, after which a worker tells where it stands and ends like
    one that failed. Compiling a model and computing scores must take less; 0: it may hang."""

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


class Budget(Section):
    """What the training of a stage, or a sweep, may take over all its starts; 0: no limit. It stops
    after a checkpoint before that, and resumes with a larger budget."""

    hours: Annotated[float, Field(ge=0)]
    money: Annotated[float, Field(ge=0)]
    """In the currency of `price`."""
    kwh: Annotated[float, Field(ge=0)]
    price: Annotated[float, Field(ge=0)]
    """Of a worker (a GPU) for an hour."""
    watts: Annotated[float, Field(ge=0)]
    """That a worker draws."""

    @model_validator(mode="after")
    def consistent(self) -> "Budget":
        for limit, rate in (("money", "price"), ("kwh", "watts")):
            if getattr(self, limit) and not getattr(self, rate):
                raise ValueError(f"{limit}={getattr(self, limit)} needs {rate} of a worker")
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


class Sweep(Section):
    space: str = Field(min_length=1)
    """A file of `pipelines/recipes/sweeps/`, or `none`: nothing is swept."""
    seeds: Positive
    """Most runs of each point, with the stage's seed and the numbers after it. A point that is
    decided (`pipelines/results/sequential.py`) gets no more."""
    smallest_difference: Annotated[float, Field(ge=0)]
    """Of the stage's metric, in percent points, that matters: a point is decided, too, once a
    larger one is excluded. 0: any does."""
    max_trials: NonNegative
    """Of trials; 0: no limit. Finished trials that are taken over do not count."""
    max_epochs: NonNegative
    """Of all trials together; 0: no limit. `budget` limits hours, money and energy."""


class Report(Section):
    samples: Annotated[int, Field(ge=1, le=64)]
    """Validation images drawn with predictions beside the truth."""


class Export(Section):
    formats: Annotated[tuple[Literal["onnx", "pt2", "pt2-decomposed"], ...], Field(min_length=1)]
    """`pt2` is compiled for a minute or more, by model and by graph of a detector."""


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
    budget: Budget
    loader: Loader
    model: Model
    prepare: Prepare
    build_op: BuildOp
    pretrain: Pretrain
    detect: Detect
    segment: Segment
    sweep: Sweep
    export: Export
    report: Report

    @model_validator(mode="after")
    def consistent(self) -> "Params":
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks={list(self.tasks)} names a task twice")
        for name in ("pretrain", "detect", "segment"):
            size, shares = getattr(self, name).batch_size, getattr(self, name).shares
            if size % shares:
                fitting = [count for count in range(1, size + 1) if size % count == 0]
                raise ValueError(
                    f"{name}.shares={shares} does not divide {name}.batch_size={size}; choose one"
                    f" of {', '.join(map(str, fitting))}"
                )
            if self.scaling.num_workers > shares:
                raise ValueError(
                    f"scaling.num_workers={self.scaling.num_workers} workers, but {name}.shares="
                    f"{shares}: a worker takes one share of a step or more. Raise shares (another"
                    " result), or use fewer workers (the same result)"
                )
        if self.segment.deterministic and self.scaling.use_gpu:
            raise ValueError(
                "segment.deterministic=true: torch has no deterministic kernels on GPUs for the"
                " pooling and the loss of UPerNet; use false"
            )
        pretrain = self.pretrain
        micro_batch = pretrain.batch_size // pretrain.shares
        if (pretrain.mixup or pretrain.cutmix) and micro_batch % 2:
            raise ValueError(
                f"pretrain.mixup and pretrain.cutmix mix pairs, and each share has {micro_batch}"
                " images (pretrain.batch_size / pretrain.shares); make that an even number"
            )
        return self
