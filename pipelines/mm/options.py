"""`cfg_options`: what users change in mm configs, by dotted keys."""

from collections.abc import Mapping
from typing import Any

from mmengine.config import Config

from pipelines.errors import PipelineError


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
