"""Which checkpoint a run resumes from when its storage is not as Ray left it."""

import json
import shutil
from pathlib import Path

import pytest

from pipelines.run import checkpoints
from pipelines.run.ray_internals import CHECKPOINT_LIST

NAMES = [f"checkpoint_2026-01-0{day}" for day in (1, 2, 3)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with three whole checkpoints, of which Ray's list has the last two."""
    for name in NAMES:
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "state.pt").write_text(f"state of {name}")
        (tmp_path / name / "inner/image.png").write_text("pixels")
        checkpoints.seal(tmp_path / name)
    results = [{"checkpoint_dir_name": name} for name in NAMES[1:]]
    listed = {"checkpoint_results": results, "latest_checkpoint_result": results[-1]}
    (tmp_path / CHECKPOINT_LIST).write_text(json.dumps(listed))
    return tmp_path


def newest(run: Path) -> str | None:
    found = checkpoints.newest_complete(str(run))
    return Path(found.path).name if found else None


def present(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoint_2*"))


def cut(folder: Path) -> None:
    (folder / "state.pt").write_text("sta")


def lose(folder: Path) -> None:
    (folder / "inner/image.png").unlink()


def unseal(folder: Path) -> None:
    (folder / checkpoints.SEAL).unlink()


def half_seal(folder: Path) -> None:
    (folder / checkpoints.SEAL).write_text('{"state.pt": "ab')


def delete(folder: Path) -> None:
    shutil.rmtree(folder)


def test_a_whole_run_keeps_what_ray_lists(run: Path) -> None:
    said: list[str] = []
    checkpoints.repair(str(run), said.append)
    assert newest(run) == NAMES[2]
    assert present(run) == NAMES[1:]  # the first would never be deleted
    assert (run / CHECKPOINT_LIST).is_file()
    assert not said


@pytest.mark.parametrize("damage", [cut, lose, unseal, half_seal, delete])
def test_the_newest_whole_one_is_used(run: Path, damage) -> None:
    damage(run / NAMES[2])
    assert newest(run) == NAMES[1]
    said: list[str] = []
    checkpoints.repair(str(run), said.append)
    assert present(run) == [NAMES[1]]
    assert not (run / CHECKPOINT_LIST).exists()  # with it Ray would not start
    assert said[0].startswith(NAMES[2])
    assert newest(run) == NAMES[1]


def test_one_that_the_list_lacks_is_used_if_it_is_the_newest(run: Path) -> None:
    """A worker that dies right after its report leaves one."""
    shutil.copytree(run / NAMES[2], run / "checkpoint_2026-01-09")
    checkpoints.repair(str(run), print)
    assert newest(run) == "checkpoint_2026-01-09"
    assert present(run) == [*NAMES[1:], "checkpoint_2026-01-09"]


def test_a_list_that_is_cut_short_begins_anew(run: Path) -> None:
    text = (run / CHECKPOINT_LIST).read_text()
    (run / CHECKPOINT_LIST).write_text(text[: len(text) // 2])
    checkpoints.repair(str(run), print)
    assert newest(run) == NAMES[2]
    assert not (run / CHECKPOINT_LIST).exists()


def test_none_left_or_none_yet(run: Path, tmp_path: Path) -> None:
    for name in NAMES:
        cut(run / name)
    checkpoints.repair(str(run), print)
    assert newest(run) is None
    assert present(run) == []
    checkpoints.repair(str(tmp_path / "new"), print)
    assert newest(tmp_path / "new") is None
