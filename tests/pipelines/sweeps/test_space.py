"""A space that does not fit is rejected before anything starts."""

import hashlib

import pytest

from pipelines.params import ParamsError, compose, override
from pipelines.sweeps import space as spaces

HEAD = "about: a test\n"
OPTUNA = "search: {method: optuna, trials: 3, seed: 0, parameters: {model.gamma: {values: [0, 2]}}}"


@pytest.fixture(autouse=True)
def identities(monkeypatch):
    """Identities of the parameters alone: no data and no operator are there."""
    monkeypatch.setattr(
        spaces,
        "stage_identity",
        lambda stage, params: hashlib.sha256(params.model_dump_json().encode()).hexdigest(),
    )


def params_for(space: str, recipe: str = "demo", **sweep):
    values = {f"sweep.{key}": value for key, value in {"space": space, **sweep}.items()}
    return override(compose([f"recipe={recipe}"]), values, "test")


@pytest.mark.parametrize(
    ("text", "sweep", "message"),
    [
        ("points: [{model.lamda: 1}]", {}, r"point lamda=1:\n.*model.lamda: unknown key; known"),
        ("points: [{modle.lam: 1}]", {}, "modle.lam: a trial is a run of pretrain; only"),
        ("points: [{detect.lr: 1.0}]", {}, "detect.lr: a trial is a run of pretrain; only"),
        (
            "{stage: detect, points: [{model.lam: 1}]}",
            {},
            "model.lam: a trial is a run of detect; only parameters of detect, scaling",
        ),
        ("{stage: segment, points: [{segment.seed: 1}]}", {}, "segment.seed: seeds are what"),
        ("{stage: prepare, points: [{prepare.seed: 1}]}", {}, "stage: .*'pretrain', 'detect'"),
        ("points: [{model.lam: high}]", {}, r"model.lam: .*integer.*'high'"),
        ("grid: {model.kernel_size: [3, 4]}", {}, "kernel_size=4 is even"),
        ("points: [{model.operator: window, model.lam: 1}]", {}, "operator=window has no lam"),
        ("fixed: {model.lam: 1}", {}, "the space is empty"),
        ("grid: {model.lam: []}", {}, "grid.model.lam: .*at least 1 item"),
        ("pionts: [{model.lam: 1}]", {}, "pionts: Extra inputs are not permitted"),
        ("points: [{pretrain.seed: 1}]", {}, "seeds are what sweep.seeds counts"),
        ("{points: [{model.lam: 1}], fixed: {model.lam: 0}}", {}, "both fixed and varied"),
        ("points: [{model.lam: 1}, {model.lam: 1}]", {}, "lam=1 and lam=1 have the same"),
        ("{points: [{model.lam: 1}], reference: {model.lam: 0}}", {}, "lam=0 is no point"),
        ("points: [{model.lam: 1}]", {"max_epochs": 8}, "too small for one trial, which has 9"),
        (OPTUNA, {"seeds": 2}, "Set sweep.seeds=1"),
        (OPTUNA.replace("[0, 2]", "[0, -2]"), {"seeds": 1}, r"point gamma=-2:\n.*greater than"),
        (
            OPTUNA.replace("seed: 0", "seed: 0, asha: {grace_epochs: 9, reduction_factor: 2}"),
            {"seeds": 1},
            "grace_epochs=9 must be less than the 9 epochs",
        ),
        (OPTUNA.replace("values: [0, 2]", "low: 2, high: 1"), {}, "low must be below high"),
    ],
)
def test_a_bad_space_is_rejected_with_what_is_wrong(text, sweep, message, tmp_path, monkeypatch):
    monkeypatch.setattr(spaces, "SPACES", tmp_path)
    # A flow mapping can't follow a block key: the head goes inside it.
    whole = "{about: a test, " + text[1:] if text.startswith("{") else HEAD + text
    (tmp_path / "bad.yaml").write_text(whole)
    with pytest.raises(ParamsError, match=f"(?s){message}"):
        spaces.list_trials(params_for("bad", **sweep), spaces.load_space("bad"))


def test_an_unknown_space_is_told_with_those_that_exist():
    with pytest.raises(ParamsError, match=r"'ghosts' is unknown. Choose one of .*ghost_head"):
        spaces.load_space("ghosts")


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("demo", "demo")]
    + [(name, "elsa_swin_tiny") for name in spaces.space_names() if name not in ("none", "demo")],
)
def test_the_spaces_that_come_with_it_are_valid(name, recipe):
    seeds = 1 if name == "optimisation" else 3
    space = spaces.load_space(name)
    trials = spaces.list_trials(params_for(name, recipe, seeds=seeds), space)
    points = {trial.label for trial in trials}
    assert len(trials) == seeds * len(points)
    assert [t.seed for t in trials] == sorted(t.seed for t in trials)  # all points, seed by seed
    assert space.search or len(points) >= (4 if space.stage == "pretrain" else 2)


def test_random_points_are_the_same_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(spaces, "SPACES", tmp_path)
    domain = "{pretrain.lr: {low: 1.0e-4, high: 1.0e-2, log: true}}"
    text = f"search: {{method: random, trials: 4, seed: 1, parameters: {domain}}}"
    (tmp_path / "draw.yaml").write_text(HEAD + text)
    once, again = (
        [
            t.params.pretrain.lr
            for t in spaces.list_trials(params_for("draw"), spaces.load_space("draw"))
        ]
        for _ in range(2)
    )
    assert once == again
    assert len(set(once)) == 4
    assert all(1e-4 <= lr <= 1e-2 for lr in once)
