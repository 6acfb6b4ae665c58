"""What a stage learns of the DVC that started it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.paths import ROOT
from pipelines.run.dvc import _forces, is_forced, outputs_of


@pytest.mark.parametrize(
    ("words", "forced"),
    [
        ("repro", False),
        ("repro pretrain", False),
        ("repro --force", True),
        ("repro -f pretrain", True),
        ("repro --force --single-item pretrain", True),
        ("repro --force dvc.yaml:pretrain", True),
        ("repro --force detect", False),  # DVC forces what it depends on; nobody asked for that
        ("exp run --force pretrain -S pretrain.lr=1e-3", True),
        ("exp run -S pretrain.lr=1e-3 report", False),
        ("queue start", False),
    ],
)
def test_only_what_the_user_named_is_forced(words: str, forced: bool) -> None:
    assert _forces(words.split(), "pretrain") is forced


def test_the_command_of_the_dvc_above_a_process_is_found(tmp_path: Path) -> None:
    """Through the shell that DVC starts a stage by."""
    dvc = tmp_path / "dvc"  # as DVC's own script is called
    dvc.write_text(
        "import subprocess, sys\n"
        "code = 'from pipelines.run.dvc import is_forced; print(is_forced(\"pretrain\"))'\n"
        "subprocess.run(['/bin/sh', '-c', f\"'{sys.executable}' -c '{code}'; true\"], check=True)\n"
    )
    for words, expected in (("repro --force pretrain", "True"), ("repro pretrain", "False")):
        command = [sys.executable, str(dvc), *words.split()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected, done.stderr
    assert not is_forced("pretrain")  # no DVC is above this test


def test_outputs_metrics_and_plots_are_all_outputs() -> None:
    definition = {
        "outs": ["weights/a", {"data/b": {"cache": True}}],
        "metrics": [{"metrics/a.json": {"cache": False}}],
        "plots": ["plots/a"],
    }
    assert outputs_of(definition) == ["weights/a", "data/b", "metrics/a.json", "plots/a"]


def test_without_a_remote_results_come_back_from_the_cache(tmp_path: Path) -> None:
    for name in (".dvc/config", "dvc.yaml", "dvc.lock", "params.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)

    def dvc(*words: str) -> str:
        command = [sys.executable, "-m", "dvc", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stderr

    assert "no remote specified" in dvc("push")
    (tmp_path / "own").write_text("result")
    dvc("add", "own")
    (tmp_path / "own").unlink()
    dvc("checkout", "own.dvc")
    assert (tmp_path / "own").read_text() == "result"
