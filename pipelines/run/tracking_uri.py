"""Where the MLflow store is; for those who ask only that, as MLflow takes a second to import."""

import os
import re

from pipelines.paths import SHARED


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or a sqlite store at the root of the repository."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{SHARED / 'mlflow.db'}"


def without_password(text: str) -> str:
    """A tracking URI, or a message that has one in it, without user and password."""
    return re.sub(r"(?<=://)[^/@\s]*@", "...@", text)


def modules_of_store() -> tuple[str, ...]:
    """What MLflow imports, for most of a second, only when it opens the tracking store."""
    is_database = not tracking_uri().startswith(("http:", "https:"))
    return ("mlflow.store.tracking.sqlalchemy_store",) if is_database else ()
