"""Which change makes which stage compute anew: DVC, dvc.yaml and the identities are real.

What the stages compute is replaced by `stub.py`, in a copy of the checkout. A stage that DVC runs
without need ends with the outputs of the finished run, and computes nothing.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.conftest import Workspace, commit_all, copy_checkout

pytestmark = pytest.mark.slow
ALL = ["prepare", "build_op", "pretrain", "detect", "segment"]
TRAINING = ALL[2:]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, compiled_library: Path) -> Workspace:
    """A workspace where all five stages have finished."""
    root = tmp_path_factory.mktemp("decisions")
    copy_checkout(root)
    shutil.copy(Path(__file__).with_name("stub.py"), root / "pipelines/run/stub.py")
    tracking = root / "pipelines/run/tracking/__init__.py"
    shutil.copy(Path(__file__).with_name("stub_tracking.py"), tracking)
    stage = root / "pipelines/run/stage.py"
    text = stage.read_text()
    for real, stub in (
        ("submit(stage.check, params)", "submit(stub.check, stage, params)"),
        ("stage.run(run, checked)", "stub.compute(stage, run, checked)"),
    ):
        assert text.count(real) == 1
        text = text.replace(real, stub)
    stage.write_text(
        text.replace("from pipelines.run import dvc", "from pipelines.run import dvc, stub")
    )
    for module, function, value in (
        ("session", "ray_session", "Session(local=True)"),
        ("fork_server", "forking", ""),
    ):
        with (root / f"pipelines/run/{module}.py").open("a") as file:
            file.write(f"\n\n@contextmanager\ndef {function}(*_):\n    yield {value}\n")
    commit_all(root)
    workspace = Workspace(root)
    workspace.env["ELSA_TEST_LIBRARY"] = str(compiled_library)
    assert computed_by_repro(workspace) == ALL
    return workspace


def computed_by_repro(workspace: Workspace, *arguments: str, code: int = 0) -> list[str]:
    """The stages that computed in `dvc repro` of the training stages."""
    log = workspace.root / "computed.log"
    log.unlink(missing_ok=True)
    found, output = workspace.run("dvc", "repro", *(arguments or TRAINING))
    assert found == code, output
    return log.read_text().split() if log.is_file() else []


def edit(path: str, old: str, new: str) -> Callable[[Path], None]:
    """An edit of a file: the first `old` becomes `new`."""

    def apply(root: Path) -> None:
        text = (root / path).read_text()
        assert re.search(old, text, re.M), f"{path} has no {old}"
        (root / path).write_text(re.sub(old, new, text, count=1, flags=re.M))

    return apply


def append(*paths: str, text: str) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        for path in paths:
            assert (root / path).is_file(), path
            with (root / path).open("a") as file:
                file.write(text)

    return apply


def several(*edits: Callable[[Path], None]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        for one in edits:
            one(root)

    return apply


def params(**values: str) -> Callable[[Path], None]:
    """Edits of params.yaml by hand, by `section__key`."""
    edits = []
    for name, value in values.items():
        section, key = name.split("__")
        pattern = rf"(^{section}:\n(?:  .*\n)*?  {key}: ).*$"
        edits.append(edit("params.yaml", pattern, rf"\g<1>{value}"))
    return several(*edits)


SHARED_LOOP_FILES = (
    "pipelines/train/schedule.py",
    "pipelines/train/loading.py",
    "pipelines/train/classify.py",
    "pipelines/mm/hooks.py",
    "elsa/swin.py",
    "ops/functional.py",
    "ops/build.py",
    "pipelines/data/demo/draw.py",
)
NOTHING = several(
    # Comments, docstrings and documentation.
    append(*SHARED_LOOP_FILES, text="\n# A comment.\n"),
    append("ops/csrc/ops.cpp", "ops/csrc/cpu/kernels.h", text="\n// A comment.\n"),
    edit("pipelines/train/schedule.py", r'"""The learning rate of', '"""The rate of'),
    append("pipelines/recipes/base.yaml", text="\n# A comment.\n"),
    append("elsa/README.md", "ops/README.md", text="\nMore.\n"),
    # How images are loaded, where runs are, and how often a failure is tried again.
    params(
        loader__data_workers="1",
        loader__prefetch_factor="3",
        loader__pin_memory="false",
        loader__persistent_workers="false",
        scaling__max_failures="7",
        scaling__wait_s="5",
        storage__checkpoint_minutes="1",
    ),
    # Code that shows, checks and writes down, or that these stages do not use.
    append(
        "pipelines/run/display.py",
        "pipelines/run/preflight.py",
        "pipelines/run/fit.py",
        "pipelines/run/reporter.py",
        "pipelines/commands/doctor.py",
        "pipelines/run/tracking/__init__.py",
        "pipelines/report.py",
        "pipelines/results/page.py",
        "elsa/volo.py",
        "pipelines/benchmarks/training.py",
        text="\nCHANGED = True\n",
    ),
    # A parameter of the schema that no stage has.
    edit(
        "pipelines/schema/__init__.py",
        r"^class Report\(Section\):",
        "class Unused(Section):\n    x: int\n\n\nclass Report(Section):",
    ),
)
ROWS = {
    "what no result depends on": (NOTHING, []),
    "detect.lr": (params(detect__lr="0.0123"), ["detect"]),
    "the learning-rate formula": (
        edit("pipelines/train/schedule.py", r"return p\.lr \* ", "return 1.0 * p.lr * "),
        TRAINING,
    ),
    "ops/csrc": (
        append("ops/csrc/ops.cpp", text="\nstatic int changed_by_a_test = 1;\n"),
        ["build_op", *TRAINING],
    ),
}


@pytest.fixture(scope="module")
def first(built: Workspace) -> dict[str, str]:
    """The lineage of the finished runs: their identities and MLflow runs."""
    return lineage(built)


@pytest.mark.parametrize("row", ROWS)
def test_a_change_computes_what_depends_on_it_and_nothing_else(
    built: Workspace, first: dict[str, str], row: str
) -> None:
    """Each row begins with the files as they were, and so takes the last row's change back."""
    change, expected = ROWS[row]
    before = {path: path.read_bytes() for path in changed_files(built.root)}
    change(built.root)
    try:
        assert computed_by_repro(built) == expected
        found = lineage(built)
        assert {stage for stage in ALL if found[stage] != first[stage]} == set(expected)
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def test_what_is_taken_back_is_not_computed_again(built: Workspace, first: dict[str, str]) -> None:
    assert computed_by_repro(built) == []
    assert lineage(built) == first
    _, output = built.run("dvc", "repro", *TRAINING)
    assert "Data and pipelines are up to date" in output


