"""Damage to files from outside, the same for the same seed."""

import copy
import random
from typing import Any

VALUES = (None, -1, 0, 1e308, "", "x" * 50, [], {}, True, [None], {"a": 1}, "../../etc", 2**70)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The content of a file, cut or with other bytes; most changes are in its first part."""
    kind = rng.randrange(5)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        return rng.randbytes(rng.randrange(1, 200))
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        end = len(changed) if kind == 2 else min(len(changed), 300)
        changed[rng.randrange(end)] = rng.randrange(256)
    return bytes(changed)


def mutated_json(value: Any, rng: random.Random) -> Any:
    """A value of JSON with something in it gone, or in its place something of another kind."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2])):
        node = value
        while isinstance(node, dict | list) and node:
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            if rng.random() < 0.3 or not isinstance(node[key], dict | list):
                if rng.random() < 0.3:
                    node.pop(key)
                else:
                    node[key] = rng.choice(VALUES)
                break
            node = node[key]
    return value
