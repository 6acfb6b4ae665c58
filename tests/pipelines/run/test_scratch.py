"""What a process keeps beside its run ends with it, however it ends."""

import subprocess
import sys
from pathlib import Path

from pipelines.paths import ROOT
from pipelines.run.scratch import remove_abandoned, scratch_folder

KILLED = """
import sys
from pipelines.run.scratch import scratch_folder
with scratch_folder(sys.argv[1]) as folder:
    (folder / "part").mkdir()
    (folder / "part/state.pt").write_text("large")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_of_this_user_alone_and_ends_with_the_block(tmp_path: Path) -> None:
    with scratch_folder(str(tmp_path)) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "file").write_text("x")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_and_what_a_running_one_has_is_not(
    tmp_path: Path,
) -> None:
    foreign = tmp_path / "elsa-foreign"
    foreign.mkdir()
    (foreign / "kept").write_text("no lock: not ours")
    (tmp_path / "elsa-file").write_text("not a folder")
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout
        folder = Path(process.stdout.readline().strip())
        remove_abandoned(str(tmp_path))
        assert (folder / "part/state.pt").exists()
        process.kill()
    with scratch_folder(str(tmp_path)) as mine:
        assert not folder.exists()
        assert set(tmp_path.iterdir()) == {mine, foreign, tmp_path / "elsa-file"}
    assert (foreign / "kept").exists()
