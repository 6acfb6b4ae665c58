"""What a trial's model costs, which needs no training."""

import functools
from dataclasses import dataclass

from pipelines.errors import PipelineError
from pipelines.params import Params
from pipelines.sweeps.space import Trial, listed_points, load_space, make_trial
from pipelines.tasks import task_of_stage


@functools.cache
def _cost(stage: str, params: str) -> tuple[int, float]:
    from pipelines.train.cost import model_flops

    model, forward = task_of_stage(stage).step_model(Params.model_validate_json(params))
    return sum(p.numel() for p in model.parameters()), model_flops(model, forward) / 1e9


def cost_of(trial: Trial) -> tuple[int, float]:
    """Parameters of a trial's model, and GFLOPs of an image's forward pass (2 per multiply-add).

    Raises:
        PipelineError: the model can't be built.
    """
    section = trial.section.model_copy(update={"seed": 0})  # all seeds cost the same
    params = trial.params.model_copy(update={trial.stage: section})
    try:
        return _cost(trial.stage, params.model_dump_json())
    except PipelineError as error:
        raise PipelineError(f"point {trial.label}: {error}") from error


@dataclass(frozen=True)
class AllTrials:
    """Of a sweep with all of its seeds, none decided earlier."""

    count: int
    base: Trial
    """What all have in common."""
    in_base: float
    """What they compute, in trials like `base`."""


def all_trials(params: Params) -> AllTrials:
    """What the sweep of `sweep.space` computes at most.

    Raises:
        PipelineError: the space or a trial does not fit.
    """
    space = load_space(params.sweep.space)
    base, points = make_trial(params, space, {}), listed_points(space)
    known = [make_trial(params, space, p, s) for s in range(params.sweep.seeds) for p in points]
    suggested = space.search.trials if space.search and space.search.method == "optuna" else 0
    computed = sum(_computed(trial) for trial in known) / _computed(base)
    return AllTrials(len(known) + suggested, base, computed + suggested)


def _computed(trial: Trial) -> float:
    return cost_of(trial)[1] * trial.epochs
