"""The ELSA operator: a schema, a compiled CPU kernel and a plain PyTorch fallback.

`ops` imports only torch and the standard library. See `ops/README.md` for the maths, the
accepted types and layouts, and measured times.
"""

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
]
