"""What the operator is compiled from, and digests of it; without torch."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

SOURCE_DIR = Path(__file__).parent / "csrc"

# A comment, or what looks like one within a literal and is not.
_CPP = re.compile(
    r"""R"(?P<mark>[^(\s]*)\(.*?\)(?P=mark)"|"(?:\\.|[^"\\\n])*"|(?<!\w)'(?:\\.|[^'\\\n])+"""
    r"""'|//[^\n]*|/\*.*?\*/""",
    re.DOTALL,
)


def code_digest(path: Path) -> str:
    """SHA-256 of a C++ or CUDA file without its comments, blank lines and indentation."""
    text = path.read_text()
    bare = _CPP.sub(lambda found: " " if found[0].startswith("/") else found[0], text)
    lines = [" ".join(line.split()) for line in bare.splitlines()]
    return hashlib.sha256("\n".join(line for line in lines if line).encode()).hexdigest()


def source_digest() -> str:
    """SHA-256 over the code in the files under `ops/csrc`; comments do not count."""
    digest = hashlib.sha256()
    for path in sorted(p for p in SOURCE_DIR.rglob("*") if p.is_file() and p.suffix != ".md"):
        digest.update(f"{path.relative_to(SOURCE_DIR).as_posix()}\0{code_digest(path)}\0".encode())
    return digest.hexdigest()


def computing_part(record: dict[str, Any]) -> dict[str, Any]:
    """Of a build record, what decides the operator's results: its sources and flags.

    The same sources built by another compiler, or for another torch, pass the same check.
    """
    return {key: record[key] for key in ("source_sha256", "flags", "link_flags")}


def file_digest(path: Path) -> str:
    """SHA-256 of one file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
