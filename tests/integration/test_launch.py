"""A Ray Train run that can't succeed: told once, with the checkpoints before it whole."""

import json
import math
import os
import resource
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from torch.utils.data import DataLoader, Dataset

from pipelines.errors import PipelineError
from pipelines.params import compose
from pipelines.run import checkpoints, preflight, tracking
from pipelines.run.environment import worker_environment
from pipelines.run.finding import Finding
from pipelines.run.fit import RunSpec
from pipelines.run.fit import fit as run_fit
from pipelines.run.session import ray_session, storage_path


class Numbers(Dataset):
    """Its second number kills the process that loads it, as one that has too little memory is."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> int:
        if index:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def pages_taken() -> list[int]:
    """Pages that each of six steps with the same tensors takes from the system."""
    taken = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(megabytes << 18) for megabytes in (2, 48, 100)]
        del tensors
        taken.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return taken


@dataclass(frozen=True)
class Job:
    scratch: str
    fails: str


def loop(job: Job, device, reporter) -> None:
    """Notes that it started, keeps a checkpoint, then fails as the job says."""
    scratch = Path(job.scratch)
    with (scratch / "starts").open("a") as file:
        file.write("started\n")
    folder = scratch / "checkpoint"
    folder.mkdir(exist_ok=True)
    (folder / "state").write_text("small")
    reporter.keep(folder)
    try:
        if job.fails == "nothing":
            (scratch / "pages").write_text(json.dumps(pages_taken()))
            return
        if job.fails == "budget":
            while not reporter.stopping():
                time.sleep(0.1)
            return
        if job.fails == "deaf":
            time.sleep(600)
        if job.fails == "hang":
            if reporter.rank == 1 and (scratch / "starts").read_text().count("\n") == 2:
                time.sleep(600)
            torch.distributed.barrier()
            return
        if job.fails == "loader":
            if (scratch / "starts").read_text() == "started\n":
                list(DataLoader(Numbers(), num_workers=1, multiprocessing_context="spawn"))
            return
        if job.fails == "nan":
            raise PipelineError("the loss is nan at step 7", "Lower pretrain.lr")
        (folder / "state").write_text("large" * 10_000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        reporter.keep(folder)  # the storage takes no more
        reporter.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


@pytest.fixture(scope="module")
def session():
    """One local Ray for all tests of this file, whose workers start as those of a stage do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with ray_session(preload=("pipelines.train.classify",)) as connected:
            yield connected


@pytest.fixture
def fit(session, tmp_path: Path, monkeypatch):
    """Runs the loop that ends as the argument says; the run's scratch folder is named so."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    # The loop has no model, and a clean clone no compiled operator.
    loads = Finding("operator", "here", "is not needed")
    monkeypatch.setattr(preflight, "_operator", lambda node, use_gpu: loads)
    params = compose(
        ["recipe=smoke", f"storage.path={tmp_path / 'storage'}", "scaling.num_workers=1"]
    )
    assert params.scaling.max_failures == 3

    def run(fails: str, stop_after_s: float = math.inf, **scaling: int) -> None:
        scratch = tmp_path / fails
        scratch.mkdir()
        spec = RunSpec(
            stage="pretrain",
            name=f"{fails}-1",
            mlflow_run_id=tracking.start_run("pretrain", "test", {}).run_id,
            scaling=params.scaling.model_copy(update=scaling),
            storage=storage_path(params),
            data={},
            local=session.local,
            stops=True,
            stop_after_s=stop_after_s,
        )
        run_fit(loop, Job(str(scratch), fails), spec)

    return run


@pytest.mark.skipif(not worker_environment(), reason="needs glibc 2.35")
def test_a_worker_keeps_the_memory_of_a_step_for_the_next(fit, tmp_path: Path) -> None:
    fit("nothing")
    taken = json.loads((tmp_path / "nothing/pages").read_text())
    assert min(taken[1:]) < 1000  # of 38,400


def test_workers_make_ids_and_random_numbers_of_their_own(session) -> None:
    """What they are forked from must not have begun to: two trials would have one placement group,
    whose ids are of the generator in C++ that this kind of id is of."""

    @ray.remote(num_cpus=0)
    class Worker:
        def draw(self) -> tuple[str, float]:
            return ray.NodeID.from_random().hex(), np.random.random()

    first, second = ray.get([worker.draw.remote() for worker in [Worker.remote(), Worker.remote()]])
    assert first[0] != second[0]
    assert first[1] != second[1]


def assert_small_is_kept(tmp_path: Path, fails: str) -> None:
    assert (tmp_path / fails / "starts").read_text() == "started\n"
    kept = checkpoints.newest_complete(str(tmp_path / "storage" / f"{fails}-1"))
    assert kept is not None
    with kept.as_directory() as folder:
        assert (Path(folder) / "state").read_text() == "small"


def test_a_failure_that_would_repeat_is_told_once(fit, tmp_path: Path) -> None:
    for fails, message in (
        ("nan", "the loss is nan at step 7. Lower pretrain.lr"),
        ("full", "can't be written to storage.path: .*File too large"),
    ):
        with pytest.raises(PipelineError, match=message):
            fit(fails)
        assert_small_is_kept(tmp_path, fails)


def test_a_run_resumes_after_a_loader_process_was_killed(fit, tmp_path: Path, capsys) -> None:
    fit("loader")
    assert (tmp_path / "loader/starts").read_text() == "started\nstarted\n"
    told = capsys.readouterr().err
    assert "worker 0 failed: DataLoader worker" in told
    assert "lower loader.data_workers, loader.prefetch_factor or" in told
    assert "training resumes from the last checkpoint" in told


def test_a_run_that_hangs_tells_where_each_worker_stands_and_resumes(fit, tmp_path, capsys) -> None:
    fit("hang", num_workers=2, hang_s=4)
    assert (tmp_path / "hang/starts").read_text() == "started\n" * 4
    told = capsys.readouterr().err
    stuck, waiting = (
        next(line for line in told.splitlines() if f"worker {rank} on" in line) for rank in (1, 0)
    )
    assert "hangs: nothing for " in stuck
    assert "It is in loop (test_launch.py:" in stuck
    assert "barrier (distributed_c10d.py:" in waiting
    assert "training resumes from the last checkpoint" in told


def test_a_run_whose_budget_is_spent_is_asked_to_stop_and_says_why(fit, tmp_path, capsys) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit("budget", stop_after_s=3)
    assert_small_is_kept(tmp_path, "budget")
    assert "its budget is spent: stopping after a checkpoint" in capsys.readouterr().err


def test_a_second_interrupt_ends_a_run_that_does_not_stop(fit, tmp_path: Path, capsys) -> None:
    def interrupt() -> None:
        while checkpoints.newest_complete(str(tmp_path / "storage/deaf-1")) is None:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(2)  # the display shows what it is asked to
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        fit("deaf")
    thread.join()
    assert "Ctrl-C again stops at once" in capsys.readouterr().err
    assert_small_is_kept(tmp_path, "deaf")
