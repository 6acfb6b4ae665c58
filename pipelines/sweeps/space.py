"""Spaces of a sweep: YAML in `pipelines/recipes/sweeps/`, checked before anything starts.

A point is a set of parameters by dotted name. A trial is a point with a seed: one run of a training
stage, known by the identity that the stage would have with the same parameters.
"""

import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipelines.params import Params, ParamsError, Positive, Section, override, read_yaml
from pipelines.paths import RECIPES
from pipelines.run.identity import stage_identity
from pipelines.tasks import task_of_stage

SPACES = RECIPES / "sweeps"
NONE = "none"
"""The space that sweeps nothing."""
Point = dict[str, Any]


class Range(Section):
    """Numbers from `low` to `high`, uniform or uniform in their logarithm."""

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def consistent(self) -> "Range":
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError("low must be below high, and above 0 with log")
        return self

    def draw(self, source: random.Random) -> float:
        """A number of the range."""
        if self.log:
            return math.exp(source.uniform(math.log(self.low), math.log(self.high)))
        return source.uniform(self.low, self.high)

    def extremes(self) -> list[Any]:
        """What must be valid for the whole range to be."""
        return [self.low, self.high]


class Choice(Section):
    """One of a list of values."""

    values: list[Any] = Field(min_length=1)

    def draw(self, source: random.Random) -> Any:
        """A value of the list."""
        return source.choice(self.values)

    def extremes(self) -> list[Any]:
        """All values: each must be valid."""
        return self.values


class Asha(Section):
    """Stops the trials that are behind: at `grace_epochs`, and each `reduction_factor` times that,
    only the best 1 in `reduction_factor` continues."""

    grace_epochs: Positive
    reduction_factor: Annotated[int, Field(ge=2)]


class Search(Section):
    """Points that are drawn (random), or suggested from the results so far (optuna)."""

    method: Literal["random", "optuna"]
    trials: Positive
    seed: int
    parameters: dict[str, Range | Choice] = Field(min_length=1)
    asha: Asha | None = None


class Space(Section):
    """One file of `pipelines/recipes/sweeps/`: `points`, the product of `grid`, and a `search`."""

    about: str
    stage: Literal["pretrain", "detect", "segment"] = "pretrain"
    """What a trial runs."""
    fixed: dict[str, Any] = {}
    """Parameters of every trial that differ from the recipe and params.yaml, over both."""
    points: list[Point] = []
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    search: Search | None = None
    reference: Point | None = None
    """The point that the others are compared with; by default the first one."""
    findings: dict[str, str] = {}
    """What the paper found, by parameter."""


@dataclass(frozen=True)
class Trial:
    """A point with a seed.

    Attributes:
        stage: what it runs.
        point: what the space says of it, by dotted name.
        params: all its parameters.
    """

    stage: str
    point: Point
    params: Params

    @cached_property
    def identity(self) -> str:
        """That of a run of the stage with these parameters.

        Raises:
            PipelineError: an input of the stage is missing, such as its data.
        """
        return stage_identity(self.stage, self.params)

    @property
    def label(self) -> str:
        return label(self.point)

    @property
    def seed(self) -> int:
        return int(self.section.seed)

    @property
    def section(self) -> Any:
        """The stage's own parameters."""
        return getattr(self.params, self.stage)

    @property
    def epochs(self) -> int:
        return int(self.section.epochs + getattr(self.section, "cooldown_epochs", 0))


