"""A training stops before its budget is spent, and resumes with a larger one."""

import math
import time
from pathlib import Path

import pytest

from pipelines.errors import PipelineError
from pipelines.params import Params, ParamsError, compose
from pipelines.run import budget
from pipelines.run.budget import limit_of, within_budget
from pipelines.run.identity import RunState

SECOND = 1 / 3600


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "TICK_S", 0.05)
    monkeypatch.setattr(budget, "MARGIN_S", 0.1)


def limited(**limits: float) -> Params:
    return compose([f"budget.{key}={value}" for key, value in limits.items()])


def test_it_stops_as_by_ctrl_c_and_says_which_limit_and_resumes_with_a_larger_one(
    tmp_path: Path,
) -> None:
    state = RunState()
    small = limited(money=2 * 0.5 * SECOND, price=1)  # half a second of two workers

    def stopped() -> None:
        with within_budget(small, state, tmp_path) as left_s:
            assert left_s == pytest.approx(0.4)  # what it takes to stop is kept back
            time.sleep(left_s)
            raise KeyboardInterrupt  # as `fit` does then

    with pytest.raises(PipelineError, match=r"budget\.money=\S+ is spent .* of 2 workers"):
        stopped()
    kept = RunState.load(tmp_path)  # another start
    assert kept.seconds >= 0.4
    with (
        pytest.raises(PipelineError, match="is spent"),
        within_budget(small, kept, tmp_path),
    ):
        pytest.fail("nothing is left of it")
    with within_budget(limited(hours=60 * SECOND), kept, tmp_path):
        time.sleep(0.3)
    assert RunState.load(tmp_path).seconds > 0.5


def test_without_a_limit_and_by_another_ctrl_c_nothing_is_said_of_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), within_budget(compose(), RunState(), tmp_path):
        raise KeyboardInterrupt


def test_money_and_energy_are_hours_of_all_workers() -> None:
    p = limited(hours=3, money=20, price=2.5, kwh=1.4, watts=350)
    assert limit_of(p.budget, 2).seconds == 2 * 3600
    assert limit_of(p.budget, 1).seconds == 3 * 3600
    assert limit_of(compose().budget, 2).seconds == math.inf


def test_what_can_not_be_kept_to_is_told(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"budget.*money=1\.0 needs price of a worker"):
        limited(money=1)
    with (
        pytest.raises(PipelineError, match="less than a start and a checkpoint take"),
        within_budget(limited(hours=0.1 * SECOND), RunState(), tmp_path),
    ):
        pytest.fail("it is too small")
