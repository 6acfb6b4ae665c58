"""A Ray Train run that can't succeed: told once, with the checkpoints before it whole."""

import resource
from pathlib import Path

import pytest

from pipelines.errors import PipelineError
from pipelines.params import load_params
from pipelines.run import launch, preflight, storage, tracking
from pipelines.run.reporting import RayReporter


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
        if config["fails"] == "nan":
            raise PipelineError("the loss is nan at step 7; lower pretrain.lr")
        (folder / "state").write_text("large" * 10_000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        reporter.keep(folder)  # the storage takes no more
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        reporter.close()


def test_a_failure_that_would_repeat_is_told_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    # The loop has no model, and a clean clone no compiled operator.
    loads = preflight.Finding("operator", "here", "is not needed")
    monkeypatch.setattr(preflight, "_operator", lambda node, use_gpu: loads)
    changes = {"storage.path": str(tmp_path / "storage"), "scaling.num_workers": 1}
    params = load_params("smoke", changes=changes)
    assert params.scaling.max_failures == 3
    with launch.ray_session():
        for fails, message in (
            ("nan", "the loss is nan at step 7; lower pretrain.lr"),
            ("full", "can't be written to storage.path: .*File too large"),
        ):
            scratch = tmp_path / fails
            scratch.mkdir()
            tracker = tracking.start_run("pretrain", "test", {})
            with pytest.raises(PipelineError, match=message):
                launch.fit(
                    loop,
                    {"scratch": str(scratch), "fails": fails},
                    params,
                    name=f"{fails}-1",
                    mlflow_run_id=tracker.run_id,
                    data={},
                )
            assert (scratch / "starts").read_text() == "started\n"
            kept = storage.newest_complete(str(tmp_path / "storage" / f"{fails}-1"))
            assert kept is not None
            with kept.as_directory() as folder:
                assert (Path(folder) / "state").read_text() == "small"
