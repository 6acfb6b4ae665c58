"""Run identity: equal inputs have the same id, and one process at a time holds it.

The inputs of a stage are what `dvc.yaml` says of it: the parameters and `deps` that DVC tracks,
and the code that computes the result (`meta.code`: modules, of which all that they load counts).
The id names the Ray Train run and is a tag of the MLflow run. So starting a stage again resumes its
unfinished run, and a changed input starts a new one.
"""

import fcntl
import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from ops.sources import code_digest as cpp_digest
from ops.sources import computing_part
from pipelines.data.files import sha256_file, write_whole
from pipelines.data.weights import PRETRAINED, weights_file
from pipelines.errors import PipelineError
from pipelines.params import Params, flatten
from pipelines.paths import ROOT
from pipelines.run.code import closure, code_digest, config_files

CPP = (".cpp", ".cu", ".h")
PARAMETER = re.compile(r"\$\{([a-z_.]+)\}")
"""A parameter's value in a path of `dvc.yaml`."""
NOT_IDENTIFYING = ("tasks", "budget")
"""What DVC must see to run a stage again, and the stage itself looks at: which of them are there,
and how far a sweep gets."""


class HeldError(PipelineError):
    """Another process runs the same stage with the same inputs."""


@dataclass(frozen=True)
class Inputs:
    """What makes a stage's result, by names that a person reads."""

    stage: str
    params: Mapping[str, Any]
    """Values by dotted name."""
    code: Mapping[str, str]
    """Digests by file."""
    data: Mapping[str, str]
    """Digests by path."""

    @property
    def identity(self) -> str:
        """Twelve hex digits. The names of files of code do not count, their content does."""
        counted = [self.stage, self.params, sorted(self.code.values()), self.data]
        return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:12]

    def differences(self, other: "Inputs") -> list[str]:
        """What differs from another run's inputs, each as a few words."""
        values = [
            f"{name} ({json.dumps(other.params.get(name))} there, {json.dumps(value)} here)"
            for name, value in self.params.items()
            if other.params.get(name) != value
        ]
        gone = [name for name in other.params if name not in self.params]
        files = [
            name
            for ours, theirs in ((self.code, other.code), (self.data, other.data))
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        ]
        return [*values, *gone, *files]


def stage_definition(stage: str, root: Path = ROOT) -> dict[str, Any]:
    """The stage's entry in `dvc.yaml`."""
    entry: dict[str, Any] = YAML(typ="safe").load((root / "dvc.yaml").read_text())["stages"][stage]
    return entry


def tracked_params(stage: str, params: Params, root: Path = ROOT) -> dict[str, Any]:
    """The parameters that DVC tracks for a stage, by dotted name."""
    names = stage_definition(stage, root).get("params", [])
    return {
        key: value
        for key, value in flatten(params.model_dump(mode="json")).items()
        if any(key == name or key.startswith(f"{name}.") for name in names)
    }


def stage_inputs(stage: str, params: Params, root: Path = ROOT) -> Inputs:
    """The inputs of a stage with these parameters, as this checkout has them.

    Raises:
        PipelineError: a dependency does not exist.
    """
    definition = stage_definition(stage, root)
    meta = definition["meta"]
    sources: dict[str, str] = {}
    data: dict[str, str] = {}
    deps, named = definition.get("deps", []), flatten(params.model_dump(mode="json"))
    for given in deps:
        dep = PARAMETER.sub(lambda found: named[found[1]], given)
        if given.endswith(".weights}"):  # what they are counts, not where
            data[f"{stage}.weights"] = _weights_digest(dep, root)
        elif given.endswith(".config}"):
            if dep not in deps:
                data[f"{stage}.config"] = _config_digest(root / dep)
        elif not dep.startswith(("ops/", "elsa/", "pipelines/")):
            data[dep.removesuffix("/manifest.json")] = content_digest(root / dep)
        elif not dep.endswith(".py"):  # the files that a module loads come with it
            sources |= source_digests(root / dep, root)
    return Inputs(
        stage,
        _values(definition.get("params", []), deps, params, root),
        _digests(_modules(meta, params), root) | sources,
        data,
    )


def stage_identity(stage: str, params: Params, root: Path = ROOT) -> str:
    """The id of the stage's inputs."""
    return stage_inputs(stage, params, root).identity


def outputs_digest(stage: str, root: Path = ROOT) -> str:
    """Of the code that writes a stage's outputs from what a run computed (`meta.outputs`)."""
    modules = stage_definition(stage, root)["meta"].get("outputs", [])
    return hashlib.sha256(json.dumps(sorted(_digests(modules, root).values())).encode()).hexdigest()


