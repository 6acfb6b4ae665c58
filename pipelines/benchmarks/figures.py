"""The figures of a benchmark, told and kept as they come."""

import json
from pathlib import Path
from typing import Any


class Figures:
    """Call it with a name and a value: a line on stdout, and all figures so far in a file.

    Args:
        file: where to write them as JSON; None only prints.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.found: dict[str, Any] = {}

    def __call__(self, name: str, value: Any) -> None:
        self.found[name] = value
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number:.4g}" for key, number in value.items())
        print(f"{name}: {value}", flush=True)
        if self.file:
            self.file.write_text(json.dumps(self.found, indent=2) + "\n")
