"""Timing on a CPU or a GPU, and what a machine can reach."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

FLUSH = 256 * 2**20
"""Bytes that are written before each timed call on a GPU: several times its cache."""
CYCLES_PER_SECOND = 2e9
"""At most, of a GPU: a wait of so many cycles lasts a second or longer."""


class Times(NamedTuple):
    """Milliseconds of the forward, of the backward alone, and of both in one go."""

    forward: float
    backward: float
    both: float


class Limits(NamedTuple):
    """What this machine reaches: bytes and floating-point operations per second."""

    bandwidth: float
    rate: float


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
        self._flush = torch.empty(FLUSH, dtype=torch.int8, device=device) if self.cuda else None

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def time(self, call: Callable[[], object]) -> float:
        """Milliseconds of one call.

        On a CPU the lower quartile of many, as neighbours only ever add time. On a GPU the median
        of device times, with nothing of the call's data in the cache.
        """
        for _ in range(3 if self.cuda else 1):
            call()
        if self.cuda:
            return statistics.median(self._device_times(call))
        taken: list[float] = []
        end = time.perf_counter() + self.seconds
        while len(taken) < 3 or (time.perf_counter() < end and len(taken) < 200):
            start = self.clock()
            call()
            taken.append(1e3 * (self.clock() - start))
        return statistics.quantiles(taken, n=4)[0] if len(taken) > 3 else min(taken)

    def _device_times(self, call: Callable[[], object]) -> list[float]:
        """Each between two events that the host has queued before the GPU reaches the first, so
        that no launch and no Python is in it."""
        torch.cuda.synchronize()
        before = time.perf_counter()
        call()
        queueing = time.perf_counter() - before
        cycles = int((2 * queueing + 2e-4) * CYCLES_PER_SECOND)
        assert self._flush is not None
        taken: list[float] = []
        end = time.perf_counter() + self.seconds
        while len(taken) < 5 or (time.perf_counter() < end and len(taken) < 100):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            torch.cuda._sleep(cycles)
            start.record()
            call()
            stop.record()
            late = start.query()  # the GPU was there before the whole call was queued
            stop.synchronize()
            if late and cycles > CYCLES_PER_SECOND:
                raise RuntimeError("the call waits for the GPU, so that it has no device time")
            if late:
                cycles *= 2
                continue
            taken.append(start.elapsed_time(stop))
        return taken

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
        count, side = (1 << 31, 8192) if self.cuda else (1 << 28, 1024)
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
        if not self.cuda:
            return (_peak_on_cpu(call) - results) / needed
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before - results) / needed


def _peak_on_cpu(call: Callable[[], None]) -> int:
    """Bytes allocated at most at a time within the call, by one thread."""
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
    return peak


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
