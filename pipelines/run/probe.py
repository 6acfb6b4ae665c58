"""A stage's training for a minute, to see what the whole of it takes."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import PipelineError
from pipelines.run.quotes import Timeline

if TYPE_CHECKING:
    import torch

    from pipelines.run.fit import Loop
    from pipelines.train.job import Job
    from pipelines.train.reporter import Reporter

FILE = "timeline.json"
"""In the probe's last checkpoint."""


class Probing:
    """Passes everything on to a reporter, notes when it came, and stops the loop after a time."""

    def __init__(self, reporter: "Reporter", seconds: float) -> None:
        self.reporter, self.seconds = reporter, seconds
        self.rank, self.world_size = reporter.rank, reporter.world_size
        self.scratch = reporter.scratch
        self.steps: list[tuple[float, int]] = []
        self.evaluated: list[tuple[float, float]] = []
        self.total = 0

    @contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        with self.reporter.checkpoint() as folder:
            yield folder

    def tell(self, line: str) -> None:
        self.reporter.tell(line)

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        self.total = self.total or total
        if total == self.total:  # else images of the last evaluation
            self.steps.append((time.time(), done))
        self.reporter.progress(done, total, unit, f"probe: {note}")

    def metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.reporter.metrics(metrics, step)

    def stopping(self) -> bool:
        over = bool(self.steps) and time.time() - self.steps[0][0] >= self.seconds
        return self.reporter.stopping() or (self.rank == 0 and over)

    def keep(self, folder: Path | None) -> None:
        self.reporter.keep(self._noted(folder))

    def save(self, metrics: Mapping[str, float], epoch: int, folder: Path | None) -> None:
        if self.steps:  # else weights that are only evaluated
            self.evaluated.append((self.steps[-1][0], time.time()))
        self.reporter.save(metrics, epoch, self._noted(folder))

    def _noted(self, folder: Path | None) -> Path | None:
        if folder:
            seen = {"steps": self.steps, "evaluated": self.evaluated, "total": self.total}
            (folder / FILE).write_text(json.dumps(seen | {"now": time.time()}))
        return folder


@dataclass(frozen=True)
class ProbeLoop:
    """What the workers run."""

    loop: "Loop"
    seconds: float

    def __call__(self, job: "Job", device: "torch.device", reporter: "Reporter") -> None:
        self.loop(job, device, Probing(reporter, self.seconds))


def probe(loop: "Loop", job: "Job", seconds: float, preload: Sequence[str]) -> Timeline:
    """Train for so many seconds from the first step on, as the stage does.

    Args:
        preload: as for `ray_session`.

    Raises:
        PipelineError: the training fails, or the cluster has no room for it.
    """
    began = time.monotonic()
    from pipelines.run.session import ray_session, storage_path

    with ray_session(preload=preload) as session:
        from pipelines.run import checkpoints, tracking
        from pipelines.run.fit import RunSpec, fit

        name = f"probe-{job.stage}-{time.time_ns():x}"
        tracker = tracking.start_run(name, "probes", {"stage": job.stage, "probe_s": seconds})
        spec = RunSpec(
            stage=job.stage,
            name=name,
            mlflow_run_id=tracker.run_id,
            scaling=job.params.scaling,
            storage=storage_path(job.params),
            data={job.dataset.name: job.dataset.place},
            local=session.local,
            stops=True,
        )
        try:
            checkpoint = fit(ProbeLoop(loop, seconds), job, spec)
            took = time.monotonic() - began
            with checkpoint.as_directory() as folder:
                seen: dict[str, Any] = json.loads((Path(folder) / FILE).read_text())
        except BaseException as error:
            tracker.fail(error)
            raise
        finally:
            checkpoints.delete(spec.path)
        tracker.finish()
    steps = [(when, done) for when, done in seen["steps"]]
    if not steps:
        raise PipelineError(f"{job.stage}: there is nothing to train, so nothing to probe")
    return Timeline(
        steps=steps,
        evaluated=[(begin, end) for begin, end in seen["evaluated"]],
        total=seen["total"],
        around=took - (seen["now"] - steps[0][0]),
    )
