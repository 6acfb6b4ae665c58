"""The ELSA operator: a schema, a compiled CPU kernel and a plain PyTorch fallback.

`ops` imports only torch and the standard library, and torch only where a name below is used. See
`ops/README.md` for the maths, the accepted types and layouts, and measured times.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ops.functional import elsa_attention
    from ops.library import (
        StaleLibraryError,
        get_backend,
        load_library,
        loaded_library,
        set_backend,
        use_backend,
    )
    from ops.neighborhood import na2d_av, na2d_qk
    from ops.reference import elsa_attention_reference
    from ops.softmax import window_softmax

__all__ = [
    "StaleLibraryError",
    "elsa_attention",
    "elsa_attention_reference",
    "get_backend",
    "load_library",
    "loaded_library",
    "na2d_av",
    "na2d_qk",
    "set_backend",
    "use_backend",
    "window_softmax",
]


def __getattr__(name: str) -> Any:
    """A name of `__all__`, from the module that defines it (PEP 562)."""
    if name in __all__:
        for module in ("functional", "softmax", "neighborhood", "reference", "library"):
            found = import_module(f"ops.{module}")
            if hasattr(found, name):
                globals()[name] = getattr(found, name)  # the next access, and dynamo, find it there
                return globals()[name]
    raise AttributeError(f"module 'ops' has no attribute {name!r}")
