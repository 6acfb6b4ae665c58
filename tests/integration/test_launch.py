"""A Ray Train run that can't succeed: told once, with the checkpoints before it whole."""

import json
import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from pipelines.errors import PipelineError
from pipelines.params import load_params
from pipelines.run import checkpoints as storage
from pipelines.run import fit as launch
from pipelines.run import preflight, tracking
from pipelines.run.reporter import RayReporter


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


def loop(config: dict) -> None:
    """Notes that it started, keeps a checkpoint, then fails as `config` says."""
    reporter = RayReporter(config["reporting"])
    scratch = Path(config["scratch"])
    with (scratch / "starts").open("a") as file:
        file.write("started\n")
    folder = scratch / "checkpoint"
    folder.mkdir(exist_ok=True)
    (folder / "state").write_text("small")
    reporter.keep(folder)
    try:
        if config["fails"] == "nothing":
            (scratch / "pages").write_text(json.dumps(pages_taken()))
            return
        if config["fails"] == "deaf":
            time.sleep(600)
        if config["fails"] == "loader":
            if (scratch / "starts").read_text() == "started\n":
                list(DataLoader(Numbers(), num_workers=1, multiprocessing_context="spawn"))
            return
        if config["fails"] == "nan":
            raise PipelineError("the loss is nan at step 7; lower pretrain.lr")
        (folder / "state").write_text("large" * 10_000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        reporter.keep(folder)  # the storage takes no more
    finally:
        reporter.close()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


@pytest.fixture
def fit(tmp_path: Path, monkeypatch):
    """Runs the loop that ends as the argument says, on a local Ray; the run's scratch folder."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    # The loop has no model, and a clean clone no compiled operator.
    loads = preflight.Finding("operator", "here", "is not needed")
    monkeypatch.setattr(preflight, "_operator", lambda node, use_gpu: loads)
    changes = {"storage.path": str(tmp_path / "storage"), "scaling.num_workers": 1}
    params = load_params("smoke", changes=changes)
    assert params.scaling.max_failures == 3

    def run(fails: str) -> None:
        scratch = tmp_path / fails
        scratch.mkdir()
        launch.fit(
            loop,
            {"scratch": str(scratch), "fails": fails},
            params,
            name=f"{fails}-1",
            mlflow_run_id=tracking.start_run("pretrain", "test", {}).run_id,
            data={},
            stops=True,
        )

    with launch.ray_session():
        yield run


@pytest.mark.skipif(not launch.worker_environment(), reason="needs glibc 2.35")
def test_a_worker_keeps_the_memory_of_a_step_for_the_next(fit, tmp_path: Path) -> None:
    fit("nothing")
    taken = json.loads((tmp_path / "nothing/pages").read_text())
    assert min(taken[1:]) < 1000  # of 38,400


def assert_small_is_kept(tmp_path: Path, fails: str) -> None:
    assert (tmp_path / fails / "starts").read_text() == "started\n"
    kept = storage.newest_complete(str(tmp_path / "storage" / f"{fails}-1"))
    assert kept is not None
    with kept.as_directory() as folder:
        assert (Path(folder) / "state").read_text() == "small"


def test_a_failure_that_would_repeat_is_told_once(fit, tmp_path: Path) -> None:
    for fails, message in (
        ("nan", "the loss is nan at step 7; lower pretrain.lr"),
        ("full", "can't be written to storage.path: .*File too large"),
    ):
        with pytest.raises(PipelineError, match=message):
            fit(fails)
        assert_small_is_kept(tmp_path, fails)


def test_a_run_goes_on_after_a_loader_process_was_killed(fit, tmp_path: Path, capsys) -> None:
    fit("loader")
    assert (tmp_path / "loader/starts").read_text() == "started\nstarted\n"
    told = capsys.readouterr().err
    assert "worker 0 failed: DataLoader worker" in told
    assert "lower data_workers or prefetch_factor" in told
    assert "going on from the last checkpoint" in told


def test_a_second_interrupt_ends_a_run_that_does_not_stop(fit, tmp_path: Path, capsys) -> None:
    def interrupt() -> None:
        while storage.newest_complete(str(tmp_path / "storage/deaf-1")) is None:
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
