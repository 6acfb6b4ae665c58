"""MLflow: the only package that imports it.

One experiment, a parent run per pipeline run (a parameter set, or a DVC experiment), a
child run per stage. The driver creates the run and passes its id; workers log by client.
"""

from pipelines.run.tracking.delivery import Delivery
from pipelines.run.tracking.runs import (
    RunRecord,
    Tracker,
    end_pipeline,
    git_tags,
    metric_history,
    read_run,
    start_run,
    system_metrics,
)
from pipelines.run.tracking.store import (
    TrackingError,
    download_model,
    ping,
)
from pipelines.run.tracking.sweeps import comparison_path, find_sweep, register, sweep_trials

__all__ = [
    "Delivery",
    "RunRecord",
    "Tracker",
    "TrackingError",
    "comparison_path",
    "download_model",
    "end_pipeline",
    "find_sweep",
    "git_tags",
    "metric_history",
    "ping",
    "read_run",
    "register",
    "start_run",
    "sweep_trials",
    "system_metrics",
]
