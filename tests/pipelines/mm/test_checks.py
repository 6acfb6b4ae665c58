"""What is told of a training by mm before it starts; `test_options.py` has the user's changes."""

import pytest

from pipelines.errors import PipelineError
from pipelines.mm.checks import check_norms, synchronised
from pipelines.mm.config import build_config


def test_batch_norm_takes_two_images_or_more_and_synchronised_one_share_of_each_worker(
    make_job, tmp_path
):
    def check(**values):
        job = make_job("segment", **values)
        config = build_config(job, tmp_path)
        check_norms(config, job)
        return config

    with pytest.raises(PipelineError, match=r"gets one\. Lower segment\.shares=16"):
        check(shares=16)
    assert not synchronised(check())
    on_gpus = {"num_workers": 8, "use_gpu": True}
    assert synchronised(check(batch_size=8, scaling=on_gpus))  # one image on each
    with pytest.raises(PipelineError, match=r"(?s)shares=8 and scaling\.num_workers=2.*shares=2"):
        check(scaling={"num_workers": 2, "use_gpu": True})
