"""Estimate what a recipe's training stages will take, before anything is started.

Hours follow from counted FLOPs of the training images and a utilisation (which share of the
GPU's peak is reached, MFU), or from images/s that a short run measured. Memory is that of the
tensors of one training step without any GPU, counted on fake tensors: a real step takes more
(workspaces, fragmentation, buffers of DDP), so leave a fifth free. Evaluation, loading and
start-up are not in it.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ops import StaleLibraryError
from pipelines.errors import PipelineError
from pipelines.params import Params, load_params, recipe_names
from pipelines.paths import ROOT
from pipelines.train.cost import BACKWARD_FACTOR, PEAK_FLOPS, forward_flops

Forward = Callable[[nn.Module, int, torch.device], list[Tensor]]
"""Outputs of a model for a number of random images on a device."""

PUBLIC = {"pretrain": (1000, 1_281_167), "detect": (80, 117_266), "segment": (150, 20_210)}
"""Classes and training images of ImageNet-1K, COCO 2017 (with objects) and ADE20K."""
IMAGES = {
    "pretrain": "imagenet/train/*/*",
    "detect": "coco/train2017/*",
    "segment": "ade20k/images/training/*",
}
NODE = 8
"""GPUs of a node."""
INTERCONNECTS = {
    "NVLink 4, 8 x 400 Gb/s": (450e9, 400e9),
    "NVLink 4, 100 Gb/s": (450e9, 12.5e9),
    "PCIe 4, 25 Gb/s": (25e9, 3.125e9),
}
"""Bytes/s that a ring of all-reduces gets within a node, and between nodes (of a node's links
together), by the vendors' numbers. Real ones reach 70 to 90%."""
ROIS, MASK_ROIS = 512, 128
"""Regions per training image that mmdet's heads see: all, and those with a mask."""


def training_images(params: Params, stage: str) -> int:
    """Images of an epoch: of the public data set if the classes are its own, else those prepared.

    Raises:
        PipelineError: other classes, and no data prepared.
    """
    classes, count = PUBLIC[stage]
    if getattr(params, stage).num_classes != classes:
        count = sum(1 for _ in (ROOT / "data").glob(IMAGES[stage]))
        if not count:
            raise PipelineError(
                f"{stage}: no images in data/{Path(IMAGES[stage]).parts[0]} to count;"
                " run `dvc repro prepare` first"
            )
    if stage == "pretrain":
        count -= round(count * params.pretrain.holdout)
    return count


def model_of(params: Params, stage: str) -> tuple[nn.Module, Forward]:
    """The stage's model, and how a training step calls it."""
    if stage == "pretrain":
        from pipelines.train.models import build_model

        p = params.pretrain
        model = build_model(params.model, p.num_classes, p.drop_path_rate)
        if p.grad_checkpointing:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        return model, lambda net, n, device: [
            net(torch.empty(n, 3, p.img_size, p.img_size, device=device))
        ]
    from mmengine.registry import MODELS, init_default_scope

    from pipelines.mm.train import Job, build_config

    section = getattr(params, stage)
    classes = tuple(str(i) for i in range(section.num_classes))
    job = Job(stage, params, data="", classes=classes, weights=None)
    config = build_config(job, Path("unused"), params.scaling.num_workers)
    init_default_scope(config.default_scope)
    size = getattr(section, "crop_size", section.img_size)
    return MODELS.build(config.model), (_detect if stage == "detect" else _segment)(size)


def _detect(size: int) -> Forward:
    def forward(net: Any, n: int, device: torch.device) -> list[Tensor]:
        features = net.extract_feat(torch.empty(n, 3, size, size, device=device))
        outputs = list(net.rpn_head(features))
        heads = net.roi_head
        for part, regions in (("bbox", ROIS), ("mask", MASK_ROIS)):
            found = getattr(heads, f"{part}_head")
            extractors = getattr(heads, f"{part}_roi_extractor")
            cascade = isinstance(found, nn.ModuleList)
            for head, extractor in zip(
                found if cascade else [found], extractors if cascade else [extractors], strict=True
            ):
                side = extractor.roi_layers[0].output_size
                shape = (n * regions, extractor.out_channels, *side)
                outputs.append(head(torch.empty(shape, device=device)))
        return _tensors(outputs)

    return forward


def _segment(size: int) -> Forward:
    def forward(net: Any, n: int, device: torch.device) -> list[Tensor]:
        features = net.extract_feat(torch.empty(n, 3, size, size, device=device))
        outputs = [net.decode_head(features)]
        if net.with_auxiliary_head:
            outputs.append(net.auxiliary_head(features))
        return _tensors(outputs)

    return forward


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)]


def flops(model: nn.Module, forward: Forward) -> int:
    """FLOPs of one image's forward pass."""
    meta, device = copy.deepcopy(model).to("meta").eval(), torch.device("meta")
    with torch.no_grad():
        return forward_flops(lambda: forward(meta, 1, device))


def memory(model: nn.Module, forward: Forward, images: int, ema: bool, half: bool) -> float:
    """GiB of the tensors of a training step with AdamW, at their most."""
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    mode, cpu = FakeTensorMode(), torch.device("cpu")
    with FakeCopyMode(mode):
        fake = copy.deepcopy(model).train()
    for module in fake.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.eval()  # there is no process group
    with mode:
        optimizer, tracker = torch.optim.AdamW(fake.parameters()), MemTracker()
        tracker.track_external(fake, optimizer)
        for _ in range(2):  # the first step ends with making the optimizer's state
            tracker.reset_mod_stats()
            with tracker:
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    outputs = forward(fake, images, cpu)
                torch.stack([output.float().sum() for output in outputs]).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                del outputs
    peak = sum(at["Total"] for at in tracker.get_tracker_snapshot("peak").values())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return (peak + weights * ema) / 2**30


