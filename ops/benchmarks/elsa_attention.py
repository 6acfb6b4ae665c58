"""Times the operator beside its peers: `python -m ops.benchmarks.elsa_attention --device cpu`.

Peers in the same run: autograd through `unfold` (k*k times the memory of v), the depthwise k x k
convolution of the same tensor (it does less: no dynamic weights; the faster of both layouts), and
one copy of the bytes that must move. On a GPU also `flex_attention` over the same window (it makes
its weights from queries and keys), NATTEN's product if that is installed, and a plain float32
kernel, one thread per output element. The roofline is the larger of bytes over the copy's bandwidth
and operations over the rate of a large matrix product, both measured here.

On a GPU the figures are device times with a cold cache: events behind a busy GPU, medians.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ops
from ops.benchmarks import peers
from ops.benchmarks.bench import Bench, Limits, Times, cpu_model
from ops.benchmarks.peers import Peer, Shape

BIG = 2**31
"""Bytes of the unfolded v beyond which that peer is left out on a CPU."""
COLUMNS = {
    "cpu": ("depthwise", "unfold", "copy", "roofline"),
    "cuda": (
        "depthwise",
        "unfold",
        "flex_attention",
        "NATTEN",
        "plain float32",
        "ours, channels_last",
        "copy",
        "roofline",
    ),
}


def shapes(batch: int) -> dict[str, Shape]:
    """The shapes of ELSA-Swin at 224 px, of the detection backbone, and of other kernels."""
    named: dict[str, Shape] = {}
    for model, width in (("tiny, small", 96), ("base", 128)):
        for stage in range(3):
            side, channels = 56 >> stage, width << stage
            named[f"{model} stage {stage + 1}"] = (batch, channels, channels // 32, side, side, 7)
    for stage, (height, width) in enumerate(((200, 334), (100, 167), (50, 84))):
        channels = 96 << stage
        named[f"800 x 1333 stage {stage + 1}"] = (1, channels, channels // 32, height, width, 7)
    for k in (3, 5, 9):
        named[f"kernel {k}"] = (batch, 96, 3, 56, 56, k)
    return named


def bytes_moved(shape: Shape, size: int) -> tuple[int, int, int]:
    """Bytes that must move once: forward, backward, both. `size` is that of an element.

    Forward: v and h_attn in, the output out. Backward: v, h_attn and the output's gradient in,
    the gradients of v and h_attn out. The ghost head is small.
    """
    batch, channels, heads, height, width, k = shape
    v, h = (size * batch * planes * height * width for planes in (channels, heads * k * k))
    return 2 * v + h, 3 * v + 2 * h, 5 * v + 3 * h


def operations(shape: Shape) -> tuple[int, int, int]:
    """Floating-point operations with `ghost_add`: forward, backward, both.

    Forward: weight (an addition) times value (a multiply-add). Backward: the same for v, a
    multiply-add each for h_attn and ghost_add.
    """
    batch, channels, _, height, width, k = shape
    products = batch * channels * height * width * k * k
    return 3 * products, 7 * products, 10 * products


@dataclass
class Measured:
    """What one shape gave."""

    times: dict[str, Times] = field(default_factory=dict)
    """Of ours, the peers and the limits; one that could not run is missing."""
    memory: dict[str, float] = field(default_factory=dict)
    """Extra memory of ours and of `unfold`, as a share of inputs, outputs and gradients."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why a peer is missing."""


def measure_shape(
    bench: Bench, shape: Shape, dtype: torch.dtype, limits: Limits, with_unfold: bool = True
) -> Measured:
    """Times of ours, the peers and the limits, with `ghost_add` only, as in ELSA-Swin."""
    batch, channels, heads, height, width, k = shape
    v = torch.randn(batch, channels, height, width, device=bench.device).to(dtype)
    h = torch.randn(batch, heads, k * k, height, width, device=bench.device).softmax(2).to(dtype)
    add = torch.randn(channels, k, k, device=bench.device).to(dtype)
    last = v.contiguous(memory_format=torch.channels_last)

    def ours(v: Tensor, h: Tensor, add: Tensor) -> Tensor:
        return ops.elsa_attention(v, h, None, add, kernel_size=k)

    found = Measured()
    found.times["ours"] = bench.measure(ours, [v, h, add])
    found.memory["ours"] = bench.extra_memory(ours, [v, h, add])
    layouts: list[Times] = []
    for x in (v, last):
        make = partial(peers.depthwise, shape, x, add)
        if times := _guarded(bench, found, "depthwise", make):
            layouts.append(times)
    if layouts:
        found.times["depthwise"] = Times(*(min(column) for column in zip(*layouts, strict=True)))
    if with_unfold:
        _guarded(bench, found, "unfold", lambda: peers.unfold(shape, v, h, add), memory=True)
    if bench.cuda:
        _guarded(bench, found, "flex_attention", lambda: peers.flex_attention(shape, dtype))
        _guarded(bench, found, "NATTEN", lambda: peers.natten(shape, dtype))
        _guarded(bench, found, "plain float32", lambda: peers.plain_kernel(shape, v, h, add))
        _guarded(bench, found, "ours, channels_last", lambda: (ours, [last, h, add]))
    moved = bytes_moved(shape, v.element_size())
    found.times["copy"] = Times(*(bench.copy(count) for count in moved))
    work = zip(moved, operations(shape), strict=True)
    bounds = (1e3 * max(b / limits.bandwidth, w / limits.rate) for b, w in work)
    found.times["roofline"] = Times(*bounds)
    return found


