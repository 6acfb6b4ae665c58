"""Optuna's search, in a database of its own that outlives a killed sweep."""

from collections import deque
from pathlib import Path
from typing import Any

import optuna

from pipelines.sweeps.space import Choice, Point, Search


class Study:
    """Optuna's TPE.

    Args:
        name: of the study in the database, such as the sweep's MLflow run.
        file: the database (SQLite), which `optuna-dashboard` opens, too.
    """

    def __init__(self, search: Search, name: str, file: Path) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        file.parent.mkdir(parents=True, exist_ok=True)
        self.left = search.trials
        storage = f"sqlite:///{file}"
        self.study = optuna.create_study(
            storage=storage, study_name=name, direction="maximize", load_if_exists=True
        )
        self._earlier = deque(self.study.get_trials())
        # The same seed would draw the points of an earlier start again.
        self.study.sampler = optuna.samplers.TPESampler(seed=search.seed + len(self._earlier))
        self.distributions: dict[str, Any] = {
            name: optuna.distributions.CategoricalDistribution(domain.values)
            if isinstance(domain, Choice)
            else optuna.distributions.FloatDistribution(domain.low, domain.high, log=domain.log)
            for name, domain in search.parameters.items()
        }
        self._asked = -1
        self._open: dict[str, int] = {}

    def ask(self) -> Point:
        """The next point: first those of an earlier start, whether their trials ended or not."""
        self.left -= 1
        trial: Any = (
            self._earlier.popleft() if self._earlier else self.study.ask(self.distributions)
        )
        self._asked = trial.number
        return dict(trial.params)

    def name(self, identity: str) -> None:
        """The trial of the last point."""
        self._open[identity] = self._asked

    def tell(self, identity: str, score: float | None) -> None:
        """A trial's score; None: it failed."""
        number = self._open.pop(identity, None)
        if number is not None:
            state = optuna.trial.TrialState.FAIL if score is None else None
            self.study.tell(number, score, state, skip_if_finished=True)
