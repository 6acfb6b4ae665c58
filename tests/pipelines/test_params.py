"""What a user can write in params.yaml, and what is refused with which message."""

import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipelines.params import Params, ParamsError, load_params, recipe_names
from pipelines.paths import ROOT, shared_root


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str) -> Path:
        path = tmp_path / "params.yaml"
        path.write_text(text)
        return path

    return _write


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_is_valid(recipe: str) -> None:
    assert load_params(recipe).recipe == recipe


def test_params_yaml_lists_every_key_so_that_dvc_can_set_it() -> None:
    listed = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    for name, field in Params.model_fields.items():
        if name != "recipe":
            assert list(listed[name]) == list(field.annotation.model_fields), name


def test_null_keeps_the_recipe_and_a_value_overrides_it(write) -> None:
    path = write("recipe: demo\npretrain: {epochs: 3, lr: 1e-4, seed: null}\n")
    params, recipe = load_params(path=path), load_params("demo")
    assert (params.pretrain.epochs, params.pretrain.lr) == (3, 1e-4)
    assert params.pretrain.seed == recipe.pretrain.seed
    assert params.detect == recipe.detect


def test_learning_rate_scales_with_the_global_batch_from_the_batch_it_is_for(write) -> None:
    text = (
        "recipe: demo\npretrain: {{lr: 1e-3, batch_size: 256, accumulate: {}, base_batch_size: {}}}"
    )
    for accumulate in (1, 4):  # how a step is cut into passes does not matter
        params = load_params(path=write(text.format(accumulate, 1024)))
        assert params.pretrain.scaled_lr() == 1e-3 / 4
        assert params.pretrain.micro_batch(2) == 128 // accumulate


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("recipe: nix", "'nix' is unknown; choose one of demo"),
        ("recipe: demo\nfoo: 1", "foo: unknown key; known here: recipe, storage"),
        ("recipe: demo\npretrain: {epoch: 1}", "pretrain.epoch: unknown key; known here: seed"),
        (
            "recipe: demo\npretrain: {epochs: two}",
            "pretrain.epochs: Input should be a valid integer",
        ),
        ("recipe: demo\npretrain: {epochs: '2'}", "pretrain.epochs"),
        ("recipe: demo\npretrain: {lr: -1.0}", "pretrain.lr: Input should be greater than 0"),
        (
            "recipe: demo\npretrain: {warmup_epochs: 99}",
            "warmup_epochs=99 must be less than epochs",
        ),
        ("recipe: demo\npretrain: {sched: cosin}", "'cosine'"),
        ("recipe: demo\npretrain: {batch_size: 33}", "pretrain.batch_size=33 is the global batch"),
        ("recipe: demo\npretrain: {accumulate: 3}", "num_workers=2 times pretrain.accumulate=3"),
        ("recipe: demo\npretrain: {batch_size: 2, mixup: 0.8}", "each forward pass has 1 images"),
        ("recipe: demo\nsegment: {crop_size: 512}", "crop_size=512 is larger than img_size=112"),
        ("recipe: demo\nmodel: {kernel_size: 4}", "kernel_size=4 is even"),
        (
            "recipe: demo\nmodel: {embed_dim: 30, num_heads: [4, 4, 8, 8]}",
            "num_heads=4 does not divide the 30",
        ),
        ("recipe: demo\nmodel: {depths: [1, 1], num_heads: [2]}", "must be as many"),
        (
            "recipe: demo\ndetect: {schedule: 3x}",
            "detect.method=mask-rcnn, detect.schedule=3x: recipe demo has no such variant;"
            " it has: mask-rcnn demo",
        ),
        (
            "recipe: elsa_swin_tiny\ndetect: {method: retinanet}",
            "it has: mask-rcnn 1x, mask-rcnn 3x, cascade-mask-rcnn 1x, cascade-mask-rcnn 3x",
        ),
        ("recipe: demo\ndetect: {variants: {}}", "detect.variants: unknown key"),
        (
            "recipe: demo\ndetect: {accumulate: 3}",
            "must be a multiple of scaling.num_workers=2 times detect.accumulate=3",
        ),
        ("recipe: demo\nsegment: {amp: bfloat16}", "segment.amp=bfloat16 needs GPUs"),
        ("recipe: elsa_swin_tiny\nsegment: {epoch_iters: 0}", "schedule=160k counts steps"),
        ("recipe: [", "not valid YAML"),
        ("- 1", "must map section names"),
    ],
)
def test_bad_params_are_refused_with_the_key_and_what_is_allowed(write, text, expected) -> None:
    with pytest.raises(ParamsError) as error:
        load_params(path=write(text))
    assert expected in str(error.value)


def test_missing_file_names_the_mend(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"git checkout params.yaml"):
        load_params(path=tmp_path / "params.yaml")


def test_command_prints_json() -> None:
    command = [sys.executable, "-m", "pipelines.params", "demo"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert Params.model_validate_json(printed) == load_params("demo")


def test_an_experiment_in_dvcs_folder_shares_the_repositorys_runs():
    repository = Path("/home/a/elsa")
    assert shared_root(repository) == repository
    for name in ("tmp/exps/tmp1a2b", "tmp/exps/standalone/tmp3c"):
        assert shared_root(repository / ".dvc" / name) == repository
