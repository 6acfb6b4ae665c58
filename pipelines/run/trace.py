"""When what happens in a stage's processes: for `pipelines.benchmarks.startup`."""

import os
import time
from pathlib import Path

VARIABLE = "ELSA_TRACE"


def mark(event: str) -> None:
    """Note that something is done in this process; nothing where `ELSA_TRACE` names no file."""
    if file := os.environ.get(VARIABLE):
        with Path(file).open("a") as stream:
            stream.write(f"{time.time():.3f} {os.getpid()} {event}\n")