def _guarded(
    bench: Bench, found: Measured, name: str, make: Callable[[], Peer], memory: bool = False
) -> Times | None:
    """Times of a peer into `found`; one that fails is noted, and the others still run."""
    try:
        function, inputs = make()
        found.times[name] = bench.measure(function, inputs)
        if memory:
            found.memory[name] = bench.extra_memory(function, inputs)
    # Whatever a peer raises: other people's code, and a table that must not end with it.
    except Exception as error:
        found.times.pop(name, None)
        found.missing[name] = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
    finally:
        if bench.cuda:
            torch.cuda.empty_cache()
    return found.times.get(name)


def _describe(args: argparse.Namespace) -> str:
    software = f"torch {torch.__version__}, Python {platform.python_version()}"
    if args.device == "cuda":
        name = torch.cuda.get_device_name()
        return f"{name}, CUDA {torch.version.cuda}, {software}, {args.dtype}"
    return (
        f"{cpu_model()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, "
        f"{args.threads} threads, {'CPU' if args.cpu_time else 'wall'} time, {args.dtype}, "
        f"{software}, {torch.ops.elsa.cpu_instruction_set()}"
    )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ops.benchmarks.elsa_attention", description=__doc__
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="default: float32 on a CPU, bfloat16 on a GPU",
    )
    parser.add_argument("--batch", type=int, help="images at 224 px; default: 8, 64 on a GPU")
    parser.add_argument("--seconds", type=float, default=0.5, help="per figure")
    parser.add_argument(
        "--shapes", nargs="*", choices=list(shapes(1)), default=list(shapes(1)), metavar="NAME"
    )
    parser.add_argument("--no-unfold", action="store_true", help="leave out the slow peer")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument(
        "--once",
        action="store_true",
        help="run ours once, forward and backward, and time nothing: for a profiler's counters",
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="this thread's CPU time, for busy machines; needs --threads 1",
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if args.cpu_time and (args.device == "cuda" or args.threads != 1):
        parser.error("--cpu-time counts one thread of a CPU: add --threads 1")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.batch = args.batch or (64 if args.device == "cuda" else 8)
    return args


def _run_once(args: argparse.Namespace) -> None:
    for name in args.shapes:
        batch, channels, heads, height, width, k = shapes(args.batch)[name]
        like = {"device": args.device, "dtype": getattr(torch, args.dtype)}
        planes = torch.randn(batch, channels, height, width, **like)
        logits = torch.rand(batch, height, width, heads, k * k, **like).permute(0, 3, 4, 1, 2)
        add = torch.randn(channels, k, k, **like).requires_grad_()
        for layout in (torch.contiguous_format, torch.channels_last):
            v = planes.contiguous(memory_format=layout).requires_grad_()
            h = ops.window_softmax(logits.requires_grad_())
            out = ops.elsa_attention(v, h, None, add, kernel_size=k)
            out.backward(torch.ones_like(out))
        print(f"{name}: forward and backward, once in either layout")


def _rows(name: str, shape: Shape, found: Measured, columns: tuple[str, ...]) -> list[str]:
    rows = []
    for which in Times._fields:
        own = getattr(found.times["ours"], which)
        cells = [f"{name} {shape}" if which == "forward" else "", which, f"{own:.3g}"]
        for column in columns:
            theirs = getattr(found.times[column], which) if column in found.times else None
            cells.append(f"{theirs:.3g} ({theirs / own:.2f}x)" if theirs else "not run")
        extra = ", ".join(f"{who} {100 * share:.0f}%" for who, share in found.memory.items())
        cells.append(extra if which == "both" else "")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    args = _parse(argv)
    dtype = getattr(torch, args.dtype)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ops.set_backend("compiled")
    one = torch.zeros(1, 1, 1, 1, device=args.device)
    ops.elsa_attention(one, one.unsqueeze(0), kernel_size=1)
    if args.once:
        _run_once(args)
        return 0
    bench = Bench(args.device, args.seconds, args.cpu_time)
    limits = bench.limits(dtype)
    given = shlex.join(sys.argv[1:] if argv is None else argv)
    print(f"    python -m ops.benchmarks.elsa_attention {given}\n")
    print(_describe(args))
    print(
        f"limits: copy {limits.bandwidth / 1e9:.1f} GB/s, product {limits.rate / 1e9:.0f} GFLOP/s"
    )
    print("ms; in brackets that time over ours, so that more than 1x means that ours is faster")
    columns = COLUMNS[args.device]
    print(f"\n| shape (B, C, G, H, W, k) | pass | ours | {' | '.join(columns)} | extra memory |")
    print("|---" * (len(columns) + 4) + "|")
    figures: dict[str, Any] = {"device": _describe(args), "limits": limits._asdict(), "shapes": {}}
    missing: dict[str, str] = {}
    for name in args.shapes:
        shape = shapes(args.batch)[name]
        batch, channels, _, height, width, k = shape
        unfolded = math.prod((batch, channels, height, width, k, k)) * dtype.itemsize
        with_unfold = not args.no_unfold and (bench.cuda or unfolded < BIG)
        found = measure_shape(bench, shape, dtype, limits, with_unfold)
        print("\n".join(_rows(name, shape, found, columns)), flush=True)
        missing |= {f"{who} at {name}": why for who, why in found.missing.items()}
        times = {who: t._asdict() for who, t in found.times.items()}
        figures["shapes"][name] = {"shape": shape, "ms": times, "extra_memory": found.memory}
        if args.json:  # after each shape, so that a time limit loses one and not all
            args.json.write_text(json.dumps(figures | {"missing": missing}, indent=2) + "\n")
    for who, why in missing.items():
        print(f"\n{who} did not run: {why}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
