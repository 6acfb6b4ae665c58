"""Train Mask R-CNN on the COCO data, from the pretrained weights."""

from typing import Any

from pipelines.params import Params
from pipelines.run.stage import Stage, run_stage
from pipelines.tasks import dense as mm_stage

HEADLINE = ("bbox_mAP", "bbox_mAP_50", "segm_mAP", "segm_mAP_50")


def check(params: Params) -> dict[str, Any]:
    return mm_stage.check("detect", "coco", params)


def run(stage: Stage, checked: dict[str, Any]) -> None:
    mm_stage.run(stage, checked, HEADLINE)


if __name__ == "__main__":
    run_stage("detect", __doc__ or "", run, check)
