"""Predictions of a detector or a segmentor for the validation images."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import PipelineError
from pipelines.mm.config import PREDICTIONS, build_config, test_time_augmentation, use
from pipelines.mm.hooks import evaluate
from pipelines.mm.train import make_runner
from pipelines.train.job import Job

if TYPE_CHECKING:
    from pipelines.train.reporter import Reporter


def build_model(job: Job) -> Any:
    """The job's detector or segmentor, without weights."""
    from mmengine.registry import MODELS, DefaultScope

    config = build_config(job, Path())
    DefaultScope._instance_dict.clear()  # another task's, in one process
    use(config)
    return MODELS.build(config.model)


def predict(
    job: Job, weights: Mapping[str, Any], ms_flip: bool, folder: Path, reporter: "Reporter"
) -> dict[str, float]:
    """Write predictions to `folder` and return what mmdet's or mmseg's own evaluation says.

    Written, on rank 0: COCO results `coco.{bbox,segm}.json`, or a PNG of labels per image. One
    call per process, as for training.

    Args:
        weights: state dict of the whole model.
        ms_flip: predict with the config's test-time augmentation (scales and flips).
    """
    work = Path(tempfile.mkdtemp(prefix=f"{job.stage}-", dir=reporter.scratch))
    try:
        config = build_config(job, work)
        runner = make_runner(config, work)
        model = runner.model
        model.load_state_dict(weights)
        dataloader, evaluator = config.test_dataloader, config.test_evaluator
        if ms_flip:
            model, dataloader = augmented(config, model)

        def progress(done: int, total: int) -> None:
            reporter.progress(done, total, "img")

        scores = evaluate(runner, model, dataloader, evaluator, progress)
        if reporter.rank == 0:
            shutil.copytree(work / PREDICTIONS, folder, dirs_exist_ok=True)
        return scores
    finally:
        shutil.rmtree(work, ignore_errors=True)


def augmented(config: Any, model: Any) -> tuple[Any, Any]:
    """`model` under the config's test-time augmentation, and the loader that goes with it.

    Raises:
        PipelineError: the config has none.
    """
    from mmengine.registry import MODELS

    tta = test_time_augmentation(config)
    if tta is None:
        raise PipelineError("--ms-flip: only segmentation has test-time augmentation here")
    return MODELS.build(dict(tta["model"], module=model)), tta["dataloader"]
