"""What makes a run another run, what does not, and that only one process holds it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.errors import PipelineError
from pipelines.params import Params, compose, override
from pipelines.paths import ROOT
from pipelines.run.code import closure
from pipelines.run.identity import (
    HeldError,
    RunState,
    content_digest,
    hold,
    stage_definition,
    stage_identity,
    stage_inputs,
    unfinished_runs,
)

OUTPUT_FOLDERS = ("build", "data", "weights", "results", "plots", "metrics", "lineage")
STAGES = """
stages:
  pretrain:
    meta: {code: [pipelines.train], code_of_models: {elsa_volo: elsa.volo}}
    params: [tasks, scaling.use_gpu, model, pretrain]
    deps: [pipelines/train.py, pipelines/configs, data/manifest.json]
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "dvc.yaml").write_text(STAGES)
    for name, text in {
        "pipelines/train.py": "x = 1\n",
        "pipelines/configs/a.yaml": "a: 1\n",
        "elsa/volo.py": "y = 1\n",
        "data/manifest.json": '{"digest": "a"}',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def identity(root: Path, *changes: str) -> str:
    return stage_identity("pretrain", params(*changes), root)


def params(*changes: str) -> Params:
    values = dict(change.split("=") for change in changes)
    return override(compose(), {k: json.loads(v) for k, v in values.items()}, "test")


def test_same_inputs_have_the_same_identity_wherever_they_are(root: Path, tmp_path_factory) -> None:
    copy = tmp_path_factory.mktemp("copy") / "root"
    shutil.copytree(root, copy)
    assert identity(root) == identity(copy)


@pytest.mark.parametrize(
    "change", ["pretrain.lr=0.1", "model.kernel_size=3", "scaling.use_gpu=true"]
)
def test_a_parameter_of_the_stage_changes_it(root: Path, change: str) -> None:
    assert identity(root, change) != identity(root)


@pytest.mark.parametrize(
    "change",
    [
        *("detect.lr=0.1", "scaling.max_failures=9", 'storage.path="elsewhere"'),
        *("loader.data_workers=3", "loader.pin_memory=false", "storage.checkpoint_minutes=1"),
        *('tasks=["classify"]', "pretrain.lr=0.002"),  # the same number, written otherwise
    ],
)
def test_what_does_not_change_the_result_does_not(root: Path, change: str) -> None:
    assert identity(root, change) == identity(root)


def test_given_weights_count_by_what_they_are(root: Path) -> None:
    def with_weights(name: str) -> str:
        return identity(root, f'pretrain.weights="{name}"')

    for name, content in (("a.pth", "one"), ("b.pth", "one"), ("c.pth", "other")):
        (root / name).write_text(content)
    assert with_weights("a.pth") == with_weights("b.pth") != with_weights("c.pth")
    with pytest.raises(PipelineError, match=r"weights d\.pth: there is no such file"):
        with_weights("d.pth")


def test_a_config_counts_with_the_files_that_it_is_based_on(tmp_path: Path) -> None:
    """DVC sees the first file alone; a stage that runs sees all."""
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases/b.py").write_text("x = 1\n")
    (tmp_path / "bases/a.py").write_text('_base_ = "b.py"\n')
    own = tmp_path / "own.py"
    own.write_text('_base_ = ["mmdet::_base_/default_runtime.py", "./bases/a.py"]\n')

    def digest() -> str:
        given = {"detect.method": "config", "detect.config": str(own)}
        changed = override(compose(["recipe=smoke"]), given, "test")
        entry = {"meta": {"code": []}, "deps": ["${detect.config}"]}
        (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": {"detect": entry}}))
        return stage_identity("detect", changed, tmp_path)

    before = digest()
    own.write_text(own.read_text() + "# Why.\n")
    assert digest() == before
    (tmp_path / "bases/b.py").write_text("x = 2\n")
    assert digest() != before
    (tmp_path / "bases/b.py").unlink()
    with pytest.raises(PipelineError, match=r"config .*b\.py can't be read"):
        digest()


def test_code_configs_and_data_change_it_and_what_does_nothing_does_not(root: Path) -> None:
    seen = {identity(root)}
    (root / "pipelines/train.py").write_text("# why\nx = 1\n")
    (root / "pipelines/configs/a.yaml").write_text("# why\na:   1\n")
    (root / "pipelines/configs/README.md").write_text("reworded\n")
    (root / "pipelines/configs/__pycache__").mkdir()
    (root / "pipelines/configs/__pycache__/a.pyc").write_bytes(b"cache")
    assert identity(root) in seen
    for name, text in (
        ("pipelines/train.py", "x = 2\n"),
        ("pipelines/configs/a.yaml", "a: 2\n"),
        ("data/manifest.json", '{"digest": "b"}'),
    ):
        (root / name).write_text(text)
        assert identity(root) not in seen
        seen.add(identity(root))


def test_code_of_a_model_counts_for_that_model(root: Path) -> None:
    swin, volo = identity(root), identity(root, 'model.name="elsa_volo_d1"')
    (root / "elsa/volo.py").write_text("y = 2\n")
    assert identity(root) == swin
    assert identity(root, 'model.name="elsa_volo_d1"') != volo


def test_missing_input_is_named(root: Path) -> None:
    shutil.rmtree(root / "data")
    with pytest.raises(PipelineError, match=r"data/manifest\.json is missing.*dvc repro"):
        identity(root)


def test_outputs_count_by_what_they_are_not_by_who_made_them(tmp_path: Path) -> None:
    """Weights by model and tensors, an operator by sources and flags."""
    weights, op = tmp_path / "weights", tmp_path / "op"
    weights.mkdir()
    op.mkdir()
    record = {"source_sha256": "a", "flags": [], "link_flags": [], "library_sha256": "x"}
    digests = []
    for run, tensors, source, library in (
        ("run 1", "one", "a", "x"),
        ("run 2", "one", "a", "y"),
        ("run 2", "two", "b", "y"),
    ):
        described = {"model": {"name": "m"}, "mlflow_run_id": run}
        (weights / "model.json").write_text(json.dumps(described))
        (weights / "model.safetensors").write_text(tensors)
        (op / "build.json").write_text(
            json.dumps(record | {"source_sha256": source, "library_sha256": library})
        )
        digests.append((content_digest(weights), content_digest(op)))
    assert digests[0] == digests[1]
    assert digests[1][0] != digests[2][0]
    assert digests[1][1] != digests[2][1]


def test_an_unfinished_run_is_told_apart_by_its_inputs(root: Path, tmp_path: Path) -> None:
    from dataclasses import asdict

    before = stage_inputs("pretrain", params("pretrain.seed=1"), root)
    folder = tmp_path / f"pretrain-{before.identity}"
    state = RunState(mlflow_run_id="a", inputs=asdict(before))
    state.save(folder)
    (root / "pipelines/train.py").write_text("x = 2\n")
    [(name, differing)] = unfinished_runs(stage_inputs("pretrain", params(), root), tmp_path)
    assert name == folder.name
    assert differing == ["pretrain.seed (1 there, 0 here)", "pipelines/train.py"]
    state.files = {"metrics/pretrain.json": "{}"}
    state.save(folder)
    assert unfinished_runs(stage_inputs("pretrain", params(), root), tmp_path) == []


@pytest.mark.parametrize(
    "stage", ["prepare", "build_op", "pretrain", "detect", "segment", "sweep", "export", "report"]
)
def test_the_deps_of_dvc_are_the_code_that_the_stage_loads(stage: str) -> None:
    """So DVC sees each change of code that changes a result, and no other."""
    definition = stage_definition(stage)
    meta = definition["meta"]
    modules = [*meta["code"], *meta.get("outputs", []), *meta.get("code_of_models", {}).values()]
    listed = {dep for dep in definition["deps"] if dep.endswith(".py")}
    assert listed == closure(modules, ROOT)
    for dep in definition["deps"]:
        made = dep.partition("/")[0] in OUTPUT_FOLDERS
        given = re.fullmatch(r"\$\{(detect|segment)\.(weights|config)\}", dep)
        assert made or given or (ROOT / dep.replace("${sweep.space}", "demo")).exists(), dep


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
            told = f"is already running: process {holder.pid} on "
            with pytest.raises(HeldError, match=told), hold(tmp_path):
                pass
        finally:
            holder.kill()
    with hold(tmp_path):
        pass
