"""Make a published file of weights a folder that says what model it is of."""

from pathlib import Path

from pipelines.commands.recognise import choose_params, load_model
from pipelines.data.files import sha256_file
from pipelines.data.store import Dataset
from pipelines.data.weights import WeightsDescription, write_weights
from pipelines.tasks import TASKS, Prediction


def complete(file: Path, task_name: str, recipe: str | None, folder: Path) -> None:
    """Write the folder of a file of weights, as the task's stage would.

    Args:
        recipe: whose model and settings to use; None takes those that the weights fit.

    Raises:
        PipelineError: no recipe's model fits, or the file can't be read.
    """
    task = TASKS[task_name]
    params = choose_params(task, file, recipe, [])
    count = task.section(params).num_classes
    names = public_classes(task_name)
    classes = names if len(names) == count else tuple(f"class {i}" for i in range(count))
    what = Prediction(params, Dataset(task.dataset, "", classes, {}, ""))
    model = load_model(task, what, file)
    digest = sha256_file(file)
    about = WeightsDescription(task.model(params), digest[:12], "", {}, classes=classes)
    write_weights(folder, model.state_dict(), about)
    task.write_model_config(folder, what)


def public_classes(task_name: str) -> tuple[str, ...]:
    """Names of the classes of the task's public data set, as timm, mmdet and mmseg have them."""
    if task_name == "classify":
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        return tuple(info.index_to_description(i) for i in range(info.num_classes()))
    if task_name == "detect":
        from mmdet.datasets import CocoDataset

        return tuple(CocoDataset.METAINFO["classes"])
    from mmseg.datasets import ADE20KDataset

    return tuple(ADE20KDataset.METAINFO["classes"])
