"""ELSA models beside timm's Swin: size, FLOPs, memory, speed. `python -m elsa.benchmarks.models`.

Speeds are medians over rounds in which every model has its turn, so that a busy machine slows all
alike. FLOPs count 2 per multiply-add; papers on these models count 1.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import elsa  # noqa: F401  registers the models
import ops
from ops.benchmarks.bench import cpu_model

SIZES = ("tiny", "small", "base")
PEERS = {f"elsa_swin_{size}": f"swin_{size}_patch4_window7_224" for size in SIZES}
DTYPES = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def count_flops(name: str, img_size: int) -> int:
    """FLOPs of one image's forward; the library of the operator must be loaded."""
    with torch.device("meta"):
        model = timm.create_model(name, img_size=img_size).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, img_size, img_size))
    return counter.get_total_flops()


def activation_bytes(forward: Callable[[Tensor], Tensor], images: Tensor) -> int:
    """What autograd keeps per image between forward and backward.

    The growth from one image to two: parameters, their casts under autocast and masks drop out.

    Args:
        forward: The model in training mode.
        images: (2, C, H, W).
    """

    def saved(x: Tensor) -> int:
        storages: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return t  # held by the graph, so that no address comes twice

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = forward(x)
        del out
        return sum(storages.values())

    return saved(images) - saved(images[:1])


class Runner:
    """One model on its device with all that a step needs."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.device = args.device
        self.dtype = DTYPES[args.amp]
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        self.model = timm.create_model(name, img_size=args.img_size)
        self.model.to(self.device).to(memory_format=layout)  # type: ignore[call-overload]
        self.parameters = sum(p.numel() for p in self.model.parameters())
        shape = (max(args.batch, 2), 3, args.img_size, args.img_size)
        images = torch.randn(shape, device=self.device).to(memory_format=layout)
        self.model.train()
        self.activations = activation_bytes(self.forward, images[:2])
        self.images = images[: args.batch]
        self.labels = torch.zeros(args.batch, dtype=torch.long, device=self.device)
        if args.compile:
            self.model.compile(fullgraph=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.scaler = torch.amp.GradScaler(self.device, enabled=args.amp == "float16")

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, num_classes)."""
        with torch.autocast(self.device, self.dtype, enabled=self.dtype is not None):
            return self.model(images)

    def infer(self) -> None:
        """One batch without gradients."""
        self.model.eval()
        with torch.no_grad():
            self.forward(self.images)

    def train(self) -> None:
        """One training step: forward, backward, AdamW."""
        self.model.train()
        loss = F.cross_entropy(self.forward(self.images).float(), self.labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def seconds(self, step: Callable[[], None]) -> float:
        """Wall time of one step."""
        self.wait()
        start = time.perf_counter()
        step()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def make_runner(name: str, args: argparse.Namespace) -> tuple[Runner, int]:
    """The model, and on CUDA the bytes that its training takes at the peak, weights included."""
    if args.device == "cpu":
        return Runner(name, args), 0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    runner = Runner(name, args)
    for _ in range(2):  # the second step has AdamW's moments beside its activations
        runner.train()
    runner.wait()
    return runner, torch.cuda.max_memory_allocated() - before


def images_per_second(
    runners: dict[str, Runner], step: str, batch: int, repetitions: int
) -> dict[str, float]:
    """Median throughput per model, the models taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for round_ in range(repetitions + 2):
        for name, runner in runners.items():
            seconds = runner.seconds(getattr(runner, step))
            if round_ >= 2:  # the first two warm up
                taken[name].append(seconds)
    return {name: batch / statistics.median(times) for name, times in taken.items()}


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number of at least 1, got {text!r}")
    return int(text)


def _image_size(text: str) -> int:
    value = _positive(text)
    if value % 32:
        raise argparse.ArgumentTypeError(f"{value} is no multiple of 32, the models' last stride")
    return value


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m elsa.benchmarks.models", description=__doc__)
    names = timm.list_models(["elsa_swin_*", "swin_*"])
    default = [name for pair in PEERS.items() for name in pair]
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="+", choices=names, default=default, metavar="NAME")
    parser.add_argument("--amp", choices=list(DTYPES), default="none", help="autocast to this")
    parser.add_argument("--batch", type=_positive, default=8, help="images per step")
    parser.add_argument("--img-size", type=_image_size, default=224)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile(fullgraph=True)")
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=_positive, default=10, help="timed steps per figure")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    try:
        one = torch.ones(1, 1, 1, 1, device=args.device)
        ops.elsa_attention(one, one[None], kernel_size=1)
    except (RuntimeError, FileNotFoundError) as error:
        parser.error(str(error))
    return args


def _speed(speeds: dict[str, float], name: str) -> str:
    peer = PEERS.get(name)
    ratio = f" ({speeds[name] / speeds[peer]:.2f}x)" if peer in speeds else ""
    return f"{speeds[name]:.2f}{ratio}"


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    with ops.use_backend("compiled"):
        args = _parse(argv)
        cuda = args.device == "cuda"
        torch.set_num_threads(args.threads)
        before = os.getloadavg()[0]
        flops = {name: count_flops(name, args.img_size) for name in args.models}
        runners, peaks = {}, {}
        for name in args.models:
            runners[name], peaks[name] = make_runner(name, args)
        infer, train = (
            images_per_second(runners, step, args.batch, args.repetitions)
            for step in ("infer", "train")
        )
        operator = "CUDA kernels" if cuda else torch.ops.elsa.cpu_instruction_set()

    print(f"`python -m elsa.benchmarks.models {shlex.join(argv)}`\n".replace(" `", "`"))
    print(
        f"{torch.cuda.get_device_name() if cuda else cpu_model()}, {os.cpu_count()} CPUs, "
        f"{args.threads} threads, load {before:.1f} before and {os.getloadavg()[0]:.1f} after; "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"timm {timm.__version__}, operator: {operator}. {args.img_size} px, batch {args.batch}, "
        f"amp {args.amp}, medians of {args.repetitions} steps; in brackets over timm's Swin.\n"
    )
    peak = " peak training memory, GB |" if cuda else ""
    print(
        f"| model | parameters, M | GFLOPs | activations, MB/image |{peak} "
        "inference, images/s | training, images/s |"
    )
    print("|---|" + "---:|" * (5 + cuda))
    for name, runner in runners.items():
        cells = [
            name,
            f"{runner.parameters / 1e6:.2f}",
            f"{flops[name] / 1e9:.2f}",
            f"{runner.activations / 1e6:.1f}",
            *([f"{peaks[name] / 1e9:.2f}"] if cuda else []),
            _speed(infer, name),
            _speed(train, name),
        ]
        print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
