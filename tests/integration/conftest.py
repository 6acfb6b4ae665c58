"""A workspace: this checkout's files in a folder of its own, on the smoke recipe; its processes."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from ruamel.yaml import YAML

from pipelines.data.demo.draw import prepare
from pipelines.params import compose
from pipelines.run.checkpoints import fault

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no Chromium to look at the page with")


class Workspace:
    """Runs commands as a user would, in a clone with its own runs, tracking and cache."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.listening: set[tuple[str, str]] = set()
        """Address and process of each socket that `watch_sockets` saw."""
        self.env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "OMP_NUM_THREADS"):
            self.env.pop(name, None)

    def start(self, *command: str, **options) -> subprocess.Popen:
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            **options,
        )

    def run(self, *command: str, timeout: float = 600) -> tuple[int, str]:
        """Exit code and all output."""
        with self.start(*command) as process:
            try:
                output, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return process.returncode, output

    def left_running(self) -> list[psutil.Process]:
        """Processes of commands that have ended, after some seconds to end in."""
        mine = [p for p in psutil.process_iter(["cwd"]) if p.info["cwd"] == str(self.root)]
        return psutil.wait_procs(mine, timeout=10)[1]

    @contextmanager
    def watch_sockets(self, process: subprocess.Popen) -> Iterator[None]:
        """Note what `process` and its children listen on, every few seconds."""
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(3):
                with suppress(psutil.Error):
                    for one in psutil.Process(process.pid).children(recursive=True):
                        self._note(one)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _note(self, process: psutil.Process) -> None:
        with suppress(psutil.Error):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    self.listening.add((connection.laddr.ip, process.name()))


def wait_until(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        if time.monotonic() > deadline:
            kill_all(process)
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def kill_all(process: subprocess.Popen) -> None:
    """DVC first: were its command to die before it, it would be killed while it writes its lock,
    and DVC does not write that whole or not at all (README, "When something is wrong")."""
    for victim in [psutil.Process(process.pid), *descendants(process)]:
        with suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL)
    process.wait()


def checkpoints(workspace: Workspace) -> set[Path]:
    """The whole ones: a folder is there from the first of its files on."""
    whole = set()
    for folder in workspace.root.glob("storage/pretrain-*/checkpoint_2*"):
        with suppress(FileNotFoundError):  # deleted meanwhile, as an old one
            if fault(folder) is None:
                whole.add(folder)
    return whole


def wait_for_checkpoint(workspace: Workspace, process: subprocess.Popen) -> None:
    old = checkpoints(workspace)
    wait_until(process, lambda: bool(checkpoints(workspace) - old))


def train_workers(process: subprocess.Popen, wanted: int | None = 2) -> list[psutil.Process]:
    found = []
    for child in descendants(process):
        with suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
    assert wanted in (None, len(found))
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def rendered(url: str, scratch: Path) -> str:
    """A page's document as a browser has it after its scripts ran."""
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(f"--user-data-dir={scratch / 'profile'}", "--virtual-time-budget=60000"),
        *("--dump-dom", url),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def copy_checkout(root: Path) -> None:
    """This checkout's files without what runs have written, on the smoke recipe."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        written = name == "dvc.lock" or name.startswith("metrics/")
        if (ROOT / name).exists() and not written:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name, follow_symlinks=False)
    with (root / "params.yaml").open("w") as file:
        yaml = YAML()
        yaml.dump(compose(["recipe=smoke"]).model_dump(mode="json"), file)


def commit_all(root: Path) -> None:
    """A git repository of the files in `root`."""
    for git in (
        ["init", "-q", "-b", "main"],
        ["add", "-A"],
        ["-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "start"],
    ):
        subprocess.run(["git", *git], cwd=root, check=True)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("workspace")
    copy_checkout(root)
    shutil.copy(Path(__file__).with_name("loaded.py"), root / "sitecustomize.py")
    commit_all(root)
    workspace = Workspace(root)
    workspace.env["PYTHONPATH"] = str(root)
    workspace.env["ELSA_TEST_LOADED"] = str(tmp_path_factory.mktemp("loaded"))
    return workspace


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, compiled_library: Path) -> Workspace:
    """A workspace with the operator and few data, as `build_op` and `prepare` leave them."""
    root = tmp_path_factory.mktemp("prepared")
    copy_checkout(root)
    shutil.copytree(compiled_library, root / "build/op")
    counts = {"digits_per_class": 20, "train_scenes": 4, "val_scenes": 4, "max_digits": 3}
    sizes = {"image_size": 28, "train_variants": 1, "scene_size": 96}
    prepare(SimpleNamespace(seed=0, **sizes, **counts), root / "data")
    return Workspace(root)
