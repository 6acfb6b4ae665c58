"""What users change in mm configs: `cfg_options` by dotted keys, and a `config` of their own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from pipelines.errors import PipelineError
from pipelines.mm.own_config import read
from pipelines.train.job import Job


def change(config: Config, options: Mapping[str, Any], stage: str) -> None:
    """Make the changes, by mmengine's own merge; a number in a key is a place in a list.

    Raises:
        PipelineError: there is no such place. A new key in a place that is there is one of the many
            with a default.
    """
    for key in options:
        place: Any = config
        *way, _ = key.split(".")
        for depth, name in enumerate(way):
            try:
                place = place[int(name)] if isinstance(place, list | tuple) else place[name]
            except (KeyError, IndexError, ValueError, TypeError):
                there = list(place) if isinstance(place, dict) else f"{len(place)} items"
                raise PipelineError(
                    f"{stage}.cfg_options: {key}: {'.'.join(way[:depth]) or 'the config'} has no"
                    f" {name}, but {there}",
                    "Correct the key",
                ) from None
    try:
        config.merge_from_dict(dict(options))
    except (KeyError, TypeError, ValueError) as error:
        raise PipelineError(f"{stage}.cfg_options: {error}", "Correct it") from None


def check(job: Job) -> None:
    """Check that each option changes something, and that the model can be built with all. Of a
    config of the user's own, print what is taken.

    Raises:
        PipelineError: one changes nothing, as it is so already or is a parameter's to decide; or
            mmdet or mmseg does not take the config or them.
    """
    import torch
    from mmengine.registry import MODELS

    from pipelines.mm.config import build_config, use

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
