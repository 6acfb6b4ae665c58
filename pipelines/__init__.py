"""The experiment pipeline: DVC stages that run as Ray jobs and are tracked in MLflow."""

import os

# Ray reads these when it is imported, and more than one module here imports it first.
# Under `uv run` it would pack this checkout and start every worker through uv.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
if not os.environ.get("RAY_ADDRESS"):
    # A local Ray then takes 127.0.0.1 for its node's address and listens nowhere else: on Linux it
    # replaces a loopback address that it is given by that of the network.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
