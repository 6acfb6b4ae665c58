"""Train UPerNet on the ADE20K data, from the pretrained weights."""

from typing import Any

from pipelines.params import Params
from pipelines.run.stage import Stage, run_stage
from pipelines.tasks import dense as mm_stage

HEADLINE = ("mIoU", "mIoU_ms_flip", "aAcc", "mAcc")


def check(params: Params) -> dict[str, Any]:
    return mm_stage.check("segment", "ade20k", params)


def run(stage: Stage, checked: dict[str, Any]) -> None:
    mm_stage.run(stage, checked, HEADLINE)


if __name__ == "__main__":
    run_stage("segment", __doc__ or "", run, check)
