"""One process of a stage is killed, or its terminal interrupts all of them: what goes on, what
ends, and that nothing is left running, listening or on the disk.

The tests of this file start one run after another, in their order.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from .conftest import (
    Workspace,
    commit_all,
    descendants,
    kill_all,
    train_workers,
    wait_for_checkpoint,
)

STAGE = (sys.executable, "-m", "pipelines.pretrain")
REPRO = ("dvc", "repro", "--single-item", "pretrain")
Address = tuple[int, Any]
"""Family and address of a socket."""


@pytest.fixture(scope="module")
def checkout(prepared: Workspace) -> Iterator[Workspace]:
    recipe = ("recipe=smoke", "tasks=[classify]", "pretrain.epochs=20")
    code, output = prepared.run(sys.executable, "-m", "pipelines", "compose", *recipe)
    assert code == 0, output
    commit_all(prepared.root)
    with tempfile.TemporaryDirectory() as folder:  # not pytest's: paths of sockets are short
        prepared.env["TMPDIR"] = folder
        yield prepared


@contextmanager
def training(checkout: Workspace, *command: str) -> Iterator[subprocess.Popen]:
    """The command from its first checkpoint on, with suspended workers, so that it can't end
    before it is disturbed. Afterwards nothing of it runs or listens."""
    with checkout.start(*command, start_new_session=True) as process:
        try:
            wait_for_checkpoint(checkout, process)
            for worker in train_workers(process):
                worker.suspend()
            listening = {one for one in sockets(process) if answers(one)}
            assert len(listening) > 3  # of Ray's processes and the fork server
            yield process
        except BaseException:
            kill_all(process)
            raise
    assert not checkout.left_running()
    assert not [one for one in listening if answers(one)]


def sockets(process: subprocess.Popen) -> set[Address]:
    """Of `process` and all that it started."""
    found: set[Address] = set()
    for one in [psutil.Process(process.pid), *descendants(process)]:
        with suppress(psutil.Error):
            for each in one.net_connections("all"):
                if each.family == socket.AF_UNIX:
                    found.add((each.family, each.laddr))
                elif each.status == psutil.CONN_LISTEN:
                    found.add((each.family, tuple(each.laddr)))
    return found


def answers(address: Address) -> bool:
    family, where = address
    with socket.socket(family) as client, suppress(OSError):
        client.connect(where)
        return True
    return False


def scratch(checkout: Workspace) -> list[Path]:
    """Folders of what workers keep on the disk beside the storage."""
    return list(Path(checkout.env["TMPDIR"]).glob("elsa-*"))


def left_on_disk(checkout: Workspace) -> list[Path]:
    """Temporary files, but for Ray's logs."""
    place = Path(checkout.env["TMPDIR"])
    found = [path for path in place.rglob("*") if path.is_file()]
    return [path for path in found if path.relative_to(place).parts[0] != "ray"]


