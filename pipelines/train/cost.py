"""What training costs: the time of a step's phases, FLOPs, and the peak of a GPU."""

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

BACKWARD_FACTOR = 3
"""A backward pass multiplies twice as much as its forward pass. Recomputing does not count."""

PEAK_FLOPS = {
    "b200": 2250e12,
    "h200": 989e12,
    "h100 pcie": 756e12,
    "h100": 989e12,
    "l40s": 362e12,
    "a100": 312e12,
    "v100": 125e12,
    "l4": 121e12,
    "t4": 65e12,
}
"""Dense tensor-core FLOP/s of bfloat16 or float16, by NVIDIA's data sheets. The first name that
occurs in the device's name counts."""


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of a GPU in bfloat16 or float16; None if it is not in the table."""
    return next((v for k, v in PEAK_FLOPS.items() if k in device_name.lower()), None)


def forward_flops(call: Callable[[], Any]) -> int:
    """Multiplications and additions of matrix products, convolutions and ELSA in `call()`."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def model_flops(
    model: nn.Module, forward: Callable[[nn.Module, int, torch.device], list[Tensor]]
) -> int:
    """FLOPs of one image's forward pass.

    Args:
        forward: outputs of a model for a number of empty images on a device.
    """
    meta, device = copy.deepcopy(model).to("meta").eval(), torch.device("meta")
    with torch.no_grad():
        return forward_flops(lambda: forward(meta, 1, device))


@torch.no_grad()
def flops_per_image(model: nn.Module, img_size: int) -> int:
    """FLOPs of one image's forward pass through a model on the `meta` device."""
    image = torch.empty(1, 3, img_size, img_size, device="meta")
    return forward_flops(lambda: model.eval()(image))


class EnergyMeter:
    """Energy that a GPU has drawn, by its own counter (NVML, since Volta)."""

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = None
        if device.type != "cuda":
            return
        import pynvml

        self._nvml = pynvml
        with suppress(pynvml.NVMLError):  # an older or a virtual GPU has no counter
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._last = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            self._handle = handle

    def read(self) -> float:
        """Watt-hours since the last call; NaN where the GPU does not tell."""
        if self._handle is None:
            return math.nan
        now = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        drawn, self._last = now - self._last, now
        return drawn / 3.6e6  # from millijoules


class StepClock:
    """Where the time of a step goes: wall time on a CPU, CUDA events on a GPU.

    Events time the GPU without waiting for it; `data` is then the time that it had no work.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._stamps: list[tuple[str, Any]] = [("", self._now())]
        self._seconds: dict[str, float] = defaultdict(float)

    def mark(self, phase: str) -> None:
        """The time since the last mark was spent on `phase`."""
        self._stamps.append((phase, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds of each phase so far. On a GPU this waits until it has done what was asked."""
        if self._cuda:
            self._stamps[-1][1].synchronize()
        for (_, before), (phase, now) in zip(self._stamps, self._stamps[1:], strict=False):
            self._seconds[phase] += before.elapsed_time(now) / 1000 if self._cuda else now - before
        self._stamps = self._stamps[-1:]
        return dict(self._seconds)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
