"""Estimate what a recipe's training stages will take, before anything is started.

Hours follow from counted FLOPs of the training images and a utilisation (which share of the
GPU's peak is reached, MFU), or from images/s that a short run measured. `pipelines.commands.quote`
measures them where it runs. Memory is that of the
tensors of one training step without any GPU, counted on fake tensors: a real step takes more
(workspaces, fragmentation, buckets of gradients), so leave a fifth free. Evaluation, loading and
start-up are not in it.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ops import StaleLibraryError
from pipelines.data.layout import LAYOUTS
from pipelines.errors import PipelineError
from pipelines.params import Params, compose
from pipelines.paths import ROOT
from pipelines.tasks import TASKS, Task, task_of_stage
from pipelines.tasks.task import Forward
from pipelines.train.cost import BACKWARD_FACTOR, PEAK_FLOPS, model_flops
from pipelines.train.schedule import micro_batch

NODE = 8
"""GPUs of a node."""
BANDWIDTHS = {
    "b200": 8e12,
    "h200": 4.8e12,
    "h100 pcie": 2.0e12,
    "h100": 3.35e12,
    "l40s": 0.864e12,
    "a100": 2.0e12,
    "v100": 0.9e12,
    "l4": 0.3e12,
    "t4": 0.32e12,
}
"""Bytes/s of a GPU's memory, by NVIDIA's data sheets."""
REFERENCE = 400.4 * 3 * 2 * 8.7e9 / 936e9
"""FLOP that training gets per byte that the memory could move: Swin-S at 224 px (8.7 G
multiply-adds) trains with 400 images/s on an RTX 3090 (936 GB/s, AMP, channels_last, no loader), by
https://github.com/huggingface/pytorch-image-models/blob/main/results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv.
That is 29% of its 71 TFLOP/s; newer GPUs have less bandwidth for each of their FLOP/s."""
UNCERTAIN = (1.5, 0.4)
"""The utilisation may be so many times what is assumed. Swin-T's 300 epochs are told to have taken
40 hours on 8 V100, 0.44 times that (https://github.com/WangFeng18/Swin-Transformer/issues/4)."""
INTERCONNECTS = {
    "NVLink 4, 8 x 400 Gb/s": (450e9, 400e9),
    "NVLink 4, 100 Gb/s": (450e9, 12.5e9),
    "PCIe 4, 25 Gb/s": (25e9, 3.125e9),
}
"""Bytes/s that a ring of all-reduces gets within a node, and between nodes (of a node's links
together), by the vendors' numbers. Real ones reach 70 to 90%."""
WATTS = {
    "b200": 1000,
    "h200": 700,
    "h100 pcie": 350,
    "h100": 700,
    "l40s": 350,
    "a100": 400,
    "v100": 300,
    "l4": 72,
    "t4": 70,
}
"""The most that a GPU's board draws, by NVIDIA's data sheets; the SXM kind where there are two."""


@dataclass(frozen=True)
class Machine:
    """What it is to run on."""

    gpus: int
    """All nodes together."""
    gpu: str
    """A key of `PEAK_FLOPS`."""
    utilisation: float
    """Share of the peak, in 0 to 1; `usual_utilisation` where nobody knows better."""
    measured: Mapping[str, float]
    """Images/s of one GPU by stage, instead of FLOPs and utilisation."""
    price: float = 0.0
    """Of one GPU with its share of the node, per hour, in any currency; 0: unknown."""
    carbon: float = 0.0
    """Grams of CO2 per kWh of the electricity; 0: unknown."""


def usual_utilisation(gpu: str) -> float:
    """Share of a GPU's peak that such models reach in training, as far as memory limits them."""
    return min(REFERENCE * BANDWIDTHS[gpu] / PEAK_FLOPS[gpu], 0.5)


def training_images(params: Params, task: Task) -> int:
    """Images of an epoch: of the public data set if the classes are its own, else those prepared.

    Raises:
        PipelineError: other classes, and no data prepared.
    """
    layout = LAYOUTS[task.dataset]
    count = layout.train_images
    if task.section(params).num_classes != layout.classes:
        folder = ROOT / "data" / task.dataset / layout.images["train"]
        count = sum(1 for file in folder.rglob("*") if file.is_file())
        if not count:
            raise PipelineError(
                f"{task.stage}: there are no images in data/{task.dataset} to count",
                "Run `dvc repro prepare` first",
            )
    return count - round(count * getattr(task.section(params), "holdout", 0.0))


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

    The reduction moves 2 (n - 1) / n times the gradients over each link. Training hides most of
    that behind the backward pass, about two thirds of a step.

    Args:
        gradients: bytes.
        step: seconds that a step takes without communication.
        links: bytes/s within a node and between nodes.
    """
    moved = 2 * (gpus - 1) / gpus * gradients
    return step / (step + moved / (links[0] if gpus <= NODE else links[1]))


@dataclass(frozen=True)
class Estimate:
    """Of one stage."""

    row: dict[str, Any]
    hours: float
    between: tuple[float, float]
    scaling: list[dict[str, Any]]
    """Efficiency by interconnect."""


def plan(
    params: Params, machine: Machine, sweep: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One row per training stage, and one per stage and interconnect with the efficiency.

    Args:
        sweep: with a row of the sweep that `sweep.space` names, with all of its seeds.
    """
    found = [estimate(TASKS[name], params, machine) for name in params.tasks]
    if sweep:
        from pipelines.sweeps.cost import all_trials

        trials = all_trials(params)
        one = estimate(task_of_stage(trials.base.stage), trials.base.params, machine)
        found.append(_times(one, trials.in_base, f"sweep, {trials.count} trials", machine))
    hours = sum(one.hours for one in found)
    between = sum(one.between[0] for one in found), sum(one.between[1] for one in found)
    rows = [one.row for one in found]
    rows.append({**dict.fromkeys(rows[0], ""), "stage": "all", **_cost(hours, machine, between)})
    return rows, [row for one in found for row in one.scaling]


def estimate(task: Task, params: Params, machine: Machine) -> Estimate:
    """What a stage takes."""
    section, gpus = task.section(params), machine.gpus
    epochs = section.epochs + getattr(section, "cooldown_epochs", 0)
    batch, passes = micro_batch(section), -(-section.shares // gpus)
    images = training_images(params, task)
    model, forward = task.step_model(params)
    needed = model_flops(model, forward)
    measured = task.stage in machine.measured
    rate = machine.measured[task.stage] if measured else _rate(section, needed, machine)
    speed = rate * section.shares / passes  # of all GPUs: the one with most shares decides
    hours = images * epochs / speed / 3600
    least, most = (1.0, 1.0) if measured else UNCERTAIN
    between = hours / least, hours / most
    ema, half = getattr(section, "model_ema", False), section.amp != "none"
    row = {
        "stage": task.stage,
        "images": f"{images:,}",
        "epochs": epochs,
        "GFLOPs/image": f"{needed / 1e9:.3g}",
        "batch/GPU": f"{batch} x {passes}",
        "images/s": f"{speed:,.0f}",
        **_cost(hours, machine, between),
        "GiB/GPU": f"{memory(model, forward, batch, ema, half):.1f}",
        "from": "measured" if measured else "FLOPs",
    }
    return Estimate(row, hours, between, _scaling(task.stage, model, batch * passes / rate))


def _times(one: Estimate, times: float, name: str, machine: Machine) -> Estimate:
    """So many of a stage, after each other."""
    hours, between = one.hours * times, (one.between[0] * times, one.between[1] * times)
    row = {**one.row, "stage": name, **_cost(hours, machine, between)}
    return Estimate(row, hours, between, [])


def _cost(hours: float, machine: Machine, between: tuple[float, float]) -> dict[str, str]:
    """The columns of what hours on the machine take."""
    low, high = between
    energy = hours * machine.gpus * WATTS[machine.gpu] / 1000
    columns = {"GPU-hours": hours * machine.gpus, "kWh": energy}
    if machine.carbon:
        columns["kg CO2"] = energy * machine.carbon / 1000
    if machine.price:
        columns["price"] = hours * machine.gpus * machine.price
    return {
        "hours": f"{hours:.3g}",
        "hours between": f"{low:.3g} and {high:.3g}" if low < high else "",
        **{name: f"{value:.3g}" for name, value in columns.items()},
    }


def _rate(section: Any, needed: int, machine: Machine) -> float:
    """Images/s of one GPU, by FLOPs."""
    again = 1 if getattr(section, "grad_checkpointing", False) else 0
    return machine.utilisation * PEAK_FLOPS[machine.gpu] / (needed * (BACKWARD_FACTOR + again))


def _scaling(stage: str, model: nn.Module, step: float) -> list[dict[str, Any]]:
    gradients = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return [
        {
            "stage": stage,
            "MB/step": f"{gradients / 1e6:.0f}",
            "ms/step": f"{1000 * step:.0f}",
            "links": name,
            **{
                f"{count} GPUs": f"{efficiency(gradients, step, count, links):.0%}"
                for count in (8, 16, 64)
            },
        }
        for name, links in INTERCONNECTS.items()
    ]


def parse_measured(given: Sequence[str]) -> dict[str, float]:
    """Images/s by stage, of texts such as `pretrain=1800`.

    Raises:
        PipelineError: not of that form, or no training stage.
    """
    stages, found = [task.stage for task in TASKS.values()], {}
    for text in given:
        stage, _, rate = text.partition("=")
        try:
            found[stage] = float(rate)
        except ValueError:
            found[stage] = 0.0
        if stage not in stages or found[stage] <= 0:
            raise PipelineError(
                f"--measured {text}: not of the form STAGE=RATE",
                f"STAGE is one of {', '.join(stages)}, RATE images/s of one GPU",
            )
    return found


def show_plan(
    overrides: Sequence[str], machine: Machine, sweep: bool, notes: Sequence[str] = ()
) -> None:
    """Print the estimate for the parameters of these overrides.

    Args:
        sweep: with the sweep of the recipe.
        notes: where prices are from.

    Raises:
        PipelineError: parameters that do not fit, or no data to count.
    """
    wanted = [f"scaling.num_workers={machine.gpus}", "scaling.use_gpu=true"]
    params = compose([*overrides, *wanted])
    try:
        rows, scaling = plan(params, machine, sweep)
    except StaleLibraryError as error:
        raise PipelineError(str(error)) from None
    low, high = (f"{factor * machine.utilisation:.1%}" for factor in reversed(UNCERTAIN))
    print(
        f"{params.recipe} on {machine.gpus} x {machine.gpu}: an estimate. Rows from FLOPs assume"
        f" {machine.utilisation:.1%} of {PEAK_FLOPS[machine.gpu] / 1e12:.0f} TFLOP/s per GPU,"
        f"\nand lie between those of {high} and {low}: a guess, which --measured replaces, or"
        " --probe on such a machine.\nMemory is the tensors of a step, leave a fifth free; kWh are"
        " the GPUs' boards at full power, without\nhosts and cooling.\n"
    )
    for note in notes:
        print(note)
    print_table(rows)
    print(
        "\nEfficiency with as many images per GPU, if the all-reduce of the gradients (float32) hid"
        "\nbehind nothing; training overlaps, and loses less.\n"
    )
    print_table(scaling)


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows that have the same keys."""
    table = [list(rows[0]), *([str(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
