"""Run identity: the same inputs have the same id, and one process at a time holds it.

The inputs of a stage are the parameters and `deps` that `dvc.yaml` lists for it: DVC
decides by them whether to run, and the id derived here names the Ray Train run and is a
tag of the MLflow run. So starting a stage again resumes its unfinished run, and a changed
input starts a new one.
"""

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipelines.errors import PipelineError
from pipelines.params import Params
from pipelines.paths import ROOT

# What decides only where things are and how often a run is tried again, not its result.
NOT_IDENTIFYING = {
    "storage": None,
    "data": None,
    "scaling": {"max_failures", "min_workers", "cpus_per_worker", "gpus_per_worker", "wait_s"},
}


class HeldError(PipelineError):
    """Another process runs the same stage with the same inputs."""


def stage_definition(stage: str, root: Path = ROOT) -> dict[str, Any]:
    """The stage's entry in `dvc.yaml`."""
    return YAML(typ="safe").load((root / "dvc.yaml").read_text())["stages"][stage]


def stage_identity(stage: str, params: Params, root: Path = ROOT) -> str:
    """Twelve hex digits from the stage's parameters and the content of its `deps`.

    Raises:
        PipelineError: a dependency does not exist.
    """
    definition = stage_definition(stage, root)
    sections = [name for name in definition.get("params", []) if isinstance(name, str)]
    resolved = params.model_dump(mode="json")
    inputs: dict[str, Any] = {"stage": stage, "params": {}, "deps": {}}
    for section in sections:
        if section == "recipe":
            continue  # a name; its values count
        dropped = NOT_IDENTIFYING.get(section, set())
        if dropped is not None:
            values = {k: v for k, v in resolved[section].items() if k not in dropped}
            if values.get("weights"):  # what they are counts, not where
                values["weights"] = content_digest(weights_file(values["weights"], root))
            inputs["params"][section] = values
    for dep in definition.get("deps", []):
        if "${" in dep:
            continue  # the recipe's file: its values are in the parameters
        inputs["deps"][dep] = content_digest(root / dep)
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]


def weights_file(given: str, root: Path = ROOT) -> Path:
    """The file with weights: `given`, or `model.safetensors` in that folder; relative to `root`.

    Raises:
        PipelineError: there is none.
    """
    path = root / Path(given).expanduser()
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise PipelineError(
            f"weights {given}: there is no such file, nor a folder with model.safetensors. Give a"
            " checkpoint, or a folder such as weights/pretrain, made by `dvc repro` or `dvc pull`"
        )
    return path


def content_digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, its manifest's digest if it has one, else all its files.

    Documentation (`.md`) in a folder does not count: rewording it must not train anew.

    Raises:
        PipelineError: `path` does not exist.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise PipelineError(
            f"{path.name}: missing; it is an input of this stage. Run `dvc repro`, which makes it"
        )
    if (path / "manifest.json").is_file():
        return content_digest(path / "manifest.json")
    digest = hashlib.sha256()
    for item in sorted(path.rglob("*")):
        if item.is_file() and item.suffix != ".md" and "__pycache__" not in item.parts:
            digest.update(f"{item.relative_to(path)}\0{content_digest(item)}\n".encode())
    return digest.hexdigest()


@dataclass
class RunState:
    """What is remembered of an identity between processes, in `state.json`."""

    attempt: int = 1
    """Raised by `--force`: the same inputs trained anew."""
    mlflow_run_id: str | None = None
    metrics_md5: str | None = None
    """MD5 of the metrics file of the finished run, as `dvc.lock` records it."""

    @classmethod
    def load(cls, folder: Path) -> "RunState":
        path = folder / "state.json"
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "state.json", json.dumps(asdict(self), indent=2))


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    aside.replace(path)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold `folder`'s identity while the block runs; the lock goes with the process.

    Raises:
        HeldError: another process holds it; says which, where and since when.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise HeldError(
                f"{folder.name} is being run already by {lock.read().strip() or 'another process'};"
                " wait for it, or end that process and start again to resume"
            ) from None
        lock.seek(0)
        lock.truncate()
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        lock.flush()
        yield
