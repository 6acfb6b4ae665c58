"""The processes of a local Ray's workers, forked from one that has imported a training loop.

Else each worker imports torch, timm or mmdet by itself, which takes it longer than a small
training; a new worker after a failure, and each trial of a sweep, do it again. `local_ray` has Ray
start `forked_worker.py` for a worker, which asks this process for it.
"""

import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines.run.forked_worker import ADDRESS, FORKED

OF_RAY_TRAIN = ("pandas", "pyarrow.fs")
"""What every worker imports before its loop: of Ray Train's imports those that survive a fork."""


@contextmanager
def forking(modules: Sequence[str]) -> Iterator[None]:
    """Within it a fork server runs at `ADDRESS` that has imported `modules`, or is about to.

    It ends with this process, however that ends, and leaves alone what it has forked.

    Args:
        modules: none of them may import Ray, whose connections do not survive a fork.
    """
    # Of this user only, as whoever connects runs code. Not in TMPDIR: a socket's path is short.
    folder = tempfile.mkdtemp(prefix="elsa-", dir="/tmp")
    address = str(Path(folder) / "socket")
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(address)
            listening.listen(128)
            server = subprocess.Popen(
                [sys.executable, "-m", __name__, str(listening.fileno()), folder, *modules],
                stdin=subprocess.PIPE,  # closed when this process ends
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # of warnings that imports print
                pass_fds=[listening.fileno()],
                # Threads do not survive a fork; a worker sets their number itself.
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is the driver's
            )
        os.environ[ADDRESS] = address
        try:
            yield
        finally:
            del os.environ[ADDRESS]
            server.kill()
            server.communicate()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def serve(listening: socket.socket) -> dict[str, Any] | None:
    """Fork for each request. Returns the request in the new process, and None in this one when
    whoever started it has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that nobody has to wait for the children
    while True:
        ready, _, _ = select.select([listening, sys.stdin], [], [])
        if sys.stdin in ready:
            return None
        connection, _ = listening.accept()
        # Who asks may be killed meanwhile, as Ray does where a worker is too slow to start.
        with connection, connection.makefile("rb") as stream, suppress(OSError, ValueError):
            _, files, _, _ = socket.recv_fds(connection, 1, 3)
            request: dict[str, Any] = json.loads(stream.readline())
            if os.fork() == 0:
                return {**request, "files": files}
            for file in files:
                os.close(file)
            connection.sendall(FORKED)


def become(request: dict[str, Any]) -> None:
    """Run the Python program of a request in this process, as if it had been started for it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)  # Ray kills the whole group of a worker that has ended
    for number, file in enumerate(request["files"]):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    os.nice(max(0, request["nice"] - os.nice(0)))
    sys.argv[:] = request["command"]
    sys.orig_argv[:] = [sys.executable, *sys.argv]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def main(number: str, folder: str, *modules: str) -> None:
    request = None
    with socket.socket(fileno=int(number)) as listening:
        for module in (*modules, *OF_RAY_TRAIN):
            with suppress(Exception):  # the worker meets it, too, and tells
                importlib.import_module(module)
        gc.collect()
        gc.freeze()  # a collection would copy all pages that the workers share
        request = serve(listening)
    if request:
        become(request)
    else:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
