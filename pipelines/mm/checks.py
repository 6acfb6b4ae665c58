"""What can be told of a training by mm before it starts: its norms, and the user's own changes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from pipelines.errors import PipelineError
from pipelines.mm.config import build_config, use
from pipelines.mm.own_config import read
from pipelines.mm.tree import dicts_in
from pipelines.train.job import Job
from pipelines.train.schedule import micro_batch


def synchronised(config: Config) -> bool:
    """Whether layers are normalised over the images of all workers."""
    return any(part.get("type") == "SyncBN" for part in dicts_in(config.model))


def check_norms(config: Config, job: Job) -> None:
    """Check that batch norm gets images enough, and SyncBN a share from each worker.

    Raises:
        PipelineError: it does not.
    """
    section, workers = job.section, job.params.scaling.num_workers
    norms = {part.get("type") for part in dicts_in(config.model)}
    images = section.batch_size if "SyncBN" in norms else micro_batch(section)
    if images < 2 and job.stage == "segment" and norms & {"BN", "SyncBN"}:
        raise PipelineError(
            f"{job.stage}: batch norm needs 2 images or more in a share, and gets one",
            f"Lower {job.stage}.shares={section.shares} or raise"
            f" {job.stage}.batch_size={section.batch_size}",
        )
    if "SyncBN" in norms and section.shares != workers:
        raise PipelineError(
            f"{job.stage}: SyncBN is over one share of every worker, so {job.stage}.shares="
            f"{section.shares} and scaling.num_workers={workers} must be equal",
            f"Set {job.stage}.shares={workers}: SyncBN then sees the same images of a step",
        )


def check_model(job: Job) -> None:
    """Check that each option changes something, and that the model can be built with all. Of a
    config of the user's own, print what is taken.

    Raises:
        PipelineError: one changes nothing, as it is so already or is a parameter's to decide; or
            mmdet or mmseg does not take the config or them.
    """
    import torch
    from mmengine.registry import MODELS

    options = job.section.cfg_options

    def built(of: Mapping[str, Any]) -> Config:
        section = job.section.model_copy(update={"cfg_options": of})
        params = job.params.model_copy(update={job.stage: section})
        return build_config(Job(job.stage, params, job.dataset, job.weights), Path())

    config = built(options)
    if job.section.method == "config":
        given = job.section.config
        print(f"{job.stage}.config={given}: {read(given, job.stage).told}", flush=True)
    for key in options:
        without = built({other: value for other, value in options.items() if other != key})
        if without.to_dict() == config.to_dict():
            raise PipelineError(
                f"{job.stage}.cfg_options: {key} changes nothing: it has that value already, or the"
                f" parameters decide it",
                "Take it out, or set the parameter that decides it",
            )
    use(config)
    try:
        with torch.device("meta"):
            MODELS.build(config.model)
    except (TypeError, KeyError, ValueError, AssertionError, RuntimeError) as error:
        changed = "cfg_options" if options else "config"
        raise PipelineError(
            f"{job.stage}.{changed}: no model can be built with it: {error}",
            "Compare it with the config that the stage's method and schedule name"
            if options
            else "Compare it with the file that it is based on",
        ) from error
