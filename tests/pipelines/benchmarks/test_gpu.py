"""The harness of `make gpu`, with parts that end in every way, and its training on a CPU."""

import argparse
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from ops.benchmarks import elsa_attention
from pipelines.benchmarks import gpu, gpu_counters, gpu_dense, gpu_training
from pipelines.benchmarks.gpu import Outcome, Part

pytestmark = pytest.mark.slow
FIGURES = """
import pathlib, sys
pathlib.Path(sys.argv[1]).write_text('[1]')
print('| a table |')
print('a warning', file=sys.stderr)
print('| of two rows |')
"""
SMALL = "import sys; sys.exit('CUDA out of memory' if int(sys.argv[1]) > 2 else 0)"
CHILD = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(600)
"""


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits for its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_every_part_is_told_and_none_stops_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "build", lambda *_: Outcome("build", "Building", "done"))
    parts = [
        Part("fails", "Fails", 60, ["-c", "raise SystemExit('this is wrong')"]),
        Part("faults", "Faults", 60, ["-c", "import os; os.kill(os.getpid(), 11)"]),
        Part("hangs", "Hangs", 5, ["-c", CHILD, "{json}"]),
        Part("small", "Small", 60, ["-c", SMALL, "{batch}"], batch=8),
        Part("tool", "Tool", 60, ["-c", ""], tool="no-such-tool"),
        Part("module", "Module", 60, ["-c", ""], modules=("json", "no_such.module")),
        Part("good", "Good", 60, ["-c", FIGURES, "{json}"]),
    ]
    arguments = argparse.Namespace(out=tmp_path, device="cpu", minutes=5, parts=None)
    assert gpu.measure(parts, arguments) == 1
    figures = json.loads((tmp_path / "figures.json").read_text())
    status = {part["name"]: part["status"] for part in figures["parts"]}
    assert status == {
        "build": "done",
        "fails": "failed with code 1",
        "faults": "killed by signal 11",
        "hangs": "stopped: it took longer than 5 s",
        "small": "done",
        "tool": "left out: not installed: no-such-tool",
        "module": "left out: not installed: no_such.module",
        "good": "done",
    }
    report = (tmp_path / "report.md").read_text()
    assert "a rehearsal, no figure counts" in report
    assert "this is wrong" in report
    assert "too little memory for batch 8: tried again with 4" in report
    assert "too little memory for batch 4: tried again with 2" in report
    assert "\n| a table |\n| of two rows |\n" in report
    for place in (tmp_path, gpu.ROOT):
        assert str(place) not in report + json.dumps(figures)
    assert figures["parts"][-1]["figures"] == [1]
    assert not alive(json.loads((tmp_path / "hangs.json").read_text()))
    assert "Hangs: stopped" in capsys.readouterr().out


def test_no_part_begins_after_the_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "build", lambda *_: Outcome("build", "Building", "done"))
    arguments = argparse.Namespace(out=tmp_path, device="cpu", minutes=0, parts=None)
    assert gpu.measure([Part("late", "Late", 60, ["-c", ""])], arguments) == 0
    assert "| Late | left out: no time left |" in (tmp_path / "report.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_command_is_understood(
    compiled_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part's program exists, and the benchmark's own parser takes what it is given."""
    names = [part.name for part in gpu.parts_of("cuda")]
    assert names[:4] == ["values", "tests", "operator", "training"]
    assert set(names) > {part.name for part in gpu.parts_of("cpu")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parsed = 0
    for device in ("cpu", "cuda"):
        for part in gpu.parts_of(device):
            words = [w.replace("{json}", "f").replace("{batch}", "8") for w in part.command]
            module = words[words.index("-m") + 1]
            assert importlib.util.find_spec(module), module
            if module == "ops.benchmarks.elsa_attention":
                parsed += 1
                elsa_attention._parse(words[words.index("-m") + 2 :])
    assert parsed == 3  # the table on both devices, and once for ncu


def test_counters_of_kernels() -> None:
    name = "void elsa::(anonymous namespace)::product_kernel<c10::BFloat16, (int)7>(elsa::Problem)"
    rows = [
        ("gpu__time_duration.sum", "ns", "95,232"),
        ("sm__inst_issued.avg.pct_of_peak_sustained_elapsed", "%", "71.5"),
        ("dram__throughput.avg.pct_of_peak_sustained_elapsed", "%", "40.25"),
        ("l1tex__data_bank_conflicts_pipe_lsu.sum", "", "n/a"),
    ]
    head = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    lines = [f'"0","{name}","{metric}","{unit}","{value}"' for metric, unit, value in rows]
    log = "\n".join(["==PROF== Connected", head, *lines])
    (row,) = gpu_counters.counters(log)
    assert row["kernel"] == "void elsa::product_kernel<c10::BFloat16, 7>"
    assert row["us"] == "95.23"
    assert row["bank conflicts"] == "n/a"
    assert row["bound"] == "issue"


def test_the_training_part_on_a_cpu(
    compiled_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(gpu_training.ROOT / "params.yaml", tmp_path)
    monkeypatch.setattr(gpu_training, "ROOT", tmp_path)  # without the demo's data: minutes of them
    figures = {}
    assert gpu_training.measure(torch.device("cpu"), 0, figures.__setitem__), figures
    assert figures["demo, one epoch"]["images_per_second"] > 0
    for name, value in figures.items():
        if "difference" in name:
            assert value == 0.0, name
    assert figures["float16 with its scaler"]["skipped_steps"] >= 0


def test_the_dense_part_on_a_cpu(compiled_library: Path) -> None:
    found: dict[str, object] = {}
    try:
        assert gpu_dense.measure(torch.device("cpu"), found.__setitem__), found
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    assert list(found) == ["detect", "segment", "detect, deterministic kernels"]
    for figures in found.values():
        assert figures["images_per_second"] > 0
        assert figures["two runs differ by"] == 0
