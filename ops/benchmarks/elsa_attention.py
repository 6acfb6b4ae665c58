"""Times the operator beside its peers: `python -m ops.benchmarks.elsa_attention --device cpu`.

Peers: autograd through `unfold` (k*k times the memory of v), the depthwise k x k convolution of
the same tensor (it does less: no dynamic weights), and a copy of the bytes that must move once.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import ops

# name, (B, C, G, H, W, kernel_size)
SHAPES = {
    "stage 1": (8, 96, 3, 56, 56, 7),
    "stage 2": (8, 192, 6, 28, 28, 7),
    "stage 3": (8, 384, 12, 14, 14, 7),
    "base stage 1": (8, 128, 4, 56, 56, 7),
    "detection stage 1": (1, 96, 3, 200, 334, 7),
    "kernel 3": (8, 96, 3, 56, 56, 3),
    "kernel 5": (8, 96, 3, 56, 56, 5),
    "kernel 9": (8, 96, 3, 56, 56, 9),
}


class Times(NamedTuple):
    """Milliseconds of the forward and of forward and backward."""

    forward: float
    both: float


def _time(call: Callable[[], object], seconds: float, clock: Callable[[], float]) -> float:
    call()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 3 or (time.perf_counter() < end and len(taken) < 200):
        start = clock()
        call()
        taken.append(clock() - start)
    # The lower quartile: neighbours on the machine only ever add time.
    return 1e3 * (statistics.quantiles(taken, n=4)[0] if len(taken) > 3 else min(taken))


def _measure(
    function: Callable[..., Tensor],
    inputs: list[Tensor],
    seconds: float,
    clock: Callable[[], float],
) -> Times:
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
    upstream = torch.randn_like(function(*inputs))

    def both() -> object:
        return torch.autograd.grad(function(*leaves), leaves, upstream)

    with torch.no_grad():
        forward = _time(lambda: function(*inputs), seconds, clock)
    return Times(forward, _time(both, seconds, clock))


def measure_shape(
    shape: tuple[int, int, int, int, int, int],
    dtype: torch.dtype,
    seconds: float,
    clock: Callable[[], float],
    unfold: bool = True,
) -> dict[str, Times]:
    """Times of ours and the peers for one shape, with `ghost_add` only, as in ELSA-Swin."""
    batch, channels, heads, height, width, k = shape
    v = torch.randn(batch, channels, height, width, dtype=dtype)
    h = torch.randn(batch, heads, k * k, height, width).softmax(2).to(dtype).contiguous()
    add = torch.randn(channels, k, k, dtype=dtype)

    def ours(v: Tensor, h: Tensor, add: Tensor) -> Tensor:
        return ops.elsa_attention(v, h, None, add, kernel_size=k)

    def unfolded(v: Tensor, h: Tensor, add: Tensor) -> Tensor:
        window = F.unfold(v, k, padding=k // 2)
        window = window.view(batch, heads, channels // heads, k * k, height, width)
        weight = h.unsqueeze(2) + add.view(1, heads, channels // heads, k * k, 1, 1)
        return (weight * window).sum(3).flatten(1, 2)

    def depthwise(v: Tensor, add: Tensor) -> Tensor:
        return F.conv2d(v, add.unsqueeze(1), padding=k // 2, groups=channels)

    last = v.contiguous(memory_format=torch.channels_last)
    layouts = [_measure(depthwise, [x, add], seconds, clock) for x in (v, last)]
    result = {
        "ours": _measure(ours, [v, h, add], seconds, clock),
        "depthwise": Times(*(min(pair) for pair in zip(*layouts, strict=True))),
    }
    if unfold:
        result["unfold"] = _measure(unfolded, [v, h, add], seconds, clock)
    # Forward: v, h in, out out. Backward: v, h, the gradient in; two gradients out. A copy reads
    # and writes each of its elements.
    once = torch.empty((2 * v.numel() + h.numel()) // 2, dtype=dtype).normal_()
    twice = torch.empty((5 * v.numel() + 3 * h.numel()) // 2, dtype=dtype).normal_()
    result["bytes"] = Times(
        _time(lambda: torch.empty_like(once).copy_(once), seconds, clock),
        _time(lambda: torch.empty_like(twice).copy_(twice), seconds, clock),
    )
    return result


def cpu_model() -> str:
    """The processor's name, as its maker gives it."""
    try:
        with Path("/proc/cpuinfo").open() as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ops.benchmarks.elsa_attention", description=__doc__
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--seconds", type=float, default=0.5, help="per figure")
    parser.add_argument(
        "--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES), metavar="NAME"
    )
    parser.add_argument("--no-unfold", action="store_true", help="leave out the slow peer")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="this thread's CPU time, for busy machines; needs --threads 1",
    )
    args = parser.parse_args(argv)
    if args.device == "cuda":
        parser.error("the CUDA kernel is not written yet: only --device cpu can be measured")
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time counts one thread: add --threads 1")
    clock = time.thread_time if args.cpu_time else time.perf_counter
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ops.set_backend("compiled")
    ops.elsa_attention(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1), kernel_size=1)

    print(
        f"{cpu_model()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, "
        f"{args.threads} threads, {'CPU' if args.cpu_time else 'wall'} time, {args.dtype}, "
        f"torch {torch.__version__}, {torch.ops.elsa.cpu_instruction_set()}"
    )
    print("ms forward / forward + backward; in brackets the peer's time over ours\n")
    print("| shape (B, C, G, H, W, k) | ours | depthwise | unfold | bytes once |")
    print("|---|---|---|---|---|")
    for name in args.shapes:
        # unfold would take 0.6 GB and more there, three times over.
        big = name == "detection stage 1"
        times = measure_shape(
            SHAPES[name],
            getattr(torch, args.dtype),
            args.seconds,
            clock,
            unfold=not (args.no_unfold or big),
        )
        ours = times["ours"]
        cells = [f"{ours.forward:.2f} / {ours.both:.2f}"]
        for peer in ("depthwise", "unfold", "bytes"):
            if peer in times:
                t = times[peer]
                ratios = f"{t.forward / ours.forward:.2f}x / {t.both / ours.both:.2f}x"
                cells.append(f"{t.forward:.2f} / {t.both:.2f} ({ratios})")
            else:
                cells.append("not run")
        print(f"| {name} {SHAPES[name]} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
