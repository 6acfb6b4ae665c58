"""What "nothing is lost" costs: the time that checkpoints take, and from a kill to the next step.

    python -m pipelines.benchmarks.recovery --kills 3

Each training stage runs on a local Ray, on the prepared data, with a checkpoint every ten steps,
far more often than a recipe has them. `blocks` is how long training stands still for one: its
state is gathered and written to the local disk; digests and upload go on beside the next steps.
`share` is that time at the recipe's `storage.checkpoint_minutes`. A worker is then killed with
SIGKILL after a checkpoint, again and again, and `to a new step` is the time until a step is done
that was not done before. Last the run is asked to stop, as by Ctrl-C.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines.data import dataset as places
from pipelines.errors import PipelineError
from pipelines.params import Params, load_params, parse_change

STAGES = {"pretrain": "imagenet", "detect": "coco", "segment": "ade20k"}


def observed(config: dict[str, Any]) -> None:
    """A stage's training loop that also notes, in a file, when steps and checkpoints are done."""
    from pipelines.run.reporter import RayReporter

    report_progress, report = RayReporter.progress, RayReporter._report

    def note(reporter: Any, kind: str, done: int) -> None:
        if reporter.rank == 0:
            with Path(config["notes"]).open("a") as file:
                file.write(json.dumps([kind, time.time(), done, os.getpid()]) + "\n")

    def progress(self: Any, done: int, *args: Any, **kwargs: Any) -> None:
        report_progress(self, done, *args, **kwargs)
        note(self, "step", done)

    def reported(self: Any, *args: Any) -> None:
        report(self, *args)
        note(self, "checkpoint", 0)

    RayReporter.progress = progress  # type: ignore[method-assign]
    RayReporter._report = reported  # type: ignore[method-assign,assignment]
    config["loop"](config)


def loop_of(stage: str, params: Params) -> tuple[dict[str, Any], dict[str, str]]:
    """The configuration of a stage's loop, and its data.

    Raises:
        PipelineError, DataError: no data are prepared.
    """
    name = STAGES[stage]
    found = places.check(params, name, getattr(params, stage).num_classes)
    data = {name: found["place"]}
    if stage == "pretrain":
        from pipelines.data.images import DataPlace
        from pipelines.pretrain import train_loop_per_worker

        place = DataPlace(found["place"], found["skipped"])
        return {"loop": train_loop_per_worker, "params": params, "data": place}, data
    from pipelines.mm import train

    job = train.Job(stage, params, found["place"], tuple(found["classes"]), weights=None)
    return {"loop": train.train_loop_per_worker, "job": job}, data


def read(notes: Path) -> list[tuple[str, float, int, int]]:
    """What is noted so far."""
    lines = notes.read_text().splitlines() if notes.exists() else []
    return [tuple(json.loads(line)) for line in lines]


def kill(notes: Path, kills: int, finished: threading.Event) -> None:
    """Kill rank 0 so many times, each time after a checkpoint; then ask the run to stop."""
    killed: list[dict[str, float]] = []
    while not finished.wait(0.05):
        said = read(notes)
        since = [n for n in said if not killed or n[3] != killed[-1]["process"]]
        fresh = killed and not any(n[2] > killed[-1]["done"] for n in since)
        saved = [i for i, n in enumerate(since) if n[0] == "checkpoint"]
        # Two checkpoints, and some steps after them.
        if fresh or len(saved) < 2 or len(since) < saved[-1] + 4:
            continue
        if len(killed) == kills:
            os.kill(os.getpid(), signal.SIGINT)
            return
        process = since[-1][3]
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        killed.append({"process": process, "done": max(n[2] for n in said), "time": time.time()})
        with notes.open("a") as file:
            file.write(json.dumps(["kill", time.time(), 0, process]) + "\n")


def measure(
    stage: str, params: Params, kills: int, minutes: float, scratch: Path
) -> dict[str, str]:
    """One row of the table, of a run with so many kills; `minutes` is a recipe's interval."""
    from pipelines.run import checkpoints as storage
    from pipelines.run import fit as launch
    from pipelines.run import tracking

    notes, finished = scratch / f"{stage}.jsonl", threading.Event()
    config, data = loop_of(stage, params)
    tracker = tracking.start_run(stage, "benchmark", {})
    watcher = threading.Thread(target=kill, args=(notes, kills, finished))
    watcher.start()
    try:
        launch.fit(
            observed,
            config | {"notes": str(notes)},
            params,
            name=f"{stage}-recovery",
            mlflow_run_id=tracker.run_id,
            data=data,
            stops=True,
        )
        raise PipelineError(f"{stage} ended before {kills} kills; raise {stage}.epochs")
    except KeyboardInterrupt:  # as it was asked to
        pass
    finally:
        finished.set()
        watcher.join()
    newest = storage.newest_complete(str(scratch / f"{stage}-recovery"))
    assert newest is not None
    with newest.as_directory() as folder:
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return {"stage": stage, "MB": f"{size / 1e6:.0f}", **row(read(notes), minutes)}


def row(notes: list[tuple[str, float, int, int]], minutes: float) -> dict[str, str]:
    plain, across = list[float](), list[float]()
    for before, between, after in triples(notes):
        if before[0] == after[0] == "step" and before[3] == after[3]:
            if between[0] == "checkpoint":
                across.append(after[1] - before[1])
            elif between[0] == "step":
                plain.append(between[1] - before[1])
    recovered = []
    for place, one in enumerate(notes):
        if one[0] == "kill":
            done = max(n[2] for n in notes[:place] if n[0] == "step")
            new = [n for n in notes[place:] if n[0] == "step" and n[2] > done]
            recovered.append(new[0][1] - one[1])
    step = statistics.median(plain)
    blocks = max(0.0, statistics.median(across) - step)
    return {
        "step ms": f"{1000 * step:.0f}",
        "blocks ms": f"{1000 * blocks:.0f}",
        f"share at {minutes:g} min": f"{blocks / (60 * minutes):.3%}",
        "to a new step s": f"{statistics.median(recovered):.1f}",
        "lowest to highest": f"{min(recovered):.1f} to {max(recovered):.1f}",
    }


def triples(notes: list[Any]) -> Iterator[tuple[Any, Any, Any]]:
    return zip(notes, notes[1:], notes[2:], strict=False)


def markdown(rows: list[dict[str, str]]) -> str:
    """The rows, which have the same keys, as a table."""
    lines = [rows[0], *(row.values() for row in rows)]
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, f"|---|{'---:|' * (len(rows[0]) - 1)}", *body])


def main() -> None:
    from pipelines.run import fit as launch

    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.benchmarks.recovery", description=description
    )
    parser.add_argument("--kills", type=int, default=3, help="of each stage; default %(default)s")
    parser.add_argument("-S", dest="set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{scratch / 'mlflow.db'}"
        changes = dict(parse_change(text) for text in arguments.set)
        often: dict[str, Any] = {"storage.checkpoint_minutes": 1e-9, "storage.path": folder}
        try:
            recipe = load_params(changes=changes)
            params = load_params(
                changes=changes | often | {"scaling.max_failures": arguments.kills}
            )
            with launch.ray_session():
                minutes = recipe.storage.checkpoint_minutes
                for stage in STAGES:
                    print(f"{stage}: {arguments.kills} kills", flush=True)
                    rows.append(measure(stage, params, arguments.kills, minutes, scratch))
        except PipelineError as error:
            sys.exit(f"error: {error}")
    print(f"\nrecipe {recipe.recipe}, {recipe.scaling.num_workers} workers")
    print(markdown(rows))


if __name__ == "__main__":
    main()
