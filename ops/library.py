"""Finding, checking and loading the compiled operator, and choosing between it and the fallback."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ops import registration
from ops.sources import file_digest, source_digest

LIBRARY_NAME = "elsa_ops.so"
RECORD_NAME = "build.json"
BACKENDS = ("auto", "compiled", "reference")
HOW_TO_BUILD = "Build it with `dvc repro build_op` or `python -m ops.build`"


def _default_dir() -> Path:
    """`build/op` of a checkout; of an installed package a folder for its sources, this torch and
    Python in the user's cache."""
    root = Path(__file__).parent.parent
    if (root / "pyproject.toml").is_file():
        return root / "build" / "op"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    version = f"torch-{torch.__version__}-python-{sys.version_info.major}.{sys.version_info.minor}"
    return cache / "elsa" / "op" / f"{source_digest()[:12]}-{version}"


DEFAULT_DIR = _default_dir()
PREBUILT_DIR = Path(__file__).parent / "prebuilt"
"""Where a wheel made by `make wheel` has the operator; for CPUs only."""


class StaleLibraryError(RuntimeError):
    """A compiled library that does not fit this checkout, torch or machine."""


def environment(cuda: bool) -> dict[str, Any]:
    """What a library, with CUDA kernels or without, must have been built for to be loaded here.

    Without them it uses torch's stable ABI alone, and loads under every torch since 2.10.
    """
    here: dict[str, Any] = {
        "machine": f"{platform.system()} {platform.machine()}",
        "source_sha256": source_digest(),
    }
    if cuda:
        here["torch"] = torch.__version__
        here["torch_cxx11_abi"] = bool(torch.compiled_with_cxx11_abi())
    return here


def verify(directory: Path) -> dict[str, Any]:
    """Return the build record of `directory`.

    Raises:
        FileNotFoundError: the library or its record is not there.
        StaleLibraryError: it was built for something else, or changed since; the message lists
            every difference.
    """
    library, record_path = directory / LIBRARY_NAME, directory / RECORD_NAME
    for path in (library, record_path):
        if not path.is_file():
            raise FileNotFoundError(f"no compiled operator: {path} is missing. {HOW_TO_BUILD}.")
    try:
        record = json.loads(record_path.read_text())
    except ValueError as error:
        raise StaleLibraryError(f"{record_path} is not JSON ({error}). {HOW_TO_BUILD}.") from None
    if not isinstance(record, dict):
        raise StaleLibraryError(f"{record_path} holds no build record. {HOW_TO_BUILD}.")
    expected = {
        **environment(cuda=bool(record.get("cuda"))),
        "library_sha256": file_digest(library),
    }
    differences = [
        f"{key}: built {record.get(key)!r}, here {value!r}"
        for key, value in expected.items()
        if record.get(key) != value
    ]
    if differences:
        raise StaleLibraryError(
            f"the compiled operator in {directory} does not fit: {'; '.join(differences)}. "
            f"{HOW_TO_BUILD}."
        )
    return record


class _State:
    def __init__(self) -> None:
        self.backend = os.environ.get("ELSA_OPS_BACKEND", "auto")
        if self.backend not in BACKENDS:
            raise ValueError(f"ELSA_OPS_BACKEND={self.backend!r} is not one of {BACKENDS}")
        self.loaded: Path | None = None
        self.cuda = False  # whether the loaded library has kernels for GPUs
        self.searched = False
        self.warned: set[str] = set()
        self.lock = threading.RLock()


state = _State()


def load_library(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Load the compiled operator from `directory` (`elsa_ops.so` beside `build.json`).

    Returns its build record. Loading the same library again does nothing.

    Raises:
        FileNotFoundError: nothing is built there.
        StaleLibraryError: built for another machine, source or (with CUDA) torch, or altered since.
        RuntimeError: another library was already loaded into this process.
    """
    path = Path(directory).resolve()
    with state.lock:
        record = verify(path)
        if state.loaded is not None:
            if file_digest(state.loaded / LIBRARY_NAME) == record["library_sha256"]:
                return record
            raise RuntimeError(
                f"this process already uses the operator of {state.loaded}; "
                f"start a new process to load {path}"
            )
        torch.ops.load_library(str(path / LIBRARY_NAME))
        registration.register()
        state.loaded, state.cuda = path, bool(record["cuda"])
        return record


def loaded_library() -> Path | None:
    """The folder of the library this process has loaded, or None."""
    return state.loaded


def _find_and_load() -> bool:
    with state.lock:
        if state.loaded is None and not state.searched:
            named = os.environ.get("ELSA_OPS_LIBRARY")
            if named:
                load_library(named)
            else:
                for directory in (DEFAULT_DIR, PREBUILT_DIR):
                    if (directory / LIBRARY_NAME).is_file():
                        load_library(directory)
                        break
            # Only a search that raised nothing counts: a stale library must raise every time.
            state.searched = True
        return state.loaded is not None


def _warn_once(message: str) -> None:
    if message not in state.warned:
        state.warned.add(message)
        warnings.warn(message, stacklevel=4)


def use_compiled(device_type: str, backend: str) -> bool:
    """Whether a call on `device_type` goes to the compiled operator; loads it on first use."""
    if backend == "reference":
        return False
    available = _find_and_load()
    if available and (device_type in ("cpu", "meta") or (device_type == "cuda" and state.cuda)):
        return True
    if device_type == "meta" and backend == "auto":
        return False
    if available:
        reason = f"the compiled ELSA operator has no kernel for {device_type} tensors"
        if device_type == "cuda":
            reason += f": it was built without CUDA. {HOW_TO_BUILD} where torch sees the GPU"
    else:
        reason = f"the ELSA operator is not built. {HOW_TO_BUILD}"
    if backend == "compiled":
        raise RuntimeError(f"the backend 'compiled' was asked for, but {reason}")
    _warn_once(f"{reason}; using the slow plain PyTorch reference")
    return False


# Under torch.compile it runs once, at trace time; `backend` is a guarded global there, so a change
# of it compiles anew. This is all that `torch.compiler.assume_constant_result` does, but that
# imports dynamo for it, which takes as long as the rest of torch.
use_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


def get_backend() -> str:
    """The backend asked for: "auto", "compiled" or "reference"."""
    return state.backend


def set_backend(backend: str) -> None:
    """Choose the path of `elsa_attention`: "auto" (compiled where possible), or force one.

    The environment variable ELSA_OPS_BACKEND sets the initial choice.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    state.backend = backend


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """`set_backend` for the length of a `with` block."""
    previous = state.backend
    set_backend(backend)
    try:
        yield
    finally:
        state.backend = previous
