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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines.run import environment
from pipelines.run.forked_worker import ADDRESS, FORKED
from pipelines.run.scratch import scratch_folder
from pipelines.run.tracking_uri import modules_of_store

SETTINGS = "RAY_"
"""The start of the names of Ray's settings among a process's variables. Ray reads them when it is
imported, and some are known when its raylet is: of which job a worker is, for example."""
OF_TRAINING = ("ray.train.torch", "pipelines.run.fit")
"""What workers import of Ray Train, and to report to it."""


@contextmanager
def forking(modules: Sequence[str], trains: bool) -> Iterator[None]:
    """Within it a fork server runs at `ADDRESS` that has imported the modules, or is about to.

    It ends with this process, however that ends, and leaves alone what it has forked.

    Args:
        modules: none of them may import Ray, which waits for the first worker and its settings.
        trains: its workers run Ray Train.
    """
    environment.set_local()
    of_ray = (*OF_TRAINING, *modules_of_store()) if trains else ()
    # Of this user only, as whoever connects runs code. Not in TMPDIR: a socket's path is short.
    with scratch_folder("/tmp") as folder:  # noqa: S108
        address = str(folder / "socket")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(address)
            listening.listen(128)
            server = subprocess.Popen(
                [
                    *(sys.executable, "-m", __name__, str(listening.fileno())),
                    *(",".join(modules), ",".join(of_ray)),
                ],
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


def load(modules: str) -> None:
    """Import them for all processes that are forked from now on."""
    gc.disable()  # imports make no garbage, and looking for some takes a sixth of their time
    for module in filter(None, modules.split(",")):
        with suppress(Exception):  # the worker meets it, too, and tells
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection would copy all pages that the workers share
    gc.enable()


def serve(listening: socket.socket, of_ray: str) -> dict[str, Any] | None:
    """Fork for each request. Returns the request in the new process, and None in this one when
    whoever started it has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that nobody has to wait for the children
    settings: dict[str, str] = {}
    while True:
        ready, _, _ = select.select([listening, sys.stdin], [], [])
        if sys.stdin in ready:
            return None
        connection, _ = listening.accept()
        # Who asks may be killed meanwhile, as Ray does where a worker is too slow to start.
        with connection, connection.makefile("rb") as stream, suppress(OSError, ValueError):
            _, files, _, _ = socket.recv_fds(connection, 1, 3)
            request: dict[str, Any] = json.loads(stream.readline())
            asked = {k: v for k, v in request["environment"].items() if k.startswith(SETTINGS)}
            if not settings:
                settings = asked
                os.environ.update(settings)
                importlib.import_module("pipelines.run.local_ray").spare_generator_of_ids()
                load(of_ray)
            if asked == settings:
                if os.fork() == 0:
                    return {**request, "files": files}
                connection.sendall(FORKED)
            for file in files:
                os.close(file)


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
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # else all workers have the generator of the fork server
    sys.argv[:] = request["command"]
    sys.orig_argv[:] = [sys.executable, *sys.argv]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def main(number: str, modules: str, of_ray: str) -> None:
    request = None
    with socket.socket(fileno=int(number)) as listening:
        load(modules)
        request = serve(listening, of_ray)
        if request is None:
            shutil.rmtree(Path(listening.getsockname()).parent, ignore_errors=True)
    if request:
        become(request)


if __name__ == "__main__":
    main(*sys.argv[1:])
