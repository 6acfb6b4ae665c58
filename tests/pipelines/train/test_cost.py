"""What training costs, as it is counted."""

import argparse
import math
import sys

import pytest
import timm
import torch

import elsa  # noqa: F401  registers the models
from pipelines.train.cost import EnergyMeter, StepClock, flops_per_image
from pipelines.train.evaluation import amp_dtype

CPU = torch.device("cpu")


def test_energy_is_what_the_gpus_counter_advanced(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML counts millijoules; it is no part of this test, and no GPU."""
    counts = iter([1_000_000, 4_600_000, 4_600_000])

    nvml = argparse.Namespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-a1": 7}[uuid],
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counts),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: argparse.Namespace(uuid="a1")
    )
    meter = EnergyMeter(torch.device("cuda"))
    assert [meter.read(), meter.read()] == [1.0, 0.0]
    monkeypatch.setattr(nvml, "nvmlInit", lambda: (_ for _ in ()).throw(RuntimeError()))
    assert math.isnan(EnergyMeter(torch.device("cuda")).read())
    assert math.isnan(EnergyMeter(CPU).read())


def test_clock_adds_up_phases_over_reads() -> None:
    clock = StepClock(CPU)
    for _ in range(2):
        clock.mark("data")
        clock.mark("optimizer")
        total = clock.read()
    assert set(total) == {"data", "optimizer"}
    assert total == clock.read()


def test_flops_are_those_that_are_published() -> None:
    for name, giga in (("swin_tiny_patch4_window7_224", 4.5), ("elsa_swin_tiny", 4.6)):
        with torch.device("meta"):
            model = timm.create_model(name)
        assert flops_per_image(model, 224) / 2e9 == pytest.approx(giga, rel=0.03)  # as mult-adds


def test_auto_amp_is_none_on_a_cpu() -> None:
    assert amp_dtype("auto", CPU) is None
    assert amp_dtype("float16", CPU) is torch.float16
