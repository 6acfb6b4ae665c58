"""A search that was interrupted."""

import json
from types import SimpleNamespace

from pipelines.sweeps import space


def test_an_interrupted_search_asks_its_points_again_first(monkeypatch):
    from pipelines.run import tracking
    from pipelines.sweeps.study import Study

    search = space.Search(
        method="optuna",
        trials=5,
        seed=0,
        parameters={
            "pretrain.lr": space.Range(low=1e-5, high=1e-2, log=True),
            "model.operator": space.Choice(values=["elsa", "window"]),
        },
    )
    earlier = []
    monkeypatch.setattr(tracking, "sweep_trials", lambda sweep_id: earlier)
    study, points = Study(search, "sweep"), []
    for score in (10.0, None, 30.0):  # the second failed
        points.append(study.ask())
        study.name(str(score))
        study.tell(str(score), score)
    assert len({point["pretrain.lr"] for point in points}) == 3
    earlier += [SimpleNamespace(tags={"point": json.dumps(point)}) for point in points]
    again = Study(search, "sweep")
    assert [again.ask() for _ in points] == points
    rates = {point["pretrain.lr"] for point in points}
    rates |= {again.ask()["pretrain.lr"] for _ in range(again.left)}
    assert len(rates) == 5  # what follows is new