def _modules(meta: Mapping[str, Any], params: Params) -> list[str]:
    models = meta.get("code_of_models", {})
    chosen = [models[prefix] for prefix in models if params.model.name.startswith(prefix)]
    return [*meta["code"], *chosen]


def _digests(modules: list[str], root: Path) -> dict[str, str]:
    digests = {name: code_digest(root / name) for name in sorted(closure(modules, root))}
    return {name: digest for name, digest in digests.items() if digest}


def _values(names: list[str], deps: list[str], params: Params, root: Path) -> dict[str, Any]:
    flat = flatten(params.model_dump(mode="json"))
    values = {
        key: value
        for name in names
        for key, value in flat.items()
        if (key == name or key.startswith(f"{name}.")) and name not in NOT_IDENTIFYING
    }
    return {
        key: _weights_digest(value, root) if key == "pretrain.weights" and value else value
        for key, value in values.items()
        if f"${{{key}}}" not in deps
    }


def _weights_digest(given: str, root: Path) -> str:
    if given == PRETRAINED:
        return content_digest(root / given)
    return sha256_file(weights_file(given, root))


def _config_digest(path: Path) -> str:
    """Of a config and what it is based on, or of a folder of them."""
    _require(path)
    if path.is_dir():
        return content_digest(path)
    parts = [code_digest(file) for file in config_files(path)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def source_digests(path: Path, root: Path) -> dict[str, str]:
    """Digests of the files of code or configuration at `path`, comments left out; by file."""
    _require(path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digests = {}
    for file in files:
        if not file.is_file() or file.suffix == ".md" or "__pycache__" in file.parts:
            continue
        if file.suffix == ".py":
            digest = code_digest(file)
        elif file.suffix in CPP:
            digest = cpp_digest(file)
        elif file.suffix == ".yaml":
            value = YAML(typ="safe").load(file.read_text())
            digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        else:
            digest = sha256_file(file)
        digests[file.relative_to(root).as_posix()] = digest
    return digests


def content_digest(path: Path) -> str:
    """SHA-256 of a file, or of what counts in a folder of outputs.

    Of weights that is the tensors and the model, not which run made them; of a compiled operator
    its sources and flags, not the machine.

    Raises:
        PipelineError: `path` does not exist.
    """
    _require(path)
    if path.is_file():
        return sha256_file(path)
    if (path / "model.json").is_file():
        model = json.loads((path / "model.json").read_text())["model"]
        parts: Any = [model, sha256_file(path / "model.safetensors")]
    elif (path / "build.json").is_file():
        parts = computing_part(json.loads((path / "build.json").read_text()))
    else:
        parts = [
            [item.relative_to(path).as_posix(), sha256_file(item)]
            for item in sorted(path.rglob("*"))
            if item.is_file()
        ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _require(path: Path) -> None:
    if not path.exists():
        source = path.suffix in (".py", ".yaml", *CPP)
        raise PipelineError(
            f"{path.parent.name}/{path.name} is missing, and it is an input of this stage",
            "Restore it, or fix its name" if source else "Run `dvc repro`, which makes it",
        )


@dataclass
class RunState:
    """What is remembered of an identity between processes, in `state.json`."""

    attempt: int = 1
    """Raised by `--force`: the same inputs computed anew."""
    mlflow_run_id: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    """Metrics and lineage of the finished run, whole, by path. Empty: it has not finished."""
    seconds: float = 0.0
    """Of its training, over all starts."""
    outputs: str = ""
    """`outputs_digest` of the code that wrote the outputs."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """`Inputs` of the run, to tell what differs from another."""

    @classmethod
    def load(cls, folder: Path) -> "RunState":
        """What `folder` holds; of a new identity, a new state."""
        path = folder / "state.json"
        if not path.exists():
            return cls()
        known = {one.name for one in fields(cls)}  # another version's may have others
        return cls(**{k: v for k, v in json.loads(path.read_text()).items() if k in known})

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "state.json", json.dumps(asdict(self), indent=2))


def unfinished_runs(inputs: Inputs, runs: Path) -> list[tuple[str, list[str]]]:
    """Names of the unfinished runs of the same stage, the last one first, and what differs.

    Args:
        runs: folder of all runs' states.
    """
    found = []
    folders = runs.glob(f"{inputs.stage}-{'[0-9a-f]' * 12}")
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True):
        if not (folder / "state.json").is_file():
            continue
        state = RunState.load(folder)
        if state.mlflow_run_id and not state.files and state.inputs:
            found.append((folder.name, inputs.differences(Inputs(**state.inputs))))
    return found


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold `folder`'s identity while the block runs; the lock ends with the process.

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
                f"{folder.name} is already running: {lock.read().strip() or 'another process'}",
                "Wait for it, or end that process and start again to resume",
            ) from None
        lock.seek(0)
        lock.truncate()
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        lock.flush()
        yield
