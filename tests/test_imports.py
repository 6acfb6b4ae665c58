"""Imports point one way: ops <- elsa <- pipelines, and within pipelines as the table below says."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASE = {"errors", "paths", "schema", "params"}
LAYERS = {
    "errors": set(),
    "paths": set(),
    "schema": {"errors", "paths", "schema"},
    "params": BASE,
    "data": BASE | {"data"},
    "train": BASE | {"data", "train"},
    "mm": BASE | {"data", "train", "mm"},
    "results": BASE | {"data", "train", "results"},
    "run": BASE | {"data", "train", "run"},
    "tasks": BASE | {"data", "train", "mm", "results", "run", "tasks"},
    "sweeps": BASE | {"data", "train", "mm", "results", "run", "tasks", "sweeps"},
}
"""What each part of pipelines may import. Stages, commands and benchmarks, which are not listed,
may import all of these, and nothing imports them."""
OUTSIDE = {
    "ops": {"torch", "ops"},
    "elsa": {"torch", "timm", "safetensors", "numpy", "PIL", "ops", "elsa"}
    | {"onnx", "onnxscript", "onnxruntime"}  # in `elsa.export`, and for what it writes
    | {"mmengine", "mmdet", "mmseg", "torchvision"},  # in `elsa.mm`, and for their models
}


def modules(package: str) -> dict[str, Path]:
    """Dotted name of every module of a package, and its file."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports when it runs, also within functions."""

    def executed(tree: ast.AST) -> Iterator[ast.AST]:
        for node in ast.iter_child_nodes(tree):
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if not typing_only:
                yield node
                yield from executed(node)

    for node in executed(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", OUTSIDE)
def test_package_imports_only_what_it_may(package: str) -> None:
    for path in modules(package).values():
        names = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
        assert names <= OUTSIDE[package], path


def test_every_part_of_pipelines_imports_only_what_lies_below_it() -> None:
    """As each single import does, so does the whole of what a module loads."""
    wrong = []
    for module, path in modules("pipelines").items():
        part = module.split(".")[1] if "." in module else ""
        for name in imported(path):
            if not name.startswith("pipelines."):
                continue
            target = name.split(".")[1]
            if target not in LAYERS:
                own = part and part == target
                if not own and part not in ("__main__", "cli", "benchmarks"):
                    wrong.append(f"{module} imports {name}, which nothing may")
            elif part in LAYERS and target not in LAYERS[part]:
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ["pipelines.train", "pipelines.mm", "pipelines.data", "elsa"])
def test_loops_load_without_ray_mlflow_and_dvc(package: str) -> None:
    names = [
        name for name in modules(package.split(".")[0]) if f"{name}.".startswith(f"{package}.")
    ]
    names = [name for name in names if ".configs" not in name]
    assert len(names) > 4
    code = (
        "import importlib, sys\n"
        "sys.modules.update(dict.fromkeys(['ray', 'mlflow', 'dvc']))\n"
        f"for name in {names!r}: importlib.import_module(name)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_stages_load_without_what_computes() -> None:
    """So a stage whose inputs are those of a finished run says so within a second or two."""
    stages = ["prepare", "build_op", "pretrain", "detect", "segment", "sweep", "export", "report"]
    code = (
        "import importlib, sys\n"
        "heavy = ['torch', 'timm', 'ray', 'mlflow', 'dvc', 'matplotlib', 'pandas', 'scipy']\n"
        "sys.modules.update(dict.fromkeys(heavy))\n"
        f"for name in {stages!r}: importlib.import_module(f'pipelines.{{name}}')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_elsa_loads_without_mmengine() -> None:
    code = "import sys; sys.modules['mmengine'] = None; import elsa"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_only_tracking_imports_mlflow_and_only_fit_wires_trainers() -> None:
    for module, path in modules("pipelines").items():
        heads = {name.split(".")[0] for name in imported(path)}
        assert "mlflow" not in heads or module.startswith("pipelines.run.tracking"), module
        wires = "TorchTrainer" in path.read_text()
        assert not wires or module in ("pipelines.run.fit", "pipelines.run.ray_internals"), module


def test_no_module_imports_ray_before_its_settings() -> None:
    """Under `uv run`, Ray would start its workers through uv in a copy of the checkout."""
    code = (
        "import pipelines.run.reporter\n"
        "from ray._private.ray_constants import RAY_ENABLE_UV_RUN_RUNTIME_ENV as through_uv\n"
        "assert not through_uv"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
