"""Fit the config of a detector or segmentor to a backbone and to the classes of the data."""

from collections.abc import Iterator
from typing import Any

from pipelines.errors import PipelineError
from pipelines.mm.tree import dicts_in

STRIDES = (4, 8, 16, 32)
"""Pixels of the image per pixel of each map that a backbone hands on."""
HEADS = ("decode_head", "panoptic_head", "bbox_head", "mask_head", "rpn_head")
"""What takes the backbone's maps in a model without a neck."""


def takers(model: Any) -> list[Any]:
    """The configs of what takes the backbone's maps, by `in_channels`.

    Raises:
        PipelineError: none is known.
    """
    keys = ("neck",) if model.get("neck") else HEADS
    found = [part for key in (*keys, "auxiliary_head") for part in _parts(model.get(key), key)]
    if not found:
        raise PipelineError(
            f"{model.type} has no neck or head with in_channels that takes the backbone's maps",
            "Choose a config of another detector or segmentor",
        )
    return found


def _parts(value: Any, key: str) -> Iterator[Any]:
    """Of a list of necks the first, of a list of heads all."""
    parts = value if isinstance(value, list) else [value]
    for part in parts[:1] if key == "neck" else parts:
        if isinstance(part, dict) and "in_channels" in part:
            yield part


def set_channels(model: Any, channels: list[int]) -> None:
    """Tell the neck or the heads how many channels each of the backbone's maps has."""
    for taker in takers(model):
        if isinstance(taker.in_channels, list | tuple):
            taker.in_channels = channels[-len(taker.in_channels) :]
        else:
            taker.in_channels = channels[taker.get("in_index", -1)]


def set_classes(model: Any, count: int) -> None:
    """Set the number of classes wherever the model has one."""
    for part in dicts_in(model):
        if "num_classes" in part:
            part.num_classes = count
        if "num_things_classes" in part:
            part.num_things_classes, part.num_stuff_classes = count, 0


def set_equal_weights(model: Any, count: int) -> None:
    """Make lists of equal class weights, of a model for another number of classes, as long as
    `count` classes need them. One weight more is that of what belongs to no class.

    Raises:
        PipelineError: the weights of classes differ, or are not as many as the model's classes.
    """
    before = {
        part.get("num_classes") or part.num_things_classes + part.num_stuff_classes
        for part in dicts_in(model)
        if part.get("num_classes") or "num_things_classes" in part
    }
    for part in dicts_in(model):
        weights = part.get("class_weight")
        if not isinstance(weights, list | tuple):
            continue
        there = next((n for n in before if len(weights) in (n, n + 1)), 0)
        if not there or len(set(weights[:there])) > 1:
            raise PipelineError(
                f"a loss ({part.type}) weighs the classes of another data set: {list(weights)}",
                "Take class_weight out of it, or make its weights equal",
            )
        part.class_weight = [weights[0]] * count + list(weights[there:])
