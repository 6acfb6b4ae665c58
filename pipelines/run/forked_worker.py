"""What a local Ray starts for a worker: it has the fork server make the worker's process, and ends.

Without a fork server, and for a worker whose runtime environment is more than variables, it becomes
Ray's own script.
Imports nothing of ours or of Ray, as each worker waits for it.
"""

import json
import os
import socket
import sys
from pathlib import Path

ADDRESS = "ELSA_FORK_SERVER"
"""Variable that names the fork server's socket."""
PYTHON, RUNTIME = "--language=PYTHON", "--serialized-runtime-env-context="
"""Ray's arguments for its own script."""
FORKED = b"forked"
"""The fork server's answer."""


def variables(arguments: tuple[str, ...]) -> dict[str, str] | None:
    """The worker's own; None where its runtime environment is more than that."""
    if PYTHON not in arguments:
        return None
    runtime = [one.removeprefix(RUNTIME) for one in arguments if one.startswith(RUNTIME)]
    wishes = json.loads(runtime[0]) if runtime else {}
    found: dict[str, str] = wishes.pop("env_vars", {})
    plain = wishes.pop("py_executable", sys.executable) == sys.executable
    # Ray expands those that name others.
    expanded = any("$" in value for value in found.values())
    return found if plain and not expanded and not any(wishes.values()) else None


def ask(command: list[str], own: dict[str, str]) -> bool:
    """Whether the fork server has made a process of a Python program and its arguments.

    Args:
        own: variables beside those of this process.
    """
    request = {
        "command": command,
        "environment": {**os.environ, **own},
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
    own, plain = variables(arguments), [one for one in arguments if not one.startswith(RUNTIME)]
    if own is not None and ask([program, *(one for one in plain if one != PYTHON)], own):
        return
    script = str(Path(program).with_name("setup_worker.py"))
    os.execv(sys.executable, [sys.executable, script, program, *arguments])  # noqa: S606


if __name__ == "__main__":
    main(*sys.argv[1:])