def end(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and output, when it has ended by itself."""
    output, _ = process.communicate(timeout=100)
    return process.returncode, output


def told_by_dvc(output: str) -> signal.Signals:
    """The signal that ended the stage: of SIGKILL, DVC reads -9 or 137, as its shell is
    Bash, which the stage replaces, or dash, which waits for it."""
    (found,) = re.findall(r"exited with (-?\d+)", output)
    code = int(found)
    return signal.Signals(-code if code < 0 else code - 128)  # else an ordinary exit code


def weights(checkout: Workspace) -> str:
    """Their SHA-256."""
    model: dict = json.loads((checkout.root / "weights/pretrain/model.json").read_text())
    return model["sha256"]


def test_ctrl_c_in_a_terminal_reaches_dvc_and_the_stage(checkout: Workspace) -> None:
    with training(checkout, *REPRO) as process:
        assert len(scratch(checkout)) == 2
        os.killpg(process.pid, signal.SIGINT)
        for worker in train_workers(process):
            worker.resume()
        code, output = end(process)
    assert code != 0
    assert "stopping after a checkpoint" in output
    assert "interrupted; start it again to resume" in output
    assert told_by_dvc(output) == signal.SIGINT
    assert not left_on_disk(checkout)


def test_ctrl_c_twice_ends_what_does_not_stop(checkout: Workspace) -> None:
    with training(checkout, *REPRO) as process:
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout
        for line in process.stdout:
            if "Ctrl-C again stops at once" in line:
                break
        os.killpg(process.pid, signal.SIGINT)
        code, output = end(process)
    assert code != 0
    assert told_by_dvc(output) == signal.SIGINT
    assert not left_on_disk(checkout)


def test_a_killed_gcs_ends_the_stage_with_all_of_ray(checkout: Workspace) -> None:
    with training(checkout, *STAGE) as process:
        (gcs,) = (one for one in descendants(process) if one.name() == "gcs_server")
        gcs.kill()
        code, output = end(process)
    assert code == 1
    assert "GCS may have been killed" in output  # Ray's own words


def stage_of(process: subprocess.Popen) -> psutil.Process:
    (found,) = (one for one in descendants(process) if "pipelines.pretrain" in one.cmdline()[-1:])
    return found


def test_a_killed_stage_takes_its_processes_with_it(checkout: Workspace) -> None:
    with training(checkout, *REPRO) as process:
        stage_of(process).kill()
        code, output = end(process)
    assert code != 0
    assert told_by_dvc(output) == signal.SIGKILL


def test_a_killed_dvc_leaves_the_stage_to_finish(checkout: Workspace) -> None:
    with training(checkout, *REPRO) as process:
        assert len(scratch(checkout)) == 2  # without those that the killed stage left
        code, output = checkout.run(*REPRO)
        assert code != 0
        assert f"(PID {process.pid})" in output  # DVC's own words

        stage, workers = stage_of(process), train_workers(process)
        process.kill()
        process.wait()
        code, output = checkout.run(*REPRO)
        assert code != 0
        assert f"is already running: process {stage.pid} " in output
        for worker in workers:
            worker.resume()
        stage.wait(100)
    code, output = checkout.run(*REPRO)
    assert code == 0, output
    assert "its inputs are those of a finished run" in output
    assert "epoch" not in output


def test_workers_that_ray_ends_for_lack_of_memory_resume(checkout: Workspace) -> None:
    memory, expected = psutil.virtual_memory(), weights(checkout)
    limit = min(memory.percent / 100 + 6e9 / memory.total, 0.95)  # other tests take some, too
    checkout.env["RAY_memory_usage_threshold"] = str(limit)
    with training(checkout, *STAGE, "--force") as process:
        hog, first = [], train_workers(process)
        while any(worker.is_running() for worker in first):
            hog.append(np.ones(2**25))  # 256 MiB
            assert len(hog) < 60
            time.sleep(0.5)  # Ray looks every 250 ms
        hog.clear()
        code, output = end(process)
    del checkout.env["RAY_memory_usage_threshold"]
    assert code == 0, output
    assert "running low on memory" in output
    assert "If memory was short, end other programs, or lower" in output
    assert "training resumes from the last checkpoint" in output
    assert weights(checkout) == expected
    assert not left_on_disk(checkout)


def test_a_killed_raylet_ends_its_stage_and_not_that_of_another_checkout(
    checkout: Workspace, tmp_path: Path
) -> None:
    expected = weights(checkout)
    mine = (".runs", "storage", "weights", "mlflow.db", ".dvc")
    shutil.copytree(checkout.root, tmp_path / "other", ignore=shutil.ignore_patterns(*mine))
    other = Workspace(tmp_path / "other")
    with training(checkout, *STAGE, "--force") as process:
        (raylet,) = (one for one in descendants(process) if one.name() == "raylet")
        raylet.kill()
        code, output = other.run(*STAGE)
        assert code == 0, output
        code, output = end(process)
    assert code == 1
    assert "marked dead" in output  # Ray's own words
    assert not other.left_running()

    shutil.rmtree(checkout.root / "weights")
    code, output = checkout.run(*STAGE)
    assert code == 0, output
    assert ": epoch 1:" not in output  # it resumed
    assert weights(checkout) == weights(other) == expected
    assert not left_on_disk(checkout)
