"""What a user can write in params.yaml and on the command line, and what is rejected."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipelines.commands.compose import show_params
from pipelines.params import (
    Params,
    ParamsError,
    changed,
    compose,
    load_params,
    override,
    recipe_names,
)
from pipelines.paths import RECIPES, ROOT, shared_root
from pipelines.train.schedule import micro_batch, scaled_lr


@pytest.fixture
def write(tmp_path: Path):
    """A params.yaml of the demo with sections changed."""

    def _write(text: str) -> Path:
        path = tmp_path / "params.yaml"
        path.write_text(text)
        return path

    return _write


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_composes_and_names_itself(recipe: str) -> None:
    assert compose([f"recipe={recipe}"]).recipe == recipe


def test_params_yaml_is_the_demos_composition() -> None:
    committed = subprocess.run(
        ["git", "show", "HEAD:params.yaml"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    text = committed.stdout or (ROOT / "params.yaml").read_text()  # in a copy without git
    values = YAML(typ="safe").load(text)
    assert Params.model_validate_json(json.dumps(values)) == compose()
    # Every value is there: nothing is left to a default that DVC does not see.
    assert values == compose().model_dump(mode="json")


def test_recipes_say_what_differs_and_no_more() -> None:
    files = [path for path in RECIPES.rglob("*.yaml") if path.parent.name != "sweeps"]
    assert sum(len(path.read_text().splitlines()) for path in files) <= 485


@pytest.mark.parametrize(
    "words",
    [
        ("recipe=elsa_swin_small", "detect=cascade-mask-rcnn_3x", "detect.epochs=7"),
        ("detect.epochs=7", "detect=cascade-mask-rcnn_3x", "recipe=elsa_swin_small"),
        ("detect=cascade-mask-rcnn_3x", "recipe=elsa_swin_small", "detect.epochs=7"),
    ],
)
def test_a_group_beats_the_recipe_and_a_key_beats_both_in_any_order(words) -> None:
    detect = compose(words).detect
    assert (detect.method, detect.schedule) == ("cascade-mask-rcnn", "3x")
    assert detect.milestones == (27, 33)
    assert detect.drop_path_rate == 0.75  # of small at 3x
    assert detect.epochs == 7


def test_learning_rate_scales_with_the_global_batch_from_the_batch_it_is_for() -> None:
    for shares in (2, 4):  # how a step is cut does not matter
        p = compose(
            [
                *("pretrain.lr=1e-3", "pretrain.batch_size=256"),
                *(f"pretrain.shares={shares}", "pretrain.base_batch_size=1024"),
            ]
        ).pretrain
        assert scaled_lr(p) == 1e-3 / 4
        assert micro_batch(p) == 256 // shares


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["recipe=nix"], "Could not find 'recipe/nix' Available options in 'recipe': demo"),
        (["detect=nix"], "Available options in 'detect': cascade-mask-rcnn_1x"),
        (["pretrain.epoch=1"], "pretrain.epoch=1: Could not override 'pretrain.epoch'"),
        (["+foo=1"], "foo: unknown key; known here: recipe, tasks"),
        (["+pretrain.epoch=1"], "pretrain.epoch: unknown key; known here: seed"),
        (["~pretrain"], "pretrain: missing; compose the file again"),
        (["~pretrain.lr"], "pretrain.lr: missing; compose the file again"),
        (["detect.lr=abc"], "detect.lr: Input should be a valid number (given: 'abc')"),
        (["pretrain.epochs=two"], "pretrain.epochs: Input should be a valid integer"),
        (["pretrain.epochs='2'"], "pretrain.epochs"),
        (["pretrain.lr=-1.0"], "pretrain.lr: Input should be greater than 0"),
        (["pretrain.lr=null"], "pretrain.lr: Input should be a valid number (given: None)"),
        (["pretrain.warmup_epochs=99"], "warmup_epochs=99 must be less than epochs"),
        (["pretrain.sched=cosin"], "'cosine'"),
        (["pretrain.batch_size=33"], "shares=2 does not divide pretrain.batch_size=33; choose one"),
        (["pretrain.shares=3"], "choose one of 1, 2, 4, 8, 16, 32, 64"),
        (["pretrain.batch_size=2", "pretrain.mixup=0.8"], "each share has 1 images"),
        (["segment.crop_size=512"], "crop_size=512 is larger than img_size=112"),
        (["model.kernel_size=4"], "kernel_size=4 is even"),
        (["model.embed_dim=30", "model.num_heads=[4,4,8,8]"], "num_heads=4 does not divide the 30"),
        (["model.depths=[1,1]", "model.num_heads=[2]"], "must have equal length"),
        (["scaling.num_workers=4"], "num_workers=4 workers, but pretrain.shares=2: a worker takes"),
        (["scaling.use_gpu=true", "segment.deterministic=true"], "loss of UPerNet; use false"),
        (["pretrain.interpolation=random"], "'bicubic', 'bilinear' or 'nearest'"),
        (["recipe=elsa_swin_tiny", "segment.epoch_iters=0"], "schedule=160k counts steps"),
        (["tasks=[]"], "tasks: Tuple should have at least 1 item"),
        (["tasks=[detect,detect]"], "names a task twice"),
    ],
)
def test_what_does_not_fit_is_rejected_with_the_key_and_what_is_allowed(words, expected) -> None:
    with pytest.raises(ParamsError) as error:
        compose(words)
    assert expected in str(error.value)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"), [("recipe: [", "not valid YAML"), ("- 1", "must map section names")]
)
def test_a_file_that_holds_no_sections_is_rejected(write, text: str, expected: str) -> None:
    with pytest.raises(ParamsError, match=expected):
        load_params(write(text))


def test_a_group_in_place_of_a_section_names_the_command_that_composes_it(write) -> None:
    """What `dvc exp run --no-hydra -S detect=mask-rcnn_1x` leaves."""
    values = compose().model_dump(mode="json") | {"detect": "mask-rcnn_1x"}
    with pytest.raises(ParamsError, match=r"elsa compose detect=mask-rcnn_1x"):
        load_params(write(json.dumps(values)))  # YAML takes JSON


def test_missing_file_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"git checkout params.yaml"):
        load_params(tmp_path / "params.yaml")


def test_precision_is_as_published_or_of_today() -> None:
    def precisions(*words: str) -> list[str]:
        params = compose(["recipe=elsa_swin_tiny", *words])
        return [params.pretrain.amp, params.detect.amp, params.segment.amp]

    assert precisions() == ["float16", "float16", "none"]
    assert precisions("precision=bfloat16") == ["bfloat16"] * 3
    assert precisions("precision=bfloat16", "detect.amp=none") == ["bfloat16", "none", "bfloat16"]


def test_null_overrides_a_value_and_only_what_differs_is_shown() -> None:
    params = override(
        compose(["model.kernel_size=5"]), {"model.kernel_size": None, "pretrain.lr": 0.5}, "test"
    )
    assert params.model.kernel_size is None
    assert changed(params) == {"pretrain.lr": (2e-3, 0.5)}
    assert changed(compose(["recipe=elsa_swin_tiny", "detect=mask-rcnn_3x"])).keys() == {
        *("detect.schedule", "detect.epochs", "detect.milestones", "detect.drop_path_rate"),
    }


def test_shown_parameters_are_those_that_run() -> None:
    assert Params.model_validate_json(show_params(["recipe=smoke"])) == compose(["recipe=smoke"])
    assert Params.model_validate_json(show_params([])) == load_params()


def test_an_experiment_in_dvcs_folder_shares_the_repositorys_runs() -> None:
    repository = Path("/home/a/elsa")
    assert shared_root(repository) == repository
    for name in ("tmp/exps/tmp1a2b", "tmp/exps/standalone/tmp3c"):
        assert shared_root(repository / ".dvc" / name) == repository


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git and DVC repository with our recipes, and one stage that keeps what it was given."""
    for name in (".dvc/config", "params.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    for path in RECIPES.rglob("*.yaml"):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    (tmp_path / ".dvc/.gitignore").write_text("/tmp\n/cache\n")
    (tmp_path / "dvc.yaml").write_text(
        "stages: {keep: {cmd: cp params.yaml kept.yaml, params: [recipe, pretrain, detect],"
        " outs: [kept.yaml: {cache: false}]}}\n"
    )
    run(tmp_path, "git", "init", "-q")
    run(tmp_path, "dvc", "repro")
    run(tmp_path, "git", "add", "-A")
    run(tmp_path, "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "a")
    return tmp_path


def run(root: Path, *command: str) -> str:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "GIT_AUTHOR_NAME": "t",
        "GIT_AUTHOR_EMAIL": "t@localhost",
        "GIT_COMMITTER_NAME": "t",
        "GIT_COMMITTER_EMAIL": "t@localhost",
    }
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_dvc_composes_shows_what_changed_and_keeps_what_was_edited(repository: Path) -> None:
    words = ("-S", "pretrain.lr=5e-4", "-S", "detect=cascade-mask-rcnn_3x")
    run(repository, "dvc", "exp", "run", *words, "-S", "recipe=elsa_swin_tiny")
    expected = compose(["recipe=elsa_swin_tiny", "detect=cascade-mask-rcnn_3x", "pretrain.lr=5e-4"])
    assert load_params(repository / "kept.yaml") == expected
    differing = run(repository, "dvc", "params", "diff", "--md", "--all")
    assert "| pretrain.lr | 0.002" in " ".join(differing.replace("  ", " ").split())
    # An edit by hand is what runs, and the file stays as it was written.
    params = repository / "params.yaml"
    edited = params.read_text().replace("lr: 0.0005", "lr: 0.0007")
    params.write_text(edited)
    run(repository, "dvc", "repro")
    assert params.read_text() == edited
    assert load_params(repository / "kept.yaml").pretrain.lr == 0.0007


def test_dvc_queues_one_experiment_for_each_of_several_recipes(repository: Path) -> None:
    said = run(repository, "dvc", "exp", "run", "--queue", "-S", "recipe=smoke,swin_tiny")
    assert said.count("Queued experiment") == 2
    shown = run(repository, "dvc", "queue", "status")
    assert shown.count("Queued") == 2
