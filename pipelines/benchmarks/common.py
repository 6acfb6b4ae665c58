"""What the benchmarks share: their options, a training without pretrained weights, a table."""

import argparse
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.params import Params, load_params, override, parse_change
from pipelines.run.fit import RunSpec
from pipelines.run.session import storage_path
from pipelines.tasks import TASKS, Job, task_of_stage

STAGES = tuple(task.stage for task in TASKS.values())


@dataclass(frozen=True)
class Noted:
    """A training whose loop also notes what happens in a file."""

    job: Job
    notes: str


def parser_of(module: str, doc: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark, with `-S section.key=value` as changes of params.yaml."""
    description, _, _ = (doc or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog=f"python -m pipelines.benchmarks.{module}", description=description
    )
    parser.add_argument("-S", dest="set", action="append", default=[], metavar="KEY=VALUE")
    return parser


def params_of(changes: Sequence[str], more: Mapping[str, Any]) -> Params:
    """`params.yaml` with the user's changes, and `more` by dotted name over them."""
    return override(load_params(), dict(map(parse_change, changes)) | dict(more), "-S")


@contextmanager
def scratch_tracking() -> Iterator[Path]:
    """A folder that is deleted afterwards, with an MLflow store in it."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{Path(folder) / 'mlflow.db'}"
        yield Path(folder)


def training(stage: str, params: Params) -> Job:
    """The job of a stage on the prepared data, from random weights.

    Raises:
        PipelineError: no data are prepared.
    """
    return Job(stage, params, task_of_stage(stage).find_dataset(params))


def spec_of(job: Job, name: str, run_id: str, stops: bool = False) -> RunSpec:
    """A run on the local Ray."""
    return RunSpec(
        stage=job.stage,
        name=name,
        mlflow_run_id=run_id,
        scaling=job.params.scaling,
        storage=storage_path(job.params),
        data={job.dataset.name: job.dataset.place},
        local=True,
        stops=stops,
    )


def markdown(rows: list[dict[str, str]]) -> str:
    """The rows, which have the same keys, as a table."""
    lines = [rows[0], *(row.values() for row in rows)]
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, f"|---|{'---:|' * (len(rows[0]) - 1)}", *body])
