"""What a local Ray starts for a worker: it has the fork server make the worker's process, and ends.

Without a fork server, and for a worker with a runtime environment, it becomes Ray's own script.
Imports nothing of ours or of Ray, as each worker waits for it.
"""

import json
import os
import socket
import sys
from pathlib import Path

ADDRESS = "ELSA_FORK_SERVER"
"""Variable that names the fork server's socket."""
PLAIN = "--language=PYTHON"
"""Ray's argument for its own script, where that has nothing to do but to start a Python program."""
FORKED = b"forked"
"""The fork server's answer."""


def ask(command: list[str]) -> bool:
    """Whether the fork server has made a process of a Python program and its arguments."""
    request = {
        "command": command,
        "environment": dict(os.environ),
        "folder": str(Path.cwd()),
        "nice": os.nice(0),
    }
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(os.environ[ADDRESS])
            socket.send_fds(connection, [b"\n"], [0, 1, 2])
            connection.sendall(json.dumps(request).encode() + b"\n")
            return connection.recv(len(FORKED)) == FORKED
        except OSError:  # it was killed
            return False


def main(program: str, *arguments: str) -> None:
    """Start Ray's program for workers; `arguments` are its own and those for Ray's script."""
    own = [one for one in arguments if one.startswith(("--language", "--serialized-runtime-env"))]
    if own == [PLAIN] and ask([program, *(one for one in arguments if one != PLAIN)]):
        return
    script = str(Path(program).with_name("setup_worker.py"))
    os.execv(sys.executable, [sys.executable, script, program, *arguments])  # noqa: S606


if __name__ == "__main__":
    main(*sys.argv[1:])