def changed_files(root: Path) -> list[Path]:
    return [
        path
        for folder in ("ops", "elsa", "pipelines")
        for path in (root / folder).rglob("*")
        if path.is_file() and path.suffix in (".py", ".cpp", ".h", ".yaml", ".md")
    ] + [root / "params.yaml"]


def lineage(workspace: Workspace) -> dict[str, str]:
    return {stage: (workspace.root / f"lineage/{stage}.json").read_text() for stage in ALL}


def test_force_computes_the_target_and_what_depends_on_other_weights(built: Workspace) -> None:
    first = lineage(built)
    assert computed_by_repro(built, "--force", "pretrain") == ["pretrain"]
    anew = lineage(built)
    assert {stage for stage in ALL if anew[stage] != first[stage]} == {"pretrain"}
    # The weights are the same, only their run is another: nothing depends on that.
    assert computed_by_repro(built) == []
    assert lineage(built) == anew


def test_a_new_run_says_what_differs_from_an_unfinished_one(built: Workspace) -> None:
    """And an unfinished run is resumed where only a comment was changed since."""
    original = (built.root / "params.yaml").read_text()
    loop = built.root / "pipelines/train/classify.py"
    code = loop.read_text()
    try:
        params(pretrain__lr="0.0042")(built.root)
        built.env["ELSA_TEST_INTERRUPT"] = "1"
        assert computed_by_repro(built, "pretrain", code=255) == ["pretrain"]
        [unfinished] = [
            path.parent.name
            for path in built.root.glob(".runs/pretrain-*/state.json")
            if not json.loads(path.read_text())["files"]
        ]
        loop.write_text(code + "\n# A comment.\n")
        _, output = built.run("dvc", "repro", "pretrain")
        assert "new run" not in output
        params(pretrain__lr="0.0043", pretrain__seed="7")(built.root)
        _, output = built.run("dvc", "repro", "pretrain")
        assert (
            f"pretrain: this is a new run: the unfinished run {unfinished} has other inputs:"
            " pretrain.seed (0 there, 7 here), pretrain.lr (0.0042 there, 0.0043 here)\n"
        ) in output
    finally:
        built.env.pop("ELSA_TEST_INTERRUPT", None)
        (built.root / "params.yaml").write_text(original)
        loop.write_text(code)


