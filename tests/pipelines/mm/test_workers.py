"""Detection and segmentation on any number of workers: the same bits."""

import pytest
import torch
from mmengine.registry import DefaultScope

from pipelines.mm.checkpoint import STATE
from pipelines.mm.train import train
from pipelines.train.reporter import LocalReporter

from ..ranks import on_ranks
from .test_mm import CPU, StoppingReporter, assert_same, make_job


def train_as_rank(rank, workers, job, folder, after):
    reporter = StoppingReporter(folder, after)
    reporter.rank, reporter.world_size = rank, workers
    train(job, CPU, reporter)


@pytest.mark.parametrize("stage", ["detect", "segment"])
def test_any_number_of_workers_makes_the_same_weights_bit_for_bit(
    stage, tiny_data, tmp_path, one_thread, in_all_processes
):
    """Three shares on one worker; and on two until the first epoch's middle, then on one."""
    job = make_job(stage, tiny_data, batch_size=6, shares=3, val_interval=2, drop_path_rate=0.2)
    straight, changing = tmp_path / "straight", tmp_path / "changing"
    DefaultScope._instance_dict.clear()
    train(job, CPU, LocalReporter(straight, quiet=True))
    on_ranks(2, train_as_rank, job, changing, 0)
    assert torch.load(changing / STATE, weights_only=True)["steps"] == 1
    train(job, CPU, LocalReporter(changing, quiet=True))
    assert_same(straight, changing)
