"""What reading a config does without: it comes before the first step of each worker."""

from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.config import utils as config_utils
from yapf.yapflib import yapf_api

from pipelines.mm.config import CONFIGS, build_config


def rejected(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("this takes seconds")


@pytest.mark.parametrize("stage", ["detect", "segment"])
def test_no_metafile_is_read_and_nothing_is_formatted(
    stage: str, make_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is written is the config, for whoever reads it."""
    monkeypatch.setattr(config_utils, "_get_cfg_metainfo", rejected)
    for file in (CONFIGS / stage).glob("*.py"):
        assert Config.fromfile(file).model.backbone
    monkeypatch.setattr(yapf_api, "FormatCode", rejected)
    config = build_config(make_job(stage), tmp_path)
    config.dump(tmp_path / "written.py")
    assert Config.fromfile(tmp_path / "written.py").to_dict() == config.to_dict()