def test_a_wrong_parameter_of_a_later_stage_is_told_by_the_first(built: Workspace) -> None:
    original = (built.root / "params.yaml").read_text()
    try:
        params(detect__lr="abc", prepare__seed="1")(built.root)
        code, output = built.run("dvc", "repro", *TRAINING)
        assert code != 0
        assert "error: prepare: " in output
        assert "detect.lr" in output
        assert "error: detect" not in output
    finally:
        (built.root / "params.yaml").write_text(original)


def test_outputs_of_finished_runs_come_back_without_computing(built: Workspace) -> None:
    assert computed_by_repro(built) == []  # those that DVC removed before a failing stage too
    before = {
        path: path.read_bytes()
        for folder in ("weights", "results", "plots", "metrics", "lineage")
        for path in (built.root / folder).rglob("*")
        if path.is_file() and path.name not in ("sweep.json", "report.json")
    }
    assert before
    for stage in TRAINING:
        for folder in ("weights", "results", "plots"):
            shutil.rmtree(built.root / folder / stage)
    # Nor does DVC's cache have them: they are written again from the last checkpoints.
    for folder in ("cache", "tmp/run-cache"):
        shutil.rmtree(built.root / ".dvc" / folder, ignore_errors=True)
    assert computed_by_repro(built, "--single-item", *TRAINING) == []
    assert {path: path.read_bytes() for path in before} == before


def test_given_weights_and_configs_count_by_their_content(built: Workspace, tmp_path: Path) -> None:
    computed_by_repro(built)  # the tests before leave outputs behind that were made again
    original = (built.root / "params.yaml").read_text()
    weights, base, config = (tmp_path / name for name in ("a.pth", "base.py", "own.py"))
    weights.write_text("one")
    base.write_text("x = 1\n")
    config.write_text('_base_ = "./base.py"\n')
    try:
        params(detect__weights=str(weights))(built.root)
        assert computed_by_repro(built, "detect") == ["detect"]
        weights.write_text("two")  # under the same name
        assert computed_by_repro(built, "detect") == ["detect"]
        weights = weights.rename(tmp_path / "b.pth")
        params(detect__weights=str(weights))(built.root)
        assert computed_by_repro(built, "detect") == []
        params(detect__method="config", detect__config=str(config))(built.root)
        assert computed_by_repro(built, "detect") == ["detect"]
        config.write_text('# Why.\n_base_ = "./base.py"\n')
        assert computed_by_repro(built, "detect") == []
        config.write_text('_base_ = "./base.py"\nx = 2\n')
        assert computed_by_repro(built, "detect") == ["detect"]
    finally:
        (built.root / "params.yaml").write_text(original)
