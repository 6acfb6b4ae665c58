"""What a trial's model costs, which needs no training."""

import functools

from pipelines.errors import PipelineError
from pipelines.params import Params
from pipelines.sweeps.space import Trial
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
