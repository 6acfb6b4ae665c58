"""What makes a run another run, what does not, and that only one process holds it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.errors import PipelineError
from pipelines.params import load_params
from pipelines.paths import ROOT
from pipelines.run.identity import HeldError, content_digest, hold, stage_identity

STAGES = """
stages:
  pretrain:
    params: [scaling, model, pretrain]
    deps: [code, data, "recipes/${recipe}.yaml"]
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "dvc.yaml").write_text(STAGES)
    (tmp_path / "code/__pycache__").mkdir(parents=True)
    (tmp_path / "code/train.py").write_text("x = 1\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/manifest.json").write_text('{"digest": "a"}')
    return tmp_path


def with_params(section: str, **values):
    params = load_params("demo")
    return params.model_copy(update={section: getattr(params, section).model_copy(update=values)})


def test_same_inputs_have_the_same_identity_wherever_they_are(root: Path, tmp_path_factory) -> None:
    copy = tmp_path_factory.mktemp("copy") / "root"
    shutil.copytree(root, copy)
    params = load_params("demo")
    assert stage_identity("pretrain", params, root) == stage_identity("pretrain", params, copy)


@pytest.mark.parametrize(
    ("section", "values"),
    [("pretrain", {"lr": 0.1}), ("model", {"kernel_size": 3}), ("scaling", {"num_workers": 1})],
)
def test_a_parameter_of_the_stage_changes_it(root: Path, section, values) -> None:
    before = stage_identity("pretrain", load_params("demo"), root)
    assert stage_identity("pretrain", with_params(section, **values), root) != before


def test_given_weights_count_by_what_they_are(root: Path) -> None:
    def identity(weights: str) -> str:
        return stage_identity("pretrain", with_params("pretrain", weights=weights), root)

    for name, content in (("a.pth", "one"), ("b.pth", "one"), ("c.pth", "other")):
        (root / name).write_text(content)
    assert identity("a.pth") == identity("b.pth") != identity("c.pth")
    with pytest.raises(PipelineError, match=r"weights d\.pth: there is no such file"):
        identity("d.pth")


@pytest.mark.parametrize(
    ("section", "values"),
    [("detect", {"lr": 0.1}), ("scaling", {"max_failures": 9}), ("storage", {"path": "elsewhere"})],
)
def test_other_stages_and_the_place_of_the_run_do_not(root: Path, section, values) -> None:
    before = stage_identity("pretrain", load_params("demo"), root)
    assert stage_identity("pretrain", with_params(section, **values), root) == before


def test_code_and_data_change_it_and_caches_do_not(root: Path) -> None:
    def identity() -> str:
        return stage_identity("pretrain", load_params("demo"), root)

    first = identity()
    (root / "code/__pycache__/train.pyc").write_bytes(b"cache")
    assert identity() == first
    (root / "code/train.py").write_text("x = 2\n")
    second = identity()
    assert second != first
    (root / "data/manifest.json").write_text('{"digest": "b"}')
    assert identity() not in (first, second)


def test_documentation_beside_the_code_does_not_change_it(root: Path) -> None:
    before = stage_identity("pretrain", load_params("demo"), root)
    (root / "code/README.md").write_text("reworded\n")
    assert stage_identity("pretrain", load_params("demo"), root) == before


def test_missing_input_is_named(root: Path) -> None:
    shutil.rmtree(root / "data")
    with pytest.raises(PipelineError, match=r"data: missing.*dvc repro"):
        stage_identity("pretrain", load_params("demo"), root)


def test_renaming_a_file_changes_a_folders_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    before = content_digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert content_digest(tmp_path) != before


HOLDER = """
import sys, time
from pathlib import Path
from pipelines.run.identity import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_second_process_is_told_who_holds_it_and_a_killed_holder_leaves_no_lock(tmp_path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(HeldError, match=f"by process {holder.pid} on "), hold(tmp_path):
                pass
        finally:
            holder.kill()
    with hold(tmp_path):
        pass
