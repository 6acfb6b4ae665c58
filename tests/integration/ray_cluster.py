"""A Ray cluster of processes on loopback, with a token and the head's tracking server."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from .conftest import ROOT, free_port

PASSWORD = secrets.token_hex(16)


class RayCluster:
    """Nodes started by `ray start`, as processes of this test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes: list[subprocess.Popen] = []
        # Paths of sockets may have 107 bytes, which pytest's folders fill.
        self.temp = Path(f"/tmp/ray-test-{os.getpid()}")
        self.port, self.dashboard = free_port(), free_port()
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        self.env |= {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(folder),  # no token of this user's
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # as env.sh: these tests run under `uv run`
            "RAY_AUTH_MODE": "token",
            # A node that is killed counts as lost after seconds, not half a minute.
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "3",
            "RAY_AUTH_TOKEN_PATH": str(token),
        }

    def start(self, *command: str, **env: str) -> None:
        log = (self.folder / f"node{len(self.nodes)}.log").open("w")
        node = subprocess.Popen(
            [
                *command,
                *("--block", "--num-cpus=1", "--object-store-memory=100000000"),
                "--node-ip-address=127.0.0.1",
                # Ray's default is the same for each Ray of a machine; taken, no job can start.
                f"--dashboard-agent-listen-port={free_port()}",
            ],
            env=self.env | env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.nodes.append(node)

    def start_head(self) -> None:
        self.start(
            "ray",
            "start",
            "--head",
            f"--port={self.port}",
            f"--ray-client-server-port={free_port()}",
            f"--dashboard-port={self.dashboard}",
            "--dashboard-host=127.0.0.1",
            f"--temp-dir={self.temp}",
        )
        deadline = time.monotonic() + 120
        while (answer := self.submit("--list"))[0] != 0:
            assert self.nodes[0].poll() is None, (self.folder / "node0.log").read_text()
            assert time.monotonic() < deadline, answer[1]
            time.sleep(1)

    def join(self) -> None:
        """Start a second node, which Ray's command refuses, or moves to the network's address."""
        code = (
            "from ray._private import services\n"
            "services.resolve_ip_for_localhost = lambda host: host\n"
            "from ray.scripts.scripts import main\n"
            "main()"
        )
        join = ("start", f"--address=127.0.0.1:{self.port}")
        self.start(sys.executable, "-c", code, *join, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="1")

    def start_tracking(self) -> None:
        """The head's tracking server, as `ray up` starts it but on loopback."""
        credentials = self.folder / ".mlflow/credentials"
        credentials.parent.mkdir()
        credentials.write_text(
            f"[mlflow]\nmlflow_tracking_username = elsa\nmlflow_tracking_password = {PASSWORD}\n"
        )
        self.tracking_data = self.folder / "tracking"
        self.tracking = f"http://127.0.0.1:{(port := free_port())}"
        self.starting = subprocess.Popen(
            ["bash", "pipelines/cluster/tracking.sh"],
            cwd=ROOT,
            env=self.env
            | {
                "ELSA_MLFLOW_HOST": "127.0.0.1",
                "ELSA_MLFLOW_PORT": str(port),
                "ELSA_MLFLOW_WORKERS": "1",
                "ELSA_MLFLOW_DATA": str(self.tracking_data),
            },
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def stop(self) -> None:
        with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess):
            server = psutil.Process(int((self.tracking_data / "server.pid").read_text()))
            for process in [*server.children(recursive=True), server]:
                process.terminate()
        for node in reversed(self.nodes):
            node.terminate()
        for node in self.nodes:
            try:
                node.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, signal.SIGKILL)
        shutil.rmtree(self.temp, ignore_errors=True)

    def submit_command(self, *arguments: str) -> list[str]:
        address = f"http://127.0.0.1:{self.dashboard}"
        return [sys.executable, "-m", "pipelines.cli", "submit", "--address", address, *arguments]

    def submit(self, *arguments: str, **env: str) -> tuple[int, str]:
        return self.run(*self.submit_command(*arguments), **env)

    def run(self, *command: str, **env: str) -> tuple[int, str]:
        """Exit code and all output of a command in this checkout."""
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.env | env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
            check=False,
        )
        return done.returncode, done.stdout
