"""Pretrain the backbone as an image classifier, and export its best weights."""

from pipelines.run.stage import run_stage
from pipelines.tasks import TASKS
from pipelines.tasks.training import training_stage

STAGE = training_stage(TASKS["classify"], __doc__ or "")

if __name__ == "__main__":
    run_stage(STAGE)
