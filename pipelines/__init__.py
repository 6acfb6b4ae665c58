"""The experiment pipeline: DVC stages that run as Ray jobs and are tracked in MLflow."""

import os

# Ray reads these when it is imported, and more than one module here imports it first.
# Under `uv run` it would pack this checkout and start every worker through uv.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
