"""Optuna's search, fed with what this sweep's trials gave before it was interrupted."""

import json
from typing import Any

import optuna

from pipelines.run import tracking
from pipelines.sweeps.space import Choice, Point, Search


class Study:
    """Optuna's TPE.

    Args:
        sweep_id: MLflow run of the sweep, whose earlier trials it knows.
    """

    def __init__(self, search: Search, sweep_id: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.left = search.trials
        earlier = tracking.sweep_trials(sweep_id)
        # Points that are asked again take no random numbers: the same seed would draw them twice.
        sampler = optuna.samplers.TPESampler(seed=search.seed + len(earlier))
        self.study = optuna.create_study(direction="maximize", sampler=sampler)
        self.distributions: dict[str, Any] = {
            name: optuna.distributions.CategoricalDistribution(domain.values)
            if isinstance(domain, Choice)
            else optuna.distributions.FloatDistribution(domain.low, domain.high, log=domain.log)
            for name, domain in search.parameters.items()
        }
        for run in earlier:
            self.study.enqueue_trial(json.loads(run.tags["point"]), skip_if_exists=True)
        self._asked: Any = None
        self._open: dict[str, Any] = {}

    def ask(self) -> Point:
        """The next point: first those that were asked before."""
        self.left -= 1
        self._asked = self.study.ask(self.distributions)
        return dict(self._asked.params)

    def name(self, identity: str) -> None:
        """The trial of the last point."""
        self._open[identity] = self._asked

    def tell(self, identity: str, score: float | None) -> None:
        """A trial's score; None: it failed."""
        trial = self._open.pop(identity, None)
        if trial is not None:
            state = optuna.trial.TrialState
            self.study.tell(trial, score, None if score is not None else state.FAIL)
