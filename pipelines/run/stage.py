"""A pipeline stage from start to end: parameters, identity, lock, Ray, MLflow, outputs."""

import argparse
import csv
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipelines.errors import PipelineError
from pipelines.params import Params, load_params
from pipelines.paths import ROOT, SHARED
from pipelines.run.identity import RunState, hold, stage_definition, stage_identity


class Stage:
    """What a stage's code gets: its parameters, where to write, and its MLflow run.

    Attributes:
        name: stage, file, `dvc.yaml` entry and section of the parameters.
        params: all resolved parameters.
        identity: id of the stage's inputs.
        run_name: name of the Ray Train run, `<stage>-<identity>`.
        tracker: the stage's MLflow run.
    """

    def __init__(self, name: str, params: Params, identity: str) -> None:
        self.name, self.params, self.identity = name, params, identity
        self.folder = SHARED / ".runs" / f"{name}-{identity}"
        self.state = RunState.load(self.folder)
        self.run_name = self.folder.name
        self.tracker: Any = None
        self._staged = self.folder / "outputs"
        self._started = time.monotonic()

    @property
    def section(self) -> Any:
        """The stage's own parameters."""
        return getattr(self.params, self.name)

    def output(self, path: str) -> Path:
        """Where to write the output `path` of `dvc.yaml`; it appears there when the stage ends."""
        staged = self._staged / path
        staged.parent.mkdir(parents=True, exist_ok=True)
        return staged

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """`metrics/<stage>.json`, with the identity and the MLflow run, and MLflow's summary."""
        values = dict(metrics) | {"wall_time_s": round(time.monotonic() - self._started, 1)}
        self.tracker.log_summary(values)
        values |= {"identity": self.identity, "mlflow_run_id": self.tracker.run_id}
        self.output(f"metrics/{self.name}.json").write_text(json.dumps(values, indent=2) + "\n")

    def write_curves(self, history: Sequence[Mapping[str, float]]) -> None:
        """`plots/<stage>/curves.csv`, one row per epoch, for DVC plots and the report."""
        folder = self.output(f"plots/{self.name}")
        folder.mkdir(exist_ok=True)
        columns = list(dict.fromkeys(key for row in history for key in row))
        with (folder / "curves.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(history)


def run_stage(
    name: str,
    description: str,
    run: Callable[[Stage, Any], None],
    check: Callable[[Params], Any] = lambda params: None,
) -> None:
    """The command line of a stage: `check` its inputs, then `run` it.

    `check` sees the parameters, before anything is started or locked; what it returns is
    handed to `run`. Ends the process with code 1 and one message for an error that a user
    can mend, 130 when interrupted.
    """
    parser = argparse.ArgumentParser(prog=f"python -m pipelines.{name}", description=description)
    parser.add_argument(
        "--force", action="store_true", help="run anew even if a run with these inputs exists"
    )
    arguments = parser.parse_args()
    try:
        params = load_params()
        checked = check(params)
        _run(name, params, checked, run, arguments.force)
    except PipelineError as error:
        sys.exit(f"error: {name}: {error}")
    except KeyboardInterrupt:
        print(f"{name}: interrupted; start it again to resume", file=sys.stderr)
        sys.stderr.flush()
        os._exit(130)  # threads of Ray and MLflow must not turn this into success


def _run(
    name: str, params: Params, checked: Any, run: Callable[[Stage, Any], None], force: bool
) -> None:
    stage = Stage(name, params, stage_identity(name, params))
    with hold(stage.folder):
        # Imported late: they take seconds, and bad parameters should be told at once.
        from pipelines.run import fit as launch
        from pipelines.run import tracking

        stage.state = RunState.load(stage.folder)
        if force or _forced_by_dvc(stage):
            stage.state = RunState(attempt=stage.state.attempt + 1)
        if stage.state.attempt > 1:
            stage.run_name = f"{stage.run_name}-{stage.state.attempt}"
        shutil.rmtree(stage._staged, ignore_errors=True)
        with launch.ray_session(trials=name == "sweep"):
            stage.tracker = tracking.start_run(
                name, pipeline_name(params), _tags(stage), stage.state.mlflow_run_id
            )
            stage.state.mlflow_run_id = stage.tracker.run_id
            stage.state.save(stage.folder)
            stage.tracker.log_params(_logged_params(stage))
            stage.tracker.log_dict(params.model_dump(mode="json"), "params.json")
            try:
                run(stage, checked)
                _publish(stage)
            except BaseException as error:
                stage.tracker.fail(error)
                if isinstance(error, tracking.TrackingError):
                    raise PipelineError(
                        f"MLflow does not answer: {tracking.without_password(str(error))}. What is"
                        " trained is kept: start the stage again when it does"
                    ) from error
                raise
            stage.tracker.finish()


def pipeline_name(params: Params) -> str:
    """Names the parent run: the DVC experiment, else the recipe and a hash of what it does."""
    digest = hashlib.sha256(params.model_dump_json(exclude={"data"}).encode()).hexdigest()[:8]
    return os.environ.get("DVC_EXP_NAME") or f"{params.recipe}-{digest}"


def _tags(stage: Stage) -> dict[str, str]:
    from pipelines.run import tracking

    return {
        "stage": stage.name,
        "identity": stage.identity,
        "ray_run": stage.run_name,
        "recipe": stage.params.recipe,
        "dvc_stage": os.environ.get("DVC_STAGE", ""),
        "dvc_exp": os.environ.get("DVC_EXP_NAME", ""),
        **tracking.git_tags(),
    }


def _logged_params(stage: Stage) -> dict[str, Any]:
    """The sections of the parameters that the stage depends on, by `dvc.yaml`."""
    resolved = stage.params.model_dump(mode="json")
    sections = [s for s in stage_definition(stage.name).get("params", []) if isinstance(s, str)]
    return {section: resolved[section] for section in sections}


def _forced_by_dvc(stage: Stage) -> bool:
    """DVC runs a stage again whose last result it has recorded: `dvc repro --force`.

    A finished run that `dvc.lock` does not hold was killed before DVC recorded it; its
    outputs are made again from its checkpoint instead.
    """
    if not (os.environ.get("DVC_STAGE") and stage.state.metrics_md5):
        return False
    lock = ROOT / "dvc.lock"
    stages = YAML(typ="safe").load(lock.read_text())["stages"] if lock.exists() else {}
    outs = stages.get(stage.name, {}).get("outs", [])
    return stage.state.metrics_md5 in [out.get("md5") for out in outs]


def _publish(stage: Stage) -> None:
    """Move the staged outputs to where `dvc.yaml` names them, whole, then mark the run finished."""
    paths = outputs_of(stage.name)
    missing = [path for path in paths if not (stage._staged / path).exists()]
    if missing:
        raise RuntimeError(f"stage {stage.name} did not write {', '.join(missing)}")
    metrics = (stage._staged / f"metrics/{stage.name}.json").read_bytes()
    for path in paths:
        target = ROOT / path
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not one rename: on a cluster data/ and .runs/ are mounts of their own.
        aside = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.move(stage._staged / path, aside)
        aside.replace(target)
    shutil.rmtree(stage._staged)
    stage.state.metrics_md5 = hashlib.md5(metrics, usedforsecurity=False).hexdigest()
    stage.state.save(stage.folder)


def outputs_of(stage: str) -> list[str]:
    """Paths of all outputs, metrics and plots of a stage in `dvc.yaml`."""
    definition = stage_definition(stage)
    entries = [e for kind in ("outs", "metrics", "plots") for e in definition.get(kind, [])]
    return [e if isinstance(e, str) else next(iter(e)) for e in entries]
