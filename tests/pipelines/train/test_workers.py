"""Pretraining on any number of workers: the same bits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.params import Model, Params
from pipelines.train import reduction
from pipelines.train.evaluation import predict

from ..ranks import on_ranks
from .test_classify import CPU, Recorder, assert_equal, fit, job_of, smoke, threads


def fit_as_rank(
    rank: int, workers: int, params: Params, data: Path, folder: Path, patience: int
) -> None:
    # Several buckets, and some wait for others.
    reduction.BUCKET_BYTES = 2**16
    reporter = Recorder(folder, rank, workers, patience=None if patience < 0 else patience)
    trained = fit(params, data, reporter)
    if patience < 0:
        assert ("communication_ms" in reporter.epochs[-1]) == (workers > 1)
        found = predict(job_of(params, data), trained.model, CPU, reporter)
        assert (found is None) == (rank > 0)


def fit_on(
    workers: int, params: Params, data: Path, folder: Path, patience: int = -1
) -> dict[str, Any]:
    """The state after training on so many workers, of one thread each.

    With `patience` they stop within an epoch, when they were asked so often whether to.
    """
    folder.mkdir(exist_ok=True)
    scaling = params.scaling.model_copy(update={"num_workers": workers})
    params = params.model_copy(update={"scaling": scaling})
    if workers == 1:
        with threads(1):
            fit(params, data, Recorder(folder, patience=None if patience < 0 else patience))
    else:
        on_ranks(workers, fit_as_rank, params, data, folder, patience)
    return Recorder(folder).state


@pytest.mark.parametrize(
    ("settings", "numbers", "changes"),
    [
        (
            {"shares": 4, "clip_grad": 1.0, "drop_path_rate": 0.2, "mixup": 0.8},
            (1, 2, 4),
            (4, 1, 2),
        ),
        (
            {"shares": 3, "batch_size": 12, "channels_last": True, "model": "ghostnet_050"},
            (1, 3),
            (1, 2, 1),
        ),
    ],
    ids=["dropout and mixup", "batch norm, three shares"],
)
def test_any_number_of_workers_makes_the_same_weights_bit_for_bit(
    data: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    numbers: tuple[int, ...],
    changes: tuple[int, int, int],
    in_all_processes: Path,
) -> None:
    """Also where it changes in the middle of an epoch, and where shares do not divide evenly."""
    settings = {"drop_path_rate": 0.0} | settings
    name = settings.pop("model", "elsa_swin_micro")
    params = smoke(**settings).model_copy(update={"model": Model(name=name)})
    states = [fit_on(workers, params, data, tmp_path / str(workers)) for workers in numbers]
    changing = tmp_path / "changing"
    for workers, patience in zip(changes, (0, 0, -1), strict=True):
        last = fit_on(workers, params, data, changing, patience)
        assert (last["begun"] is not None) == (patience >= 0)
    for other in (*states[1:], last):
        for part in ("model", "ema", "optimizer"):
            assert_equal(other[part], states[0][part])
        for row, expected in zip(other["history"], states[0]["history"], strict=True):
            for key in ("train_loss", "holdout_loss", "holdout_top1"):
                assert row[key] == expected[key], key
    predictions = [
        dict(np.load(tmp_path / str(folder) / "checkpoint/predictions.npz"))
        for folder in (*numbers, "changing")
    ]
    for other in predictions[1:]:
        for key, values in predictions[0].items():
            np.testing.assert_array_equal(other[key], values)
