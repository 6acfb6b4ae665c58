"""Which trials a sweep starts, by what has been decided. With a real MLflow store."""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.errors import PipelineError
from pipelines.params import Budget, Params, compose
from pipelines.results.outputs import Result
from pipelines.results.sequential import Design
from pipelines.run import tracking
from pipelines.run.budget import MARGIN_S
from pipelines.run.identity import RunState
from pipelines.sweeps import queue, space
from pipelines.sweeps.plan import Plan
from pipelines.sweeps.queue import Trials

SEEDS = 6
NONE = {"hours": 0, "money": 0, "kwh": 0, "price": 0, "watts": 0}
SCORES = {"elsa": 50.0, "window": 80.0, "depthwise": 50.0}


def score(operator: str, seed: int) -> float:
    """What a trial gives; noise has a standard deviation of 1."""
    return SCORES[operator] + random.Random(f"{operator} {seed}").gauss(0, 1)


def identity(stage: str, params: Params) -> str:
    """Without data and code."""
    return f"{params.model.operator}{params.pretrain.seed}"


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setattr(queue, "RUNS", tmp_path / "runs")
    monkeypatch.setattr("pipelines.run.fit.last_checkpoint", lambda name, storage: object())
    monkeypatch.setattr(space, "stage_identity", identity)
    params = compose(["recipe=smoke", f"sweep.seeds={SEEDS}"])
    of_operators = space.Space(
        about="a test", points=[{"model.operator": operator} for operator in SCORES]
    )
    trials = space.list_trials(params, of_operators)
    base = space.make_trial(params, of_operators, {})
    job = SimpleNamespace()
    return Plan(of_operators, trials, base, job, Design(len(SCORES) - 1, SEEDS))


def begin(
    plan: Plan, sweep: str | None = None, state: RunState | None = None, **budget: float
) -> tuple[Trials, str]:
    tracker = tracking.start_run("sweep", "test", {}, sweep)
    params = plan.base.params.model_copy(update={"budget": Budget.model_validate(NONE | budget)})
    stage = SimpleNamespace(
        tracker=tracker, params=params, state=state or RunState(), folder=queue.RUNS / "sweep"
    )
    return Trials(stage, plan, concurrent=2), tracker.run_id


def run(trials: Trials, most: int = 100) -> list[str]:
    """Operators of the trials that ran."""
    ran = []
    while len(ran) < most and (job := trials.next()):
        operator, seed = job.params["model"]["operator"], job.params["pretrain"]["seed"]
        ran.append(operator)
        trials.finished(job.key, Result({"top1": score(operator, seed)}, []))
    return ran


def test_a_decided_point_gets_no_more_seeds_and_an_open_one_all(plan: Plan) -> None:
    trials, _ = begin(plan)
    ran = run(trials)
    assert {name: ran.count(name) for name in SCORES} == {
        "elsa": SEEDS,  # the reference, as a point is open
        "window": 3,
        "depthwise": SEEDS,
    }
    left = [o for o in trials.outcomes.values() if o.state == "not needed"]
    assert [(o.trial.label, o.reason) for o in left] == [
        ("operator=window", "better after 3 seeds")
    ] * (SEEDS - 3)


def test_the_reference_gets_no_more_seeds_once_all_points_are_decided(plan, monkeypatch) -> None:
    monkeypatch.setitem(SCORES, "depthwise", 20.0)
    trials, _ = begin(plan)
    assert len(run(trials)) == 9
    reasons = {o.reason for o in trials.outcomes.values() if o.state == "not needed"}
    assert reasons == {"better after 3 seeds", "worse after 3 seeds", "all points are decided"}


def test_a_point_alone_gets_all_its_seeds(plan: Plan) -> None:
    alone = [trial for trial in plan.trials if trial.label == plan.reference]
    trials, _ = begin(replace(plan, trials=alone, design=Design(1, SEEDS)))
    assert run(trials) == ["elsa"] * SEEDS


def test_a_killed_sweep_decides_as_if_it_had_not_been(plan: Plan) -> None:
    trials, sweep = begin(plan)
    first = run(trials, most=10)
    again, _ = begin(plan, sweep)
    second = run(again)
    assert len(first + second) == 2 * SEEDS + 3
    assert (first + second).count("window") == 3
    taken = [o for o in again.outcomes.values() if o.reused]
    assert len(taken) == len(first)
    assert all(o.score is not None and "before it was interrupted" in o.reason for o in taken)


def test_no_trial_begins_that_would_pass_the_budget_and_a_larger_one_goes_on(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(monotonic=lambda: state.seconds)
    monkeypatch.setattr(queue, "time", clock)
    # Two trials of two workers at once cost 4 a minute, so this is five minutes of them.
    small, state = {"money": 20.0, "price": 60.0}, RunState()
    trials, sweep = begin(plan, state=state, **small)
    ran = 0
    while job := trials.next():
        state.seconds += 50  # each trial
        seed = job.params["pretrain"]["seed"]
        trials.finished(job.key, Result({"top1": score("elsa", seed)}, []))
        ran += 1
    assert ran == 6  # 300 s: a seventh would pass it
    again, _ = begin(plan, sweep, state, **small)
    assert run(again) == []
    assert again.spent == "budget.money=20.0 has no room for another trial"
    more, _ = begin(plan, sweep, state, money=24.0, price=60.0)
    assert more.next()


def test_a_trial_stops_with_the_budget_and_a_larger_one_resumes_it(
    plan: Plan,
) -> None:
    state = RunState()
    with pytest.raises(PipelineError, match=r"budget\.hours=0\.01 is 36 s of 4 workers: less than"):
        begin(plan, hours=0.01)
    trials, sweep = begin(plan, state=state, hours=0.1)
    job = trials.next()
    assert job
    assert job.stop_after_s == 360 - MARGIN_S
    state.seconds += 335
    trials.interrupted(job.key)
    assert trials.next() is None
    outcome = trials.outcomes[job.key]
    assert (outcome.state, outcome.reason) == (
        "not run",
        "budget.hours=0.1 is spent; a larger one resumes",
    )
    more, _ = begin(plan, sweep, state, hours=0.2)
    again = more.next()
    assert again
    assert (again.run_name, again.mlflow_run_id) == (job.run_name, job.mlflow_run_id)
    assert again.stop_after_s == pytest.approx(720 - 335 - MARGIN_S)
    more.finished(again.key, Result({"top1": 50.0}, []))
    assert not more.spent
