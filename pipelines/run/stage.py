"""A pipeline stage from start to end: parameters, identity, lock, Ray, MLflow, outputs."""

import argparse
import gc
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import PipelineError
from pipelines.params import Params, load_params
from pipelines.paths import ROOT, SHARED
from pipelines.run import dvc
from pipelines.run.fork_server import forking
from pipelines.run.identity import (
    Inputs,
    RunState,
    hold,
    outputs_digest,
    stage_definition,
    stage_inputs,
    tracked_params,
    unfinished_runs,
)
from pipelines.run.trace import mark
from pipelines.run.tracking_uri import without_password

if TYPE_CHECKING:
    from pipelines.run.session import Session
    from pipelines.run.tracking import Tracker

RUNS = SHARED / ".runs"
QUICK_S = 0.5
"""Of a check, before Ray starts: most faults are told in it; checks that import torch go on."""


class StageRun:
    """One run of a stage: its parameters, where it writes, and its MLflow run.

    Attributes:
        name: stage, file, `dvc.yaml` entry and section of the parameters.
        params: all parameters.
        identity: id of the stage's inputs.
        run_name: name of the Ray Train run, `<stage>-<identity>`, with the attempt if forced.
        unfinished: its outputs are of what its budget had room for; the same inputs go on with it.
    """

    def __init__(self, name: str, params: Params, identity: str, state: RunState) -> None:
        self.name, self.params, self.identity, self.state = name, params, identity, state
        self.folder = RUNS / f"{name}-{identity}"
        attempt = f"-{state.attempt}" if state.attempt > 1 else ""
        self.run_name = f"{self.folder.name}{attempt}"
        self.unfinished = False
        self._tracker: Tracker | None = None
        self._session: Session | None = None
        self._staged = self.folder / "outputs"
        self._started = time.monotonic()

    @property
    def section(self) -> Any:
        """The stage's own parameters."""
        return getattr(self.params, self.name)

    @property
    def tracker(self) -> "Tracker":
        """The stage's MLflow run, while the stage runs."""
        assert self._tracker, "the outputs of a finished run are written again without MLflow"
        return self._tracker

    @property
    def session(self) -> "Session":
        """The connected Ray, while the stage runs."""
        assert self._session, "the outputs of a finished run are written again without Ray"
        return self._session

    @property
    def mlflow_run_id(self) -> str:
        """Of this run, also after it has finished."""
        assert self.state.mlflow_run_id
        return self.state.mlflow_run_id

    def output(self, path: str) -> Path:
        """Where to write the output `path` of `dvc.yaml`; it appears there when the stage ends."""
        staged = self._staged / path
        staged.parent.mkdir(parents=True, exist_ok=True)
        return staged

    def write_metrics(self, metrics: Mapping[str, float | None], **facts: str) -> None:
        """`metrics/<stage>.json`, MLflow's summary, and `lineage/<stage>.json`.

        Of a finished run the files are those of its end, whatever is passed.

        Args:
            facts: what the lineage names beside the identity and the MLflow run.
        """
        files = self.state.files
        if not files:
            took = round(time.monotonic() - self._started, 1)
            numbers = {**metrics, "wall_time_s": took}
            self.tracker.log_summary(numbers)
            lineage = {"identity": self.identity, "mlflow_run_id": self.mlflow_run_id, **facts}
            files = {
                f"{folder}/{self.name}.json": json.dumps(values, indent=2) + "\n"
                for folder, values in (("metrics", numbers), ("lineage", lineage))
            }
        for path, text in files.items():
            self.output(path).write_text(text)


@dataclass(frozen=True)
class Stage:
    """What a stage does, for `run_stage`."""

    name: str
    about: str
    """For `--help`."""
    run: Callable[[StageRun, Any], None]
    """Computes and writes all outputs. It gets what `check` returned."""
    check: Callable[[Params], Any] = lambda params: None
    """Looks at the inputs before anything starts; raises PipelineError."""
    export: Callable[[StageRun, Any], bool] | None = None
    """Writes the outputs of a finished run again, from what its storage holds, without Ray and
    MLflow. Returns False where that is gone."""
    included: Callable[[Params], bool] = lambda params: True
    """Whether the parameters ask for this stage (`tasks`)."""
    hand_on: Callable[[Params, Path], None] = lambda params, root: None
    """What a stage that is not asked for still writes for those after it, below a folder."""
    preload: Callable[[Params], tuple[str, ...]] = lambda params: ()
    """What local workers have imported when they start."""
    trains: bool = False
    """It runs Ray Train."""
    trials: bool = False
    """It runs trials of a sweep."""


