"""Times the operator beside its peers: `python -m ops.benchmarks.elsa_attention --device cpu`.

Peers in the same run: autograd through `unfold` (k*k times the memory of v), the depthwise k x k
convolution of the same tensor (it does less: no dynamic weights; the faster of both layouts), and
one copy of the bytes that must move. On a GPU also `flex_attention` over the same window (it makes
its weights from queries and keys) and a plain float32 kernel, one thread per output element.
The roofline is the larger of bytes over the copy's bandwidth and operations over the rate of a
large matrix product, both measured here.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import ops

Shape = tuple[int, int, int, int, int, int]
"""(B, C, G, H, W, kernel_size)."""

BIG = 2**31
"""Bytes of the unfolded v beyond which that peer is left out on a CPU."""


class Times(NamedTuple):
    """Milliseconds of the forward, of the backward alone, and of both in one go."""

    forward: float
    backward: float
    both: float


class Limits(NamedTuple):
    """What this machine reaches: bytes and floating-point operations per second."""

    bandwidth: float
    rate: float


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


class Bench:
    """How to time on one device.

    Args:
        device: "cpu" or "cuda".
        seconds: spent on each figure.
        cpu_time: count this thread's CPU time instead of the wall's.
    """

    def __init__(self, device: str, seconds: float, cpu_time: bool = False) -> None:
        self.device, self.seconds = device, seconds
        self.clock = time.thread_time if cpu_time else time.perf_counter

    def time(self, call: Callable[[], object]) -> float:
        """Milliseconds: the lower quartile of many calls, as neighbours only ever add time."""
        for _ in range(1 if self.device == "cpu" else 3):
            call()
        taken: list[float] = []
        end = time.perf_counter() + self.seconds
        while len(taken) < 3 or (time.perf_counter() < end and len(taken) < 200):
            taken.append(self._once(call))
        return statistics.quantiles(taken, n=4)[0] if len(taken) > 3 else min(taken)

    def _once(self, call: Callable[[], object]) -> float:
        if self.device == "cpu":
            start = self.clock()
            call()
            return 1e3 * (self.clock() - start)
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        call()
        end_event.record()
        end_event.synchronize()
        return start_event.elapsed_time(end_event)

    def measure(self, function: Callable[..., Tensor], inputs: list[Tensor]) -> Times:
        """Times of a differentiable function of `inputs`."""
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
        out = function(*leaves)
        upstream = torch.randn_like(out)
        with torch.no_grad():
            forward = self.time(lambda: function(*inputs))
        return Times(
            forward,
            self.time(lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)),
            self.time(lambda: torch.autograd.grad(function(*leaves), leaves, upstream)),
        )

    def copy(self, count: int) -> float:
        """Milliseconds to move `count` bytes: half of them are read, half written."""
        source = torch.empty(max(count // 8, 1), dtype=torch.float32, device=self.device).normal_()
        target = torch.empty_like(source)
        return self.time(lambda: target.copy_(source))

    def limits(self, dtype: torch.dtype) -> Limits:
        """Bandwidth of a large copy and rate of a large matrix product."""
        count, side = (1 << 28, 1024) if self.device == "cpu" else (1 << 31, 8192)
        a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        rate = 2 * side**3 / (1e-3 * self.time(lambda: a @ b))
        return Limits(count / (1e-3 * self.copy(count)), rate)

    def extra_memory(self, function: Callable[..., Tensor], inputs: list[Tensor]) -> float:
        """Peak of forward and backward beyond inputs, outputs and gradients, as a share of those.

        On a CPU with one thread, whose allocations torch's profiler sees all.
        """
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
        upstream = torch.randn_like(function(*inputs))

        def call() -> None:
            out = function(*leaves)
            torch.autograd.grad(out, leaves, upstream)

        results = upstream.nbytes + sum(t.nbytes for t in inputs)
        needed = results + upstream.nbytes + sum(t.nbytes for t in inputs)
        if self.device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            return (torch.cuda.max_memory_allocated() - before - results) / needed
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as profile:
                call()
        finally:
            torch.set_num_threads(threads)
        assert profile.profiler is not None
        kineto: object = profile.profiler.kineto_results
        changes = sorted(
            (event.start_ns(), event.nbytes())
            for event in kineto.events()  # type: ignore[attr-defined]
            if event.name() == "[memory]"
        )
        now = peak = 0
        for _, change in changes:
            now += change
            peak = max(peak, now)
        return (peak - results) / needed


def _unfolded(shape: Shape) -> Callable[..., Tensor]:
    batch, channels, heads, height, width, k = shape

    def function(v: Tensor, h: Tensor, add: Tensor) -> Tensor:
        window = F.unfold(v, k, padding=k // 2)
        window = window.view(batch, heads, channels // heads, k * k, height, width)
        weight = h.unsqueeze(2) + add.view(1, heads, channels // heads, k * k, 1, 1)
        return (weight * window).sum(3).flatten(1, 2)

    return function


def _neighbourhood(shape: Shape) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    *_, height, width, k = shape

    def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        near_y = (q // width - kv // width).abs() <= k // 2
        return near_y & ((q % width - kv % width).abs() <= k // 2)

    block_mask = create_block_mask(mask, None, None, height * width, height * width, device="cuda")
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def _plain_kernel() -> Callable[..., Tensor]:
    from torch.utils.cpp_extension import load

    source = Path(__file__).with_name("plain_kernel.cu")
    library = load("elsa_plain_kernel", [str(source)], extra_cuda_cflags=["-O3"])

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v, h, add, k):
            ctx.save_for_backward(v, h, add)
            ctx.k = k
            return library.forward(v, h, add, k)

        @staticmethod
        def backward(ctx, grad):
            return (*library.backward(grad, *ctx.saved_tensors, ctx.k), None)

    return Plain.apply


def measure_shape(
    bench: Bench,
    shape: Shape,
    dtype: torch.dtype,
    limits: Limits,
    unfold: bool = True,
    plain: Callable[..., Tensor] | None = None,
) -> tuple[dict[str, Times], dict[str, float]]:
    """Times of ours, the peers and the limits, with `ghost_add` only, as in ELSA-Swin; and the
    extra memory of ours and of `unfold`."""
    batch, channels, heads, height, width, k = shape
    v = torch.randn(batch, channels, height, width, device=bench.device).to(dtype)
    h = torch.randn(batch, heads, k * k, height, width, device=bench.device).softmax(2).to(dtype)
    add = torch.randn(channels, k, k, device=bench.device).to(dtype)

    def ours(v: Tensor, h: Tensor, add: Tensor) -> Tensor:
        return ops.elsa_attention(v, h, None, add, kernel_size=k)

    def depthwise(v: Tensor, add: Tensor) -> Tensor:
        return F.conv2d(v, add.unsqueeze(1), padding=k // 2, groups=channels)

    last = v.contiguous(memory_format=torch.channels_last)
    layouts = [bench.measure(depthwise, [x, add]) for x in (v, last)]
    times = {
        "ours": bench.measure(ours, [v, h, add]),
        "depthwise": Times(*(min(pair) for pair in zip(*layouts, strict=True))),
    }
    memory = {"ours": bench.extra_memory(ours, [v, h, add])}
    if unfold:
        times["unfold"] = bench.measure(_unfolded(shape), [v, h, add])
        memory["unfold"] = bench.extra_memory(_unfolded(shape), [v, h, add])
    if bench.device == "cuda":
        depth = channels // heads
        size = (batch, heads, height * width, depth)
        qkv = [torch.randn(size, dtype=dtype, device="cuda") for _ in range(3)]
        times["flex_attention"] = bench.measure(_neighbourhood(shape), qkv)
    if plain is not None:
        wide = [t.float() for t in (v, h, add)]
        times["plain float32"] = bench.measure(lambda *t: plain(*t, k), wide)
    moved = bytes_moved(shape, v.element_size())
    times["copy"] = Times(*(bench.copy(count) for count in moved))
    times["roofline"] = Times(
        *(
            1e3 * max(count / limits.bandwidth, work / limits.rate)
            for count, work in zip(moved, operations(shape), strict=True)
        )
    )
    return times, memory


def cpu_model() -> str:
    """The name of this machine's processor."""
    try:
        with Path("/proc/cpuinfo").open() as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


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


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit status."""
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
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="this thread's CPU time, for busy machines; needs --threads 1",
    )
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if args.cpu_time and (cuda or args.threads != 1):
        parser.error("--cpu-time counts one thread of a CPU: add --threads 1")
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    dtype = getattr(torch, args.dtype)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ops.set_backend("compiled")
    one = torch.zeros(1, 1, 1, 1, device=args.device)
    ops.elsa_attention(one, one.unsqueeze(0), kernel_size=1)

    bench = Bench(args.device, args.seconds, args.cpu_time)
    limits = bench.limits(dtype)
    plain = _plain_kernel() if cuda else None
    given = sys.argv[1:] if argv is None else argv
    print(f"    {parser.prog} {shlex.join(given)}\n")
    print(_describe(args))
    print(
        f"limits: copy {limits.bandwidth / 1e9:.1f} GB/s, product {limits.rate / 1e9:.0f} GFLOP/s"
    )
    print("ms; in brackets that time over ours, so that more than 1x means that ours is faster")
    peers = ["depthwise", "unfold", *(["flex_attention", "plain float32"] if cuda else [])]
    columns = [*peers, "copy", "roofline"]
    print(f"\n| shape (B, C, G, H, W, k) | pass | ours | {' | '.join(columns)} | extra memory |")
    print("|---" * (len(columns) + 4) + "|")
    for name in args.shapes:
        shape = shapes(args.batch or (64 if cuda else 8))[name]
        batch, channels, _, height, width, k = shape
        unfolded = math.prod((batch, channels, height, width, k, k)) * dtype.itemsize
        unfold = not args.no_unfold and (cuda or unfolded < BIG)
        times, memory = measure_shape(bench, shape, dtype, limits, unfold, plain)
        for row in Times._fields:
            own = getattr(times["ours"], row)
            cells = [f"{name} {shape}" if row == "forward" else "", row, f"{own:.3g}"]
            for column in columns:
                theirs = getattr(times[column], row) if column in times else None
                cells.append(f"{theirs:.3g} ({theirs / own:.2f}x)" if theirs else "not run")
            extra = ", ".join(f"{who} {100 * share:.0f}%" for who, share in memory.items())
            cells.append(extra if row == "both" else "")
            print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
