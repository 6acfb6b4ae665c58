"""The parameters of the three stages that train."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipelines.schema.values import Fraction, NonNegative, Positive, Rate, Section

DEMO_CLASSES = 11
"""Of the demo's segmentation: ten digits and the background."""


class Training(Section):
    """What the three training stages share; `batch_size` is global, over all workers."""

    seed: NonNegative
    epochs: Positive
    batch_size: Positive
    shares: Positive
    """Passes of equal size that a step's batch is split into. Each has its own random numbers, and
    is the unit of batch norm. Workers take one or more of them, and the result is the same whoever
    takes which: so a smaller GPU or fewer of them need more shares or more time, not other
    parameters. At least as many as `scaling.num_workers`."""
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
    opt_kwargs: dict[str, Any]
    """Further arguments of timm's optimizer, such as `{betas: [0.9, 0.98]}`."""
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    """Each layer's learning rate is that of the layer above it times this; 1: all have the same."""
    clip_mode: Literal["norm", "value", "agc"]
    """How `clip_grad` clips: the norm of all gradients, each value, or adaptively, unit by unit
    (AGC, arXiv 2102.06171)."""
    sched: Literal["cosine", "step", "poly", "tanh"]
    sched_on_updates: bool
    """The schedule moves with every step; false moves it once per epoch, timm's default."""
    warmup_epochs: NonNegative
    warmup_lr: Rate
    min_lr: Rate
    cooldown_epochs: NonNegative
    smoothing: Annotated[float, Field(ge=0, lt=1)]
    bce_loss: bool
    """Binary cross-entropy of each class instead of cross-entropy (arXiv 2110.00476)."""
    bce_target_thresh: Fraction | None
    """With it a mixed or smoothed target above this is 1, and 0 below."""
    mixup: Annotated[float, Field(ge=0)]
    cutmix: Annotated[float, Field(ge=0)]
    mixup_prob: Fraction
    """Share that is mixed."""
    mixup_switch_prob: Fraction
    """Of what is mixed, the share by CutMix, where both can be."""
    mixup_mode: Literal["batch", "pair", "elem"]
    """What is mixed, or not, by one draw: a batch, a pair of images, an image."""
    mixup_off_epoch: NonNegative
    """Epochs after which nothing is mixed any more; 0: all of them mix."""
    aug_repeats: Positive
    """Copies of an image side by side in the epoch's order, each augmented on its own (repeated
    augmentation, arXiv 1901.09335). An epoch has as many steps as without."""
    aa: str
    """timm's auto-augment policy, such as `rand-m9-mstd0.5-inc1`; empty for none."""
    reprob: Fraction
    color_jitter: Annotated[float, Field(ge=0)]
    """Used where `aa` is empty or has timm's 3-augment."""
    grayscale_prob: Fraction
    gaussian_blur_prob: Fraction
    hflip: Fraction
    vflip: Fraction
    scale_min: Annotated[float, Field(gt=0, le=1)]
    train_interpolation: Literal["bicubic", "bilinear", "nearest", "random"]
    """Of the training crops and their RandAugment; random: bilinear or bicubic, image by image."""
    interpolation: Literal["bicubic", "bilinear", "nearest"]
    """Of the evaluated images."""
    train_crop_mode: Literal["rrc", "rkrc", "rkrr"]
    """Random-resized crop; or, with the ratio nearly kept, a centre or a random crop, for which
    timm has `scale_min` at 0.8."""
    crop_mode: Literal["center", "squash", "border"]
    """Of the evaluated images: a centre crop, both sides scaled, or a border added."""
    crop_pct: Annotated[float, Field(gt=0, le=1)]
    model_ema: bool
    model_ema_decay: Annotated[float, Field(gt=0, lt=1)]
    grad_checkpointing: bool
    """Recompute activations in the backward pass: less memory, about a third more time."""
    channels_last: bool
    compile: bool
    """`torch.compile` of the training step's forward and backward."""
    teacher: str | None
    """A classifier to learn from as well, by distillation of its logits: a folder that `pretrain`
    wrote (relative to the repository), or a model of timm, whose pretrained weights are downloaded.
    DVC compares the name alone. Null: none."""
    distill_loss_weight: Annotated[float, Field(ge=0)]
    """Of the teacher's part of the loss."""
    task_loss_weight: Annotated[float, Field(ge=0)]
    """Of the labels' part, where there is a teacher."""
    kd_temperature: Annotated[float, Field(gt=0)]
    """Softmax temperature of student and teacher, as they are compared."""
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
    """Start the backbone from `weights`; false starts it from scratch."""
    weights: str = Field(min_length=1)
    """A checkpoint whose backbone to start from: a classifier, a detector or a segmentor, published
    or ours, as a file or a folder that a stage wrote. `weights/pretrain` is what `pretrain` leaves.
    DVC compares its content."""
    init_from: Literal["backbone", "model"]
    """What of `weights` is taken: the backbone; or the neck and heads of a detector or segmentor as
    well, but for layers of other shapes or other classes, which begin at random."""
    config: str = Field(min_length=1)
    """The folder with the configs of all methods and schedules; or, with `method: config`, a config
    file for mmdet or mmseg (relative to the repository), whose model is trained with the project's
    backbones, data and schedule. DVC compares the file's content, but not that of files beside it
    that it is based on."""
    cfg_options: dict[str, Any]
    """Changes to the config of the method and schedule, as mmdet's and mmseg's `--cfg-options` take
    them: `{model.rpn_head.anchor_generator.scales: [4]}`. What is a parameter here is set after."""
    with_cp: bool
    """Recompute the backbone's activations in the backward pass, to save memory."""
    img_size: Annotated[int, Field(ge=32)]
    """Short side of the evaluated images; the config's other sizes scale with it."""
    warmup_iters: NonNegative
    """Optimizer steps."""
    val_interval: Positive
    """Epochs between evaluations; the last epoch is always evaluated."""

    @model_validator(mode="after")
    def own_config(self) -> "Downstream":
        if self.config.endswith(".py") != (self.method == "config"):
            raise ValueError(
                f"method={self.method} with config={self.config}: method=config goes with the path"
                " of a config file (.py), and the other methods with the project's own configs"
            )
        if self.init_from == "model" and not self.pretrained:
            raise ValueError("init_from=model takes weights: set pretrained=true and weights")
        return self


class Detect(Downstream):
    method: Literal["mask-rcnn", "cascade-mask-rcnn", "faster-rcnn", "cascade-rcnn", "config"]
    """Those with a mask in their name learn masks, the others boxes only. config: what the file
    `config` has; it learns masks if it loads them."""
    schedule: Literal["1x", "3x", "demo", "finetune"]
    milestones: tuple[Positive, ...]
    """Epochs after which a stepped schedule lowers the learning rate to a tenth."""


class Segment(Downstream):
    method: Literal["upernet", "config"]
    """config: what the file `config` has."""
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
