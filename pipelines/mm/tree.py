"""Walking configs."""

from collections.abc import Iterator
from typing import Any


def dicts_in(value: Any) -> Iterator[Any]:
    """All dicts inside a config, at any depth."""
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from dicts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from dicts_in(item)
