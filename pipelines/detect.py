"""Train a detector on the COCO data, from the pretrained weights."""

from pipelines.run.stage import run_stage
from pipelines.tasks import TASKS
from pipelines.tasks.training import training_stage

STAGE = training_stage(TASKS["detect"], __doc__ or "")

if __name__ == "__main__":
    run_stage(STAGE)