def label(point: Mapping[str, Any]) -> str:
    """A short name of a point: `lam=0 gamma=1`."""
    return " ".join(f"{name.rsplit('.', 1)[-1]}={_short(v)}" for name, v in point.items()) or "all"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(_short(item) for item in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def space_names() -> list[str]:
    """Names that `sweep.space` can have."""
    return sorted(path.stem for path in SPACES.glob("*.yaml"))


def load_space(name: str) -> Space:
    """A space by name.

    Raises:
        ParamsError: unknown, empty, or not what the schema of a space allows.
    """
    if name not in space_names() or name == NONE:
        raise ParamsError(
            f"sweep.space: {name!r} is unknown", f"Choose one of {', '.join(space_names())}"
        )
    where = f"pipelines/recipes/sweeps/{name}.yaml"
    try:
        space = Space.model_validate_json(json.dumps(read_yaml(SPACES / f"{name}.yaml")))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ParamsError(f"{where}:\n  " + "\n  ".join(lines)) from None
    if not (space.points or space.grid or space.search):
        raise ParamsError(f"{where} has no points, grid or search: the space is empty")
    _check_keys(space, where)
    return space


def _check_keys(space: Space, where: str) -> None:
    task, seed = task_of_stage(space.stage), f"{space.stage}.seed"
    used = {name for point in space.points for name in point} | space.grid.keys()
    used |= set(space.search.parameters) if space.search else set()
    for key in sorted(used | space.fixed.keys()):
        if key.split(".")[0] not in task.sections:
            raise ParamsError(
                f"{where}: {key}: a trial is a run of {space.stage}; only parameters of"
                f" {', '.join(task.sections)} can be set"
            )
        if key == seed:
            raise ParamsError(f"{where}: {seed}: seeds are what sweep.seeds counts")
    if space.search and space.search.asha and not task.epochs_can_stop:
        raise ParamsError(f"{where}: asha can't stop runs of {space.stage}", "Leave it out")
    for key in sorted(used & space.fixed.keys()):
        raise ParamsError(f"{where}: {key} is both fixed and varied")


def listed_points(space: Space) -> list[Point]:
    """The points that are known before the first trial: all but Optuna's."""
    points = list(space.points)
    if space.grid:
        points += [
            dict(zip(space.grid, values, strict=True))
            for values in itertools.product(*space.grid.values())
        ]
    if space.search and space.search.method == "random":
        source = random.Random(space.search.seed)
        points += [
            {name: domain.draw(source) for name, domain in space.search.parameters.items()}
            for _ in range(space.search.trials)
        ]
    return points


def make_trial(params: Params, space: Space, point: Point, seed: int = 0) -> Trial:
    """The trial of `point` with the seed-th seed.

    Raises:
        ParamsError: the schema rejects the point.
    """
    where = f"sweep.space={params.sweep.space}, point {label(point)}"
    stage = space.stage
    seeded = {f"{stage}.seed": getattr(params, stage).seed + seed}
    resolved = override(params, {**space.fixed, **point, **seeded}, where)
    return Trial(stage, point, resolved)


def list_trials(params: Params, space: Space) -> list[Trial]:
    """All trials that are known before the first one starts, first all points with one seed.

    Raises:
        ParamsError: an invalid point, two equal ones, a reference that is none of them, or a
            budget too small for one trial.
    """
    name, search = params.sweep.space, space.search
    points = listed_points(space)
    optuna = bool(search and search.method == "optuna")
    if optuna and params.sweep.seeds > 1:
        raise ParamsError(
            f"sweep.space={name} searches with optuna, one run of each point",
            "Set sweep.seeds=1, and compare its best point with others at several seeds",
        )
    if params.sweep.smallest_difference and params.sweep.seeds == 1:
        raise ParamsError(
            f"sweep.smallest_difference={params.sweep.smallest_difference:g} can't be excluded with"
            " sweep.seeds=1",
            "Raise sweep.seeds: three decide little, ten most of what matters",
        )
    trials = [make_trial(params, space, p, s) for s in range(params.sweep.seeds) for p in points]
    first = trials[: len(points)]
    _check_different(name, first)
    if space.reference is not None and space.reference not in points:
        raise ParamsError(f"sweep.space={name}: reference {label(space.reference)} is no point")
    corners = _corners(search) if search and optuna else []
    _check_budget(params, space, first + [make_trial(params, space, point) for point in corners])
    return trials


def _check_different(name: str, trials: Sequence[Trial]) -> None:
    seen: dict[str, str] = {}
    for trial in trials:
        if trial.identity in seen:
            raise ParamsError(
                f"sweep.space={name}: points {seen[trial.identity]} and {trial.label} have the same"
                " parameters",
                "Remove one",
            )
        seen[trial.identity] = trial.label


def _check_budget(params: Params, space: Space, known: Sequence[Trial]) -> None:
    name, search = params.sweep.space, space.search
    epochs = min(trial.epochs for trial in known)
    if search and search.asha and search.asha.grace_epochs >= epochs:
        raise ParamsError(
            f"sweep.space={name}: asha.grace_epochs={search.asha.grace_epochs} must be less than"
            f" the {epochs} epochs of a trial"
        )
    if 0 < params.sweep.max_epochs < epochs:
        raise ParamsError(
            f"sweep.max_epochs={params.sweep.max_epochs} is too small for one trial, which has"
            f" {epochs} epochs",
            "Raise it, or set it to 0 for no limit",
        )


def _corners(search: Search) -> Sequence[Point]:
    first = {name: domain.extremes()[0] for name, domain in search.parameters.items()}
    return [
        first | {name: value}
        for name, domain in search.parameters.items()
        for value in domain.extremes()
    ]
