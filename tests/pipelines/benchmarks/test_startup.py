"""The timeline of a stage's start: what is noted, by whom, and how it is told."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines.benchmarks import startup
from pipelines.run import trace


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["ray::RayTrainWorker   "], "ray::RayTrainWorker"),
        (["/v/bin/python", "-m", "pipelines.detect", "--force"], "pipelines.detect"),
        (["/v/bin/python", "-u", "/v/ray/log_monitor.py", "--x"], "log_monitor.py"),
        (["/v/gcs_server", "--log_dir=/tmp"], "gcs_server"),
        ([], ""),
    ],
)
def test_a_process_is_named_by_what_it_does(words: list[str], name: str) -> None:
    assert startup.name_of(words) == name


def test_a_process_is_looked_at_with_its_children() -> None:
    start = time.time()
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    parent = subprocess.Popen([sys.executable, "-c", code])
    found: dict[int, startup.Process] = {}
    try:
        while len(found) < 2 or max(one.used(1e9) for one in found.values()) < 0.2:
            startup.look(psutil.Process(parent.pid), start, found)
            time.sleep(0.05)
    finally:
        for one in (*psutil.Process(parent.pid).children(recursive=True), parent):
            one.kill()
        parent.wait()
    busy = max(found.values(), key=lambda one: one.used(1e9))
    assert busy.begun >= found[parent.pid].begun > -1
    assert busy.used(0.0) == 0.0


def test_events_are_told_once_and_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(trace.VARIABLE, str(tmp_path / "trace"))
    for event in ("command", "first step", "loop ended", "loop ended"):
        trace.mark(event)
    lines = (tmp_path / "trace").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "command",
        "first step",
        *["loop ended"] * 2,
    ]
    worker = startup.Process("ray::RayTrainWorker", 1.0, [(1.0, 0.0), (4.0, 2.5), (6.0, 4.0)])
    events = [
        (0.5, 1, "command"),
        (4.0, 7, "first step"),
        (5, 7, "loop ended"),
        (6, 8, "loop ended"),
    ]
    line = startup.Timeline("pretrain", 7.0, events, {7: worker})
    assert (line.at("first step"), line.at("loop ended", last=True)) == (4.0, 6)
    table = startup.table_of_events(line)
    assert "| first step | 4.0 s | 3.5 s | ray::RayTrainWorker |" in table
    assert table.count("loop ended") == 1
    assert "| ray::RayTrainWorker | 1.0 s | 2.5 s |" in startup.table_of_processes(line)
    startup.draw([line], tmp_path / "startup.png")
    assert (tmp_path / "startup.png").read_bytes().startswith(b"\x89PNG")
