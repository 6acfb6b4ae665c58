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

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from pipelines.data import dataset as places
from pipelines.data.images import DataPlace
from pipelines.errors import PipelineError
from pipelines.params import Params, load_params, parse_change

WAYS = ("bare", "Ray Train", "full")


class Timed:
    """Notes when each epoch ends, and passes everything on to `reporter` if there is one."""

    rank, world_size = 0, 1

    def __init__(self, reporter: Any = None) -> None:
        self.reporter = reporter
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


def train(params: Params, data: DataPlace, target: str, reporter: Any = None) -> None:
    """Train, and write images/s and the two shares to the file `target`."""
    import torch

    from pipelines.train.classify import Classifier

    torch.set_num_threads(params.scaling.cpus_per_worker)
    torch.set_flush_denormal(True)
    device = torch.device("cuda" if params.scaling.use_gpu else "cpu")
    timed = Timed(reporter)
    classifier = Classifier(params, data, device, timed)
    classifier.fit()
    images = classifier.steps * params.pretrain.batch_size * (len(timed.ends) - 1)
    seconds, reporting, beside = (b - a for a, b in zip(timed.ends[0], timed.ends[-1], strict=True))
    measured = [images / seconds, 100 * reporting / seconds, 100 * beside / seconds]
    Path(target).write_text(json.dumps(measured))


def loop_per_worker(config: dict[str, Any]) -> None:
    """What the Ray Train worker runs."""
    from pipelines.run.reporter import RayReporter

    reporter = RayReporter(config["reporting"]) if config["full"] else None
    train(config["params"], config["data"], config["target"], reporter)
    if reporter:
        reporter.close()
        return
    import ray

    from pipelines.run import checkpoints as storage

    with tempfile.TemporaryDirectory() as empty:
        storage.seal(Path(empty))
        ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(empty))


def measure(way: str, params: Params, data: DataPlace, scratch: Path) -> list[float]:
    """Images/s of one way, percent of its time in reports, and processor time beside it in percent
    of one core; files go below `scratch`."""
    from pipelines.run import fit as launch
    from pipelines.run import tracking

    target = str(scratch / "rate.json")
    os.environ.update(launch.worker_environment())
    if way == "bare":
        process = multiprocessing.get_context("spawn").Process(
            target=train, args=(params, data, target)
        )
        process.start()
        process.join()
        if process.exitcode:
            raise PipelineError(f"the bare loop ended with code {process.exitcode}")
    else:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{scratch / 'mlflow.db'}"
        with launch.ray_session():
            tracker = tracking.start_run("benchmark", "benchmark", {})
            launch.fit(
                loop_per_worker,
                {"params": params, "data": data, "target": target, "full": way == "full"},
                params,
                name=f"benchmark-{time.time_ns():x}",
                mlflow_run_id=tracker.run_id,
                data={"imagenet": data.place},
            )
    return json.loads(Path(target).read_text())


def main() -> None:
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.benchmarks.training", description=description
    )
    parser.add_argument("--epochs", type=int, default=4, help="of each run; default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("-S", dest="set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    runs: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        changes = dict(parse_change(text) for text in arguments.set) | {
            "pretrain.epochs": arguments.epochs,
            "scaling.num_workers": 1,
            "storage.path": scratch,
        }
        try:
            if arguments.epochs < 2:
                raise PipelineError("--epochs must be 2 or more: the first is a warm-up")
            params = load_params(changes=changes)
            found = places.check(params, "imagenet", params.pretrain.num_classes)
            data = DataPlace(found["place"], found["skipped"])
            for _ in range(arguments.rounds):
                for way in WAYS:
                    runs[way].append(measure(way, params, data, Path(scratch)))
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
