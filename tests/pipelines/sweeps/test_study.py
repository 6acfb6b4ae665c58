"""A search that was interrupted."""

import base64
from pathlib import Path

import optuna
import pytest

from pipelines.sweeps import space
from pipelines.sweeps.page import _search_pictures
from pipelines.sweeps.study import Study

SEARCH = space.Search(
    method="optuna",
    trials=6,
    seed=0,
    parameters={
        "pretrain.lr": space.Range(low=1e-5, high=1e-2, log=True),
        "model.operator": space.Choice(values=["elsa", "window"]),
    },
)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_an_interrupted_search_asks_its_points_again_first_and_knows_their_scores(
    tmp_path: Path,
) -> None:
    file = tmp_path / "runs/optuna.db"
    study, points = Study(SEARCH, "sweep", file), []
    for identity in ("a", "b", "c", "d"):
        points.append(study.ask())
        study.name(identity)
    study.tell("a", 10.0)
    study.tell("b", None)  # failed
    study.tell("c", 30.0)
    assert len({point["pretrain.lr"] for point in points}) == 4
    again = Study(SEARCH, "sweep", file)  # the fourth was killed
    assert [trial.value for trial in again.study.get_trials()] == [10.0, None, 30.0, None]
    for identity, point in zip("abcd", points, strict=True):
        assert again.ask() == point
        again.name(identity)
    again.tell("a", 10.0)  # taken over
    again.tell("d", 20.0)
    rates = {point["pretrain.lr"] for point in points}
    rates |= {again.ask()["pretrain.lr"] for _ in range(again.left)}
    assert len(rates) == SEARCH.trials  # what follows is new
    kept = optuna.load_study(study_name="sweep", storage=f"sqlite:///{file}")
    assert [trial.value for trial in kept.get_trials()][:4] == [10.0, None, 30.0, 20.0]
    assert kept.best_params == points[2]
    history, importance = _search_pictures(kept, "val_top1")
    assert history.alt == "val_top1 by trial: 10.0; 30.0; 20.0"
    assert {name.split(":")[0] for name in importance.alt.split("; ")} == set(points[0])
    assert all(base64.b64decode(one.data).startswith(b"\x89PNG") for one in (history, importance))


def test_a_new_sweep_searches_anew(tmp_path: Path) -> None:
    file = tmp_path / "optuna.db"
    first = Study(SEARCH, "one", file).ask()
    other = Study(SEARCH, "two", file)
    assert other.study.get_trials() == []
    assert other.ask() == first  # the same seed
