"""The variables of Ray's processes. Those of a local Ray have them from the driver: given as their
runtime environment, each would start twice."""

import os
import platform

from pipelines.paths import ROOT

OF_ALL = {"PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true"}
"""Of all processes of any Ray."""
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
"""Where workers of a local Ray find each other."""
OF_LOCAL = {
    # Its process takes seconds of a small machine's start, and no cloud preempts this one.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # A worker's report waits for the controller's next look at it, every 2 s otherwise.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # The node's agent collects what the dashboard would show, every 5 s otherwise.
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    # When its GCS is gone it does not come back; its processes look for it for a minute otherwise.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    # The controller waits for Ray within a coroutine, of which Ray warns; Ray Train sets it, too.
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
}
"""Settings that Ray reads without its promise to; the user's own win."""


def worker_environment() -> dict[str, str]:
    """What makes glibc keep a step's memory for the next; the user's own `GLIBC_TUNABLES` win.

    It gives large tensors back when they are freed, the sooner in threads like that of a worker:
    each step pays for all of its pages anew, a sixth of its time on a CPU.
    """
    name, version = platform.libc_ver()
    # Before 2.35 it rejects so large a threshold, and stops adapting its own.
    if name != "glibc" or tuple(map(int, version.split("."))) < (2, 35):
        return {}
    settings = {"mmap_threshold": 2**30, "trim_threshold": 2**32, "arena_max": 1, "hugetlb": 1}
    wish = ":".join(f"glibc.malloc.{name}={value}" for name, value in settings.items())
    return {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", wish)}


def set_local() -> None:
    """Set what the processes of a local Ray are to have, before the first of them starts."""
    os.environ |= OF_ALL | LOOPBACK | worker_environment()
    for name, value in OF_LOCAL.items():
        os.environ.setdefault(name, value)
