"""Pretraining on any number of workers: the same bits."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.multiprocessing.spawn import ProcessException

from pipelines.params import Model, Params
from pipelines.train import reduction
from pipelines.train.evaluation import predict

from ..ranks import on_ranks
from .test_classify import CPU, Recorder, assert_equal, fit, job_of, smoke


class KilledRecorder(Recorder):
    """Its process is killed right after its first checkpoint, within an epoch or at its end."""

    def keep(self, folder: Path | None) -> None:
        super().keep(folder)
        if folder:
            os.kill(os.getpid(), signal.SIGKILL)


def fit_as_rank(
    rank: int, workers: int, params: Params, data: Path, folder: Path, killed: bool
) -> None:
    # Several buckets, and some wait for others.
    reduction.BUCKET_BYTES = 2**16
    reporter = (KilledRecorder if killed else Recorder)(folder, rank, workers)
    trained = fit(params, data, reporter)
    assert ("communication_ms" in reporter.epochs[-1]) == (workers > 1)
    found = predict(job_of(params, data), trained.model, CPU, reporter)
    assert (found is None) == (rank > 0)


def fit_on(
    workers: int, params: Params, data: Path, folder: Path, killed: bool = False
) -> dict[str, Any]:
    """The state after training on so many workers, of one thread each, or until one is killed."""
    folder.mkdir(exist_ok=True)
    scaling = params.scaling.model_copy(update={"num_workers": workers})
    often = params.storage.model_copy(update={"checkpoint_minutes": 1e-9 if killed else 0})
    params = params.model_copy(update={"scaling": scaling, "storage": often})
    arguments = (workers, fit_as_rank, params, data, folder, killed)
    if killed:
        with pytest.raises(ProcessException):
            on_ranks(*arguments)
    else:
        on_ranks(*arguments)
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
    """Also where it changes after kills, and where shares do not divide evenly."""
    settings = {"drop_path_rate": 0.0} | settings
    name = settings.pop("model", "elsa_swin_micro")
    params = smoke(**settings).model_copy(update={"model": Model(name=name)})
    states = [fit_on(workers, params, data, tmp_path / str(workers)) for workers in numbers]
    changing, within = tmp_path / "changing", []
    for workers, killed in zip(changes, (True, True, False), strict=True):
        last = fit_on(workers, params, data, changing, killed)
        within.append(last["begun"] is not None)
    assert within[0]
    assert not within[-1]
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
