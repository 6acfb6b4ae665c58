"""What a stage asks of the DVC that started it: was it forced, and are its outputs in the cache."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from ruamel.yaml import YAML

from pipelines.data.files import write_whole
from pipelines.paths import ROOT


def outputs_of(definition: dict[str, list[str | dict[str, object]]]) -> list[str]:
    """Paths of all outputs, metrics and plots of a stage's entry in `dvc.yaml`."""
    entries = [e for kind in ("outs", "metrics", "plots") for e in definition.get(kind, [])]
    return [e if isinstance(e, str) else next(iter(e)) for e in entries]


def is_forced(stage: str) -> bool:
    """Whether the user called `dvc repro --force` or `dvc exp run --force` for this stage.

    DVC does not tell its stages, so this reads the command line of the `dvc` that started it.
    With `--force` DVC runs all stages that the targets depend on; only the targets themselves, or
    all stages where no target is named, count as forced.
    """
    for process in psutil.Process().parents():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue  # it has ended, or belongs to another user: then it is not our DVC
        place = next((i for i, part in enumerate(command) if Path(part).name == "dvc"), None)
        if place is not None:
            return _forces(command[place + 1 :], stage)
    return False


def _forces(arguments: Sequence[str], stage: str) -> bool:
    if not {"repro", "run"} & set(arguments):
        return False  # a worker of DVC's queue
    from dvc.cli import parse_args

    parsed = parse_args(list(arguments))
    targets = [target.rpartition(":")[2] for target in getattr(parsed, "targets", None) or []]
    return bool(getattr(parsed, "force", False)) and (not targets or stage in targets)


def restore_outputs(stage: str, files: Mapping[str, str]) -> bool:
    """Bring back the outputs that `dvc.lock` records of a stage from DVC's cache.

    Args:
        files: path and content of some of the stage's outputs, those that DVC does not cache
            among them. The others are those of the wanted run if `dvc.lock` records these too.

    Returns:
        whether they are there now; False where `dvc.lock` holds another run's, or the cache lacks
        a file.
    """
    lock = ROOT / "dvc.lock"
    recorded = YAML(typ="safe").load(lock.read_text())["stages"] if lock.is_file() else {}
    sums = {out["path"]: out.get("md5") for out in recorded.get(stage, {}).get("outs", [])}
    wanted = {
        path: hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
        for path, text in files.items()
    }
    if not wanted.items() <= sums.items():
        return False
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    from dvc.exceptions import CheckoutError, DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(ROOT)) as repo:
            for out in repo.stage.load_one(name=stage).outs:
                if not out.use_cache:
                    (ROOT / out.def_path).parent.mkdir(parents=True, exist_ok=True)
                    write_whole(ROOT / out.def_path, files[out.def_path])
                elif out.checkout(force=True) is None:
                    return False
    except (CheckoutError, DvcException, FileNotFoundError):
        return False
    return True
