"""What Ray Train, reporting and checkpoints cost: images/s of one training loop, three ways.

    python -m pipelines.benchmarks.training --epochs 4 --rounds 3

bare: the loop alone, in a process of its own. Ray Train: the same in a Ray Train worker that
reports nothing. full: with metrics and system metrics to MLflow, progress, and a checkpoint each
epoch. Counted is everything from the end of the first epoch to the end of the last: steps,
evaluations, and what the reports and checkpoints between them take. The ways take turns.

Where other work makes the machine faster and slower, the ratio of images/s says little. So the same
run also counts what there is to lose: the share of its time that the loop spends in reports, and
the processor time of all that runs beside it (Ray's processes, the worker's other threads), in
percent of one core. With a core to spare only the first is lost.
"""

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipelines.benchmarks.common import params_of, parser_of, scratch_tracking, spec_of, training
from pipelines.errors import PipelineError
from pipelines.tasks import Job

WAYS = ("bare", "Ray Train", "full")


class Timed:
    """Notes when each epoch ends, and passes everything on to `reporter` if there is one."""

    rank, world_size = 0, 1

    def __init__(self, reporter: Any = None) -> None:
        self.reporter = reporter
        self.scratch = Path(reporter.scratch if reporter else tempfile.gettempdir())
        self.ends: list[tuple[float, float, float]] = []
        """Clock, seconds in reports and processor seconds beside the loop, at each epoch's end."""
        self._reporting = 0.0

    def _report(self, method: str, *values: Any) -> None:
        if self.reporter:
            began = time.monotonic()
            getattr(self.reporter, method)(*values)
            self._reporting += time.monotonic() - began

    @contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        yield None

    def tell(self, line: str) -> None:
        self._report("tell", line)

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        self._report("progress", done, total, unit, note)

    def metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._report("metrics", metrics, step)

    def stopping(self) -> bool:
        return False

    def keep(self, folder: Path | None) -> None:
        self._report("keep", folder)

    def save(self, metrics: Mapping[str, float], epoch: int, folder: Path | None) -> None:
        self.ends.append((time.monotonic(), self._reporting, processor_seconds_beside()))
        self._report("save", metrics, epoch, folder)


def processor_seconds_beside() -> float:
    """Processor seconds so far of this run's other processes and of this one's other threads."""
    own = psutil.Process()
    raylet = own.parent() if multiprocessing.parent_process() is None else None
    driver = raylet.parent() if raylet else None
    processes = [driver, *driver.children(recursive=True)] if driver else [own]
    seconds = -time.thread_time()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds += times.user + times.system
    return seconds


@dataclass(frozen=True)
class Measured:
    """A training whose speed is written to a file."""

    job: Job
    target: str
    full: bool
    """Its reports go on to Ray, MLflow and the display."""


def train(job: Job, target: str, reporter: Any = None) -> None:
    """Train, and write images/s and the two shares to the file `target`."""
    import torch

    from pipelines.train.classify import Classifier

    params = job.params
    torch.set_num_threads(params.scaling.cpus_per_worker)
    torch.set_flush_denormal(True)
    device = torch.device("cuda" if params.scaling.use_gpu else "cpu")
    timed = Timed(reporter)
    classifier = Classifier(job, device, timed)
    classifier.fit()
    images = classifier.steps * params.pretrain.batch_size * (len(timed.ends) - 1)
    seconds, reporting, beside = (b - a for a, b in zip(timed.ends[0], timed.ends[-1], strict=True))
    measured = [images / seconds, 100 * reporting / seconds, 100 * beside / seconds]
    Path(target).write_text(json.dumps(measured))


def loop(measured: Measured, device: Any, reporter: Any) -> None:
    """What the Ray Train worker runs."""
    train(measured.job, measured.target, reporter if measured.full else None)
    if not measured.full:  # a run must end with a checkpoint
        with tempfile.TemporaryDirectory() as empty:
            reporter.keep(Path(empty))


def measure(way: str, job: Job, scratch: Path) -> list[float]:
    """Images/s of one way, percent of its time in reports, and processor time beside it in percent
    of one core; files go below `scratch`."""
    from pipelines.run import tracking
    from pipelines.run.environment import worker_environment
    from pipelines.run.fit import fit
    from pipelines.run.session import ray_session

    target = str(scratch / "rate.json")
    os.environ.update(worker_environment())
    if way == "bare":
        process = multiprocessing.get_context("spawn").Process(target=train, args=(job, target))
        process.start()
        process.join()
        if process.exitcode:
            raise PipelineError(f"the bare loop ended with code {process.exitcode}")
    else:
        with ray_session():
            run_id = tracking.start_run("benchmark", "benchmark", {}).run_id
            spec = spec_of(job, f"benchmark-{time.time_ns():x}", run_id)
            fit(loop, Measured(job, target, way == "full"), spec)
    found: list[float] = json.loads(Path(target).read_text())
    return found


def main() -> None:
    parser = parser_of("training", __doc__)
    parser.add_argument("--epochs", type=int, default=4, help="of each run; default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    arguments = parser.parse_args()
    runs: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    with scratch_tracking() as scratch:
        more = {
            "pretrain.epochs": arguments.epochs,
            "scaling.num_workers": 1,
            "storage.path": str(scratch),
        }
        try:
            if arguments.epochs < 2:
                raise PipelineError("--epochs must be 2 or more: the first is a warm-up")
            params = params_of(arguments.set, more)
            job = training("pretrain", params)
            for _ in range(arguments.rounds):
                for way in WAYS:
                    runs[way].append(measure(way, job, scratch))
                    print(f"{way}: {runs[way][-1][0]:.1f} img/s", flush=True)
        except PipelineError as error:
            sys.exit(f"error: {error}")
    bare = statistics.median(rate for rate, _, _ in runs["bare"])
    print(
        f"\nrecipe {params.recipe}, {arguments.epochs} epochs, {arguments.rounds} rounds (medians)"
    )
    print("| loop | img/s | lowest to highest | of bare | in reports | beside it, of one core |")
    print("|---|---:|---:|---:|---:|---:|")
    for way, values in runs.items():
        rates = [rate for rate, _, _ in values]
        middle, reports, beside = (
            statistics.median(column) for column in zip(*values, strict=True)
        )
        span = f"{min(rates):.1f} to {max(rates):.1f}"
        shares = f"{100 * middle / bare:.1f}% | {reports:.2f}% | {beside:.1f}%"
        print(f"| {way} | {middle:.1f} | {span} | {shares} |")


if __name__ == "__main__":
    main()