def run_stage(stage: Stage) -> None:
    """The command line of a stage.

    The process ends with code 1 and one message for an error that a user can fix, and with 130
    when it is interrupted.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m pipelines.{stage.name}", description=stage.about
    )
    parser.add_argument(
        "--force", action="store_true", help="run anew even if an unfinished run could be resumed"
    )
    forced = parser.parse_args().force
    mark("command")
    # Imports make no garbage, and looking for some takes a sixth of their time.
    gc.set_threshold(100_000, 50, 50)
    try:
        params = load_params()
        if stage.included(params):
            _run(stage, params, forced)
        else:
            _leave_out(stage, params)
        gc.freeze()  # Python's last look at all objects takes a second or two
    except PipelineError as error:
        sys.exit(f"error: {stage.name}: {error}")
    except KeyboardInterrupt:
        print(f"{stage.name}: interrupted; start it again to resume", file=sys.stderr)
        sys.stderr.flush()
        os._exit(130)  # threads of Ray and MLflow must not turn this into success


def _run(stage: Stage, params: Params, forced: bool) -> None:
    inputs = stage_inputs(stage.name, params)
    folder = RUNS / f"{stage.name}-{inputs.identity}"
    with hold(folder):
        state = RunState.load(folder)
        # DVC's --force begins a new run where the last one has finished: the same command again
        # resumes what it began.
        again = (forced and state.mlflow_run_id) or (state.files and dvc.is_forced(stage.name))
        if not again and _restore(stage, state):
            _say(stage.name, "its inputs are those of a finished run: outputs restored")
            return
        checked = _begin_check(stage, params)
        if state.files and not again:
            run = StageRun(stage.name, params, inputs.identity, state)
            if _export(stage, run, checked.result()):
                _say(stage.name, "its inputs are those of a finished run: outputs written again")
                return
            _say(stage.name, "its inputs are those of a finished run whose results are gone")
            again = True
        if again:
            state = RunState(attempt=state.attempt + 1)
        elif not state.mlflow_run_id:
            _tell_differences(inputs)
        state.inputs = asdict(inputs)
        _compute(stage, StageRun(stage.name, params, inputs.identity, state), checked)


def _begin_check(stage: Stage, params: Params) -> "Future[Any]":
    """Start `stage.check`, which may import torch and mm beside the start of Ray."""
    pool = ThreadPoolExecutor(1)
    check = pool.submit(stage.check, params)
    pool.shutdown(wait=False)
    return check


def _begin_workers(stage: Stage, params: Params) -> AbstractContextManager[None]:
    """Have workers of a local Ray forked from a process that begins to import what they need."""
    preload = stage.preload(params)
    if not preload or os.environ.get("RAY_ADDRESS"):
        return nullcontext()
    return forking(preload, stage.trains)


def _restore(stage: Stage, state: RunState) -> bool:
    """Bring back the outputs of a finished run as they were; whether that was possible."""
    same = state.outputs == outputs_digest(stage.name)
    return bool(state.files) and same and dvc.restore_outputs(stage.name, state.files)


def _export(stage: Stage, run: StageRun, checked: Any) -> bool:
    """Write the outputs of a finished run again; whether that was possible."""
    shutil.rmtree(run._staged, ignore_errors=True)
    if stage.export is None or not stage.export(run, checked):
        return False
    _publish(run, outputs_digest(stage.name))
    return True


def _compute(stage: Stage, run: StageRun, check: "Future[Any]") -> None:
    shutil.rmtree(run._staged, ignore_errors=True)
    with _begin_workers(stage, run.params):
        with suppress(TimeoutError):
            check.result(timeout=QUICK_S)
        _compute_in_ray(stage, run, check)


def _compute_in_ray(stage: Stage, run: StageRun, check: "Future[Any]") -> None:
    # Imported late: they take seconds, and bad parameters should be told at once.
    from pipelines.run import session

    preload = stage.preload(run.params)
    with session.ray_session(stage.trains, stage.trials, check, preload) as run._session:
        mark("Ray started")
        checked = check.result()
        mark("inputs checked")
        from pipelines.run import tracking

        tags = _tags(run)
        tracker = tracking.start_run(
            run.name, pipeline_name(run.params), tags, run.state.mlflow_run_id
        )
        run._tracker, run.state.mlflow_run_id = tracker, tracker.run_id
        run.state.save(run.folder)
        tracker.log_params(tracked_params(run.name, run.params))
        tracker.log_dict(run.params.model_dump(mode="json"), "params.json")
        mark("MLflow run opened")
        try:
            stage.run(run, checked)
            _publish(run, outputs_digest(stage.name))
        except BaseException as error:
            tracker.fail(error)
            if isinstance(error, tracking.TrackingError):
                raise PipelineError(
                    f"MLflow does not answer: {without_password(str(error))}. What is"
                    " trained is kept",
                    "Start the stage again when it answers",
                ) from error
            raise
        tracker.finish()
        mark("outputs written")
    mark("Ray stopped")


def _say(stage: str, text: str) -> None:
    print(f"{stage}: {text}", file=sys.stderr, flush=True)


def _tell_differences(inputs: Inputs) -> None:
    """Why a new run begins although an unfinished one of the stage exists."""
    for name, differences in unfinished_runs(inputs, RUNS)[:1]:
        shown = ", ".join(differences[:6]) + (", ..." if len(differences) > 6 else "")
        _say(
            inputs.stage,
            f"this is a new run: the unfinished run {name} has other inputs: {shown}",
        )


def _leave_out(stage: Stage, params: Params) -> None:
    """Write outputs that say that `tasks` leaves this stage out, and what it hands on."""
    text = "This stage was left out: `tasks` in params.yaml does not name its task.\n"
    for path in dvc.outputs_of(stage_definition(stage.name)):
        target = ROOT / path
        if target.is_dir():
            shutil.rmtree(target)
        if target.suffix == ".json":
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps({"left_out": True}) + "\n")
        else:
            target.mkdir(parents=True)
            (target / "README.md").write_text(text)
    stage.hand_on(params, ROOT)
    _say(stage.name, "left out, as `tasks` does not name its task")


def pipeline_name(params: Params) -> str:
    """Names the parent run: the DVC experiment, else the recipe and a hash of what it does."""
    what = params.model_dump_json(exclude={"data", "budget"})
    digest = hashlib.sha256(what.encode()).hexdigest()[:8]
    return os.environ.get("DVC_EXP_NAME") or f"{params.recipe}-{digest}"


def _tags(run: StageRun) -> dict[str, str]:
    from pipelines.run import tracking

    return {
        "stage": run.name,
        "identity": run.identity,
        "ray_run": run.run_name,
        "recipe": run.params.recipe,
        "dvc_stage": os.environ.get("DVC_STAGE", ""),
        "dvc_exp": os.environ.get("DVC_EXP_NAME", ""),
        **tracking.git_tags(),
    }


def _publish(run: StageRun, digest: str) -> None:
    """Move the staged outputs to where `dvc.yaml` names them, whole, then mark the run finished."""
    paths = dvc.outputs_of(stage_definition(run.name))
    missing = [path for path in paths if not (run._staged / path).exists()]
    if missing:
        raise RuntimeError(f"stage {run.name} did not write {', '.join(missing)}")
    files = {
        path: (run._staged / path).read_text()
        for path in (f"metrics/{run.name}.json", f"lineage/{run.name}.json")
    }
    for path in paths:
        target = ROOT / path
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not one rename: on a cluster data/ and .runs/ are mounts of their own.
        aside = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.move(run._staged / path, aside)
        aside.replace(target)
    shutil.rmtree(run._staged)
    if not run.unfinished:
        run.state.files, run.state.outputs = files, digest
    run.state.save(run.folder)
