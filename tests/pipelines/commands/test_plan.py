"""The estimate before a run: its arithmetic, and that it moves as a real step would."""

import subprocess
import sys

import pytest

from pipelines.commands import plan
from pipelines.errors import PipelineError
from pipelines.params import Params, compose
from pipelines.paths import ROOT
from pipelines.sweeps.cost import all_trials
from pipelines.tasks import TASKS
from pipelines.train.cost import PEAK_FLOPS

pytestmark = pytest.mark.usefixtures("compiled_library")


def smoke(**pretrain) -> Params:
    values = compose(["recipe=smoke"]).model_dump()
    values["pretrain"] |= pretrain
    return Params.model_validate(values)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds, and a test of its own looks at it."""
    monkeypatch.setattr(plan, "memory", lambda *arguments: 1.0)


def test_rows_follow_from_flops_or_a_measured_rate(monkeypatch, no_memory) -> None:
    monkeypatch.setattr(plan, "training_images", lambda params, task: 3600)
    rows, scaling = plan.plan(
        smoke(cooldown_epochs=2), plan.Machine(2, "h100", 0.5, {"pretrain": 10.0})
    )
    assert scaling[0]["stage"] == "pretrain"
    assert scaling[0]["ms/step"] == "800"  # 8 images at 10 images/s
    pretrain, detect, segment, _ = rows
    assert [row["stage"] for row in rows] == ["pretrain", "detect", "segment", "all"]
    hours = [float(row["hours"]) for row in rows]
    assert hours[3] == pytest.approx(sum(hours[:3]), rel=0.02)
    assert (pretrain["hours"], pretrain["GPU-hours"]) == ("0.4", "0.8")  # (6 + 2) * 3600 / 20 s
    assert pretrain["batch/GPU"] == "8 x 1"
    for row in (detect, segment):
        assert row["from"] == "FLOPs"
        needed = 3 * float(row["GFLOPs/image"]) * 1e9 * 3600 * row["epochs"]
        hours = needed / (2 * 0.5 * PEAK_FLOPS["h100"]) / 3600
        assert float(row["hours"]) == pytest.approx(hours, rel=0.02)


def test_what_was_not_measured_has_an_interval(monkeypatch, no_memory) -> None:
    monkeypatch.setattr(plan, "training_images", lambda params, task: 36_000_000)
    params = smoke().model_copy(update={"tasks": ("classify", "segment")})
    measured = plan.Machine(2, "h100", 0.5, {"pretrain": 1e6})
    pretrain, segment, both = plan.plan(params, measured)[0]
    assert pretrain["hours between"] == ""
    hours, low, high = (
        float(n) for n in (segment["hours"], *segment["hours between"].split(" and "))
    )
    assert (low, high) == pytest.approx((hours / 1.5, hours / 0.4), rel=0.02)
    low, high = (float(n) for n in both["hours between"].split(" and "))
    known = float(pretrain["hours"])
    assert (low, high) == pytest.approx((known + hours / 1.5, known + hours / 0.4), rel=0.02)


def test_a_sweep_is_quoted_with_all_its_seeds_by_what_its_trials_compute(
    monkeypatch, no_memory
) -> None:
    monkeypatch.setattr(plan, "training_images", lambda params, task: 36_000_000)
    params = compose(["recipe=smoke", "tasks=[classify]", "sweep.space=demo", "sweep.seeds=2"])
    machine = plan.Machine(1, "t4", 0.5, {})
    rows, _ = plan.plan(params, machine, sweep=True)
    one = plan.estimate(TASKS["classify"], all_trials(params).base.params, machine)
    sweep = rows[1]
    assert sweep["stage"] == "sweep, 12 trials"
    # Without the ghost head, or with windows, a point computes less than the recipe's model.
    assert 8 * one.hours < float(sweep["hours"]) < 12 * one.hours
    assert float(rows[-1]["hours"]) > float(sweep["hours"])


def test_hours_cost_energy_carbon_and_money(monkeypatch, no_memory) -> None:
    monkeypatch.setattr(plan, "training_images", lambda params, task: 36000)
    params = smoke().model_copy(update={"tasks": ("classify",)})
    machine = plan.Machine(2, "l4", 0.5, {"pretrain": 10.0}, price=1.5, carbon=400)
    row, total = plan.plan(params, machine)[0]  # 6 * 36,000 images at 20 per second: 3 hours
    assert (row["hours"], row["GPU-hours"], row["price"]) == ("3", "6", "9")
    assert (row["kWh"], row["kg CO2"]) == ("0.432", "0.173")
    assert total["price"] == "9"
    assert plan.WATTS.keys() == plan.BANDWIDTHS.keys() == PEAK_FLOPS.keys()


def test_a_gpu_with_less_bandwidth_for_its_flops_is_assumed_to_use_less_of_them() -> None:
    assert plan.usual_utilisation("h100") == pytest.approx(0.076, abs=0.002)
    assert plan.usual_utilisation("h200") > plan.usual_utilisation("h100")
    assert all(0.04 < plan.usual_utilisation(gpu) < 0.2 for gpu in PEAK_FLOPS)


def test_efficiency_follows_from_the_bytes_of_a_ring() -> None:
    links = (100e9, 10e9)
    # 1 GB of gradients on 8 GPUs: 1.75 GB over 100 GB/s beside a step of 17.5 ms.
    assert plan.efficiency(1e9, 17.5e-3, 8, links) == pytest.approx(0.5)
    assert plan.efficiency(1e9, 187.5e-3, 16, links) == pytest.approx(0.5)
    assert plan.efficiency(1e9, 1.0, 1, links) == 1


def test_memory_grows_with_the_batch_and_falls_with_checkpointing() -> None:
    model, forward = TASKS["classify"].step_model(smoke())
    one, some, more, most = (
        plan.memory(model, forward, n, ema=False, half=True) for n in (1, 128, 256, 512)
    )
    # Weights, gradients and Adam's two moments are the least.
    assert one > 4 * 4 * sum(p.numel() for p in model.parameters()) / 2**30
    assert most - more == pytest.approx(2 * (more - some), rel=0.05)
    checkpointed, forward = TASKS["classify"].step_model(smoke(grad_checkpointing=True))
    assert plan.memory(checkpointed, forward, 512, ema=False, half=True) < 0.8 * most


def test_images_are_those_of_the_public_set_or_those_prepared(monkeypatch, tmp_path) -> None:
    assert (
        plan.training_images(smoke(num_classes=1000, holdout=0.0), TASKS["classify"]) == 1_281_167
    )
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    with pytest.raises(PipelineError, match="no images in data/coco to count"):
        plan.training_images(smoke(), TASKS["detect"])


def test_more_gpus_than_shares_are_rejected_with_the_key() -> None:
    command = [sys.executable, "-m", "pipelines.cli", "plan", "recipe=demo", "--gpus", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "scaling.num_workers=7 workers, but pretrain.shares=2" in done.stderr
