"""The tasks of the pipeline, by name. A task is added in a file of its own and here."""

from pipelines.results.outputs import Result
from pipelines.tasks.classify import Classify
from pipelines.tasks.detect import Detect
from pipelines.tasks.segment import Segment
from pipelines.tasks.task import Picture, Prediction, Scene, Task
from pipelines.train.job import Job

TASKS: dict[str, Task] = {task.name: task for task in (Classify(), Detect(), Segment())}


def task_of_stage(stage: str) -> Task:
    """The task that a training stage trains."""
    return next(task for task in TASKS.values() if task.stage == stage)


__all__ = ["TASKS", "Job", "Picture", "Prediction", "Result", "Scene", "Task", "task_of_stage"]
