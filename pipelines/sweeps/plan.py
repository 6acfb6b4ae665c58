"""What a sweep is going to do, found out before anything is started."""

from dataclasses import dataclass

from pipelines.params import Params
from pipelines.results.sequential import Design
from pipelines.sweeps.cost import cost_of
from pipelines.sweeps.space import Space, Trial, label, list_trials, load_space, make_trial
from pipelines.tasks import Job, Task, task_of_stage


@dataclass(frozen=True)
class Plan:
    """A checked sweep."""

    space: Space
    trials: list[Trial]
    """All that are known before the first one starts."""
    base: Trial
    """What all trials have in common."""
    job: Job
    """What the task's check gave."""
    design: Design
    """Of the comparison of its points with the reference."""

    @property
    def task(self) -> Task:
        """What a trial trains."""
        return task_of_stage(self.space.stage)

    @property
    def reference(self) -> str:
        """Label of the point that the others are compared with; empty if Optuna finds it."""
        return label(self.space.reference or self.trials[0].point) if self.trials else ""

    @property
    def largest(self) -> Params:
        """Of the trial that needs most of the cluster."""
        return max((trial.params for trial in (self.base, *self.trials)), key=_cpus)


def _cpus(params: Params) -> int:
    return params.scaling.num_workers * params.scaling.cpus_per_worker


def make_plan(params: Params) -> Plan:
    """Check the space of `sweep.space`, and all of its trials.

    Raises:
        PipelineError: what does not fit.
    """
    space = load_space(params.sweep.space)
    job = task_of_stage(space.stage).check_for_trials(params)
    trials = list_trials(params, space)
    for trial in trials:
        cost_of(trial)
    points = len({trial.label for trial in trials})
    design = Design(max(points - 1, 1), params.sweep.seeds, params.sweep.smallest_difference)
    return Plan(space, trials, make_trial(params, space, {}), job, design)
