"""Imports point one way: ops <- elsa <- pipelines, and only pipelines imports the heavy stack."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "ops": {"torch", "ops"},
    "elsa": {"torch", "timm", "safetensors", "ops", "elsa"},
}
FILES = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_package_imports_only_what_it_may(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert imported(path) - set(sys.stdlib_module_names) <= ALLOWED[package]


def test_only_tracking_imports_mlflow_and_only_launch_wires_trainers() -> None:
    for path in (ROOT / "pipelines").rglob("*.py"):
        name = str(path.relative_to(ROOT / "pipelines"))
        assert "mlflow" not in imported(path) or name == "run/tracking.py", name
        assert "TorchTrainer(" not in path.read_text() or name == "run/launch.py", name


def test_training_loop_is_free_of_ray() -> None:
    for path in (ROOT / "pipelines/train").rglob("*.py"):
        assert "ray" not in imported(path)


def test_no_module_imports_ray_before_its_settings() -> None:
    """Under `uv run`, Ray would start its workers through uv in a copy of the checkout."""
    code = (
        "import pipelines.run.reporter\n"
        "from ray._private.ray_constants import RAY_ENABLE_UV_RUN_RUNTIME_ENV as through_uv\n"
        "assert not through_uv"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