def efficiency(gradients: float, step: float, gpus: int, links: tuple[float, float]) -> float:
    """Share of a GPU's own speed that is left among `gpus`, if nothing overlaps.

    The ring all-reduce moves 2 (n - 1) / n times the gradients over each link. DDP hides most of
    that behind the backward pass, about two thirds of a step.

    Args:
        gradients: bytes.
        step: seconds that a step takes without communication.
        links: bytes/s within a node and between nodes.
    """
    moved = 2 * (gpus - 1) / gpus * gradients
    return step / (step + moved / (links[0] if gpus <= NODE else links[1]))


def plan(
    params: Params, gpus: int, gpu: str, utilisation: float, measured: dict[str, float]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One row per training stage, and one per stage and interconnect with the efficiency.

    Args:
        gpu: a key of `PEAK_FLOPS`.
        utilisation: share of the peak, in 0 to 1.
        measured: images/s of one GPU by stage, instead of FLOPs and utilisation.
    """
    rows, scaling = [], []
    for stage in ("pretrain", "detect", "segment"):
        section = getattr(params, stage)
        epochs = section.epochs + getattr(section, "cooldown_epochs", 0)
        accumulate = getattr(section, "accumulate", 1)
        batch = section.batch_size // (gpus * accumulate)
        half = getattr(section, "amp", "auto") != "none"
        images = training_images(params, stage)
        model, forward = model_of(params, stage)
        needed = flops(model, forward)
        rate = measured.get(stage)
        if rate is None:
            again = 1 if getattr(section, "grad_checkpointing", False) else 0
            rate = utilisation * PEAK_FLOPS[gpu] / (needed * (BACKWARD_FACTOR + again))
        hours = images * epochs / (rate * gpus) / 3600
        ema = getattr(section, "model_ema", False)
        rows.append(
            {
                "stage": stage,
                "images": f"{images:,}",
                "epochs": epochs,
                "GFLOPs/image": f"{needed / 1e9:.3g}",
                "batch/GPU": f"{batch} x {accumulate}",
                "images/s": f"{rate * gpus:,.0f}",
                "hours": f"{hours:.3g}",
                "GPU-hours": f"{hours * gpus:.3g}",
                "GiB/GPU": f"{memory(model, forward, batch, ema, half):.1f}",
                "from": "measured" if stage in measured else "FLOPs",
            }
        )
        gradients = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        step = batch * accumulate / rate
        for name, links in INTERCONNECTS.items():
            row = {
                "stage": stage,
                "MB/step": f"{gradients / 1e6:.0f}",
                "ms/step": f"{1000 * step:.0f}",
                "links": name,
            }
            for count in (8, 16, 64):
                row[f"{count} GPUs"] = f"{efficiency(gradients, step, count, links):.0%}"
            scaling.append(row)
    return rows, scaling


def _measured(text: str) -> tuple[str, float]:
    stage, _, rate = text.partition("=")
    if stage not in PUBLIC or not rate or float(rate) <= 0:
        raise ValueError(text)
    return stage, float(rate)


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise ValueError(text)
    return float(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.commands.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m pipelines.commands.plan elsa_swin_tiny --gpus 8 --gpu h100"
        " --measured pretrain=1800",
    )
    parser.add_argument("recipe", choices=recipe_names(), help="alone, without params.yaml")
    parser.add_argument("--gpus", type=int, default=8, help="all nodes together (default 8)")
    parser.add_argument("--gpu", choices=PEAK_FLOPS, default="h100", help="(default h100)")
    parser.add_argument(
        "--utilisation",
        type=_share,
        default=0.3,
        help="share of the peak; an assumption (default 0.3). `pretrain` reports it as mfu, in %%",
    )
    parser.add_argument(
        "--measured",
        type=_measured,
        action="append",
        default=[],
        metavar="STAGE=RATE",
        help="images/s of one GPU in pretrain, detect or segment, such as a run reports"
        " (images_per_second) divided by its GPUs; may be repeated",
    )
    arguments = parser.parse_args()
    if arguments.gpus < 1:
        parser.error("--gpus must be at least 1")
    try:
        params = load_params(arguments.recipe)
        values = params.model_dump()
        values["scaling"]["num_workers"] = arguments.gpus
        try:
            params = Params.model_validate(values)
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise PipelineError(f"--gpus {arguments.gpus}: {message}") from None
        rows, scaling = plan(
            params,
            arguments.gpus,
            arguments.gpu,
            arguments.utilisation,
            dict(arguments.measured),
        )
    except (PipelineError, StaleLibraryError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{arguments.recipe} on {arguments.gpus} x {arguments.gpu}: an estimate. Rows from FLOPs"
        f" assume {arguments.utilisation:.0%} of {PEAK_FLOPS[arguments.gpu] / 1e12:.0f} TFLOP/s"
        " per GPU;\nmemory is the tensors of a step, leave a fifth free.\n"
    )
    _print(rows)
    print(
        "\nEfficiency with as many images per GPU, if the all-reduce of the gradients (float32) hid"
        "\nbehind nothing; DDP overlaps, and loses less.\n"
    )
    _print(scaling)


def _print(rows: list[dict[str, Any]]) -> None:
    table = [list(rows[0]), *([str(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


if __name__ == "__main__":
    main()
