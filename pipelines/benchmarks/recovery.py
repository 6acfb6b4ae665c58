"""What "nothing is lost" costs: the time that checkpoints take, and from a kill to the next step.

    python -m pipelines.benchmarks.recovery --kills 3

Each training stage runs on a local Ray, on the prepared data, with a checkpoint every ten steps,
far more often than a recipe has them. `blocks` is how long training stands still for one: its
state is gathered and written to the local disk; digests and upload happen beside the next steps.
`share` is that time at the recipe's `storage.checkpoint_minutes`. A worker is then killed with
SIGKILL after a checkpoint, again and again, and `to a new step` is the time until a step is done
that was not done before. Last the run is asked to stop, as by Ctrl-C.
"""

import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines.benchmarks.common import (
    STAGES,
    Noted,
    markdown,
    params_of,
    parser_of,
    scratch_tracking,
    spec_of,
    training,
)
from pipelines.errors import PipelineError
from pipelines.params import Params
from pipelines.tasks import task_of_stage


def observed(noted: Noted, device: Any, reporter: Any) -> None:
    """A stage's training loop that also notes, in a file, when steps and checkpoints are done."""
    kind = type(reporter)
    report_progress, report = kind.progress, kind._report

    def note(what: str, done: int) -> None:
        if reporter.rank == 0:
            with Path(noted.notes).open("a") as file:
                file.write(json.dumps([what, time.time(), done, os.getpid()]) + "\n")

    def progress(self: Any, done: int, *args: Any, **kwargs: Any) -> None:
        report_progress(self, done, *args, **kwargs)
        note("step", done)

    def reported(self: Any, *args: Any) -> None:
        report(self, *args)
        note("checkpoint", 0)

    kind.progress, kind._report = progress, reported
    task_of_stage(noted.job.stage).loop(noted.job, device, reporter)


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
    from pipelines.run import checkpoints, tracking
    from pipelines.run.fit import fit

    notes, finished = scratch / f"{stage}.jsonl", threading.Event()
    job = training(stage, params)
    tracker = tracking.start_run(stage, "benchmark", {})
    watcher = threading.Thread(target=kill, args=(notes, kills, finished))
    watcher.start()
    try:
        spec = spec_of(job, f"{stage}-recovery", tracker.run_id, stops=True)
        fit(observed, Noted(job, str(notes)), spec)
        raise PipelineError(f"{stage} ended before {kills} kills; raise {stage}.epochs")
    except KeyboardInterrupt:  # as it was asked to
        pass
    finally:
        finished.set()
        watcher.join()
    newest = checkpoints.newest_complete(str(scratch / f"{stage}-recovery"))
    assert newest is not None
    with newest.as_directory() as folder:
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return {"stage": stage, "MB": f"{size / 1e6:.0f}", **row(read(notes), minutes)}


def row(notes: list[tuple[str, float, int, int]], minutes: float) -> dict[str, str]:
    """The figures of a run from its notes."""
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
    """Each note with the two after it."""
    return zip(notes, notes[1:], notes[2:], strict=False)


def main() -> None:
    from pipelines.run.session import ray_session

    parser = parser_of("recovery", __doc__)
    parser.add_argument("--kills", type=int, default=3, help="of each stage; default %(default)s")
    arguments = parser.parse_args()
    rows = []
    with scratch_tracking() as scratch:
        often = {
            "storage.checkpoint_minutes": 1e-9,
            "storage.path": str(scratch),
            "scaling.max_failures": arguments.kills,
        }
        try:
            recipe = params_of(arguments.set, {})
            params = params_of(arguments.set, often)
            minutes = recipe.storage.checkpoint_minutes
            for stage in STAGES:
                print(f"{stage}: {arguments.kills} kills", flush=True)
                with ray_session(preload=task_of_stage(stage).loop.preload(params.scaling)):
                    rows.append(measure(stage, params, arguments.kills, minutes, scratch))
        except PipelineError as error:
            sys.exit(f"error: {error}")
    print(f"\nrecipe {recipe.recipe}, {recipe.scaling.num_workers} workers")
    print(markdown(rows))


if __name__ == "__main__":
    main()
