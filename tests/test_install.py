"""The base package alone, as `pip install .` leaves it: the models without the pipeline."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, DEVELOPMENT = PYPROJECT["project"], PYPROJECT["dependency-groups"]["dev"]
MODULES = {
    "onedl-mmcv": "mmcv",
    "onedl-mmengine": "mmengine",
    "onedl-mmdetection": "mmdet",
    "onedl-mmsegmentation": "mmseg",
    "opencv-python-headless": "cv2",
    "ruamel-yaml": "ruamel",
    "hydra-core": "hydra",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
}
"""Packages whose module has another name."""


def packages(requirements: list[str]) -> set[str]:
    names = {re.match(r"[A-Za-z0-9._-]+", line)[0] for line in requirements}
    return {re.sub(r"[._]", "-", name).lower() for name in names}


def only_of_extras() -> list[str]:
    """Modules of packages that the base neither names nor gets with torch and timm."""
    extras = packages(
        [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    )
    extras -= packages(PROJECT["dependencies"]) | {"elsa-pipeline"}
    extras -= {"torchvision", "jinja2", "huggingface-hub"}
    return sorted(MODULES.get(name, name.replace("-", "_")) for name in extras)


def build_wheel(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    env = {**os.environ, **env}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def unpacked(folder: Path) -> Path:
    """The files of the one wheel in `folder`, outside of the checkout."""
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    assert build_wheel(folder).returncode == 0
    return unpacked(folder)


def run(installed: Path, *code: str) -> subprocess.CompletedProcess[str]:
    """Run lines where the modules of the extras can't be imported."""
    refuse = [
        "import sys",
        f"sys.path.insert(0, {str(installed)!r})",
        f"sys.modules.update(dict.fromkeys({only_of_extras()!r}))",
    ]
    return subprocess.run(
        [sys.executable, "-P", "-c", "\n".join([*refuse, *code])],
        cwd=installed.parent,
        env={"HOME": str(installed.parent), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_models_run_without_what_only_the_pipeline_needs(installed: Path) -> None:
    assert {"ray", "mlflow", "dvc", "mmcv", "mmdet", "click", "pydantic"} <= set(only_of_extras())
    done = run(
        installed,
        "import timm, torch, elsa, ops",
        "from ops import library",
        "from ops.sources import source_digest",
        "model = timm.create_model('elsa_swin_micro', num_classes=7).eval()",
        "print(model(torch.rand(1, 3, 64, 64)).shape)",
        "print(elsa.__file__, library.DEFAULT_DIR, source_digest())",
    )
    assert done.returncode == 0, done.stderr
    shape, places = done.stdout.splitlines()
    assert shape == "torch.Size([1, 7])"
    assert places.startswith(str(installed))  # it is not the checkout that runs
    from ops.sources import source_digest

    cache = f"{installed.parent}/.cache/elsa/op/{source_digest()[:12]}-torch-"
    assert cache in places  # and it has a place to compile to
    assert places.endswith(source_digest())  # the C++ sources are there
    assert "the ELSA operator is not built" in done.stderr


def test_a_wheel_with_the_operator_needs_no_compiler(
    compiled_library: Path, tmp_path: Path
) -> None:
    done = build_wheel(tmp_path, ELSA_PREBUILT=str(compiled_library))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.glob("*-py3-none-linux_*.whl")]
    done = run(
        unpacked(tmp_path),
        "import ops, torch",
        "v, h = torch.ones(1, 2, 3, 3), torch.ones(1, 1, 9, 3, 3)",
        "with ops.use_backend('compiled'):",
        "    print(ops.elsa_attention(v, h, kernel_size=3).sum())",
        "print(ops.loaded_library())",
    )
    assert done.stdout.splitlines() == ["tensor(98.)", f"{tmp_path}/site/ops/prebuilt"], done.stderr


def test_a_wheel_takes_no_operator_that_would_not_fit(
    compiled_library: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "op"
    assert "has no elsa_ops.so" in build_wheel(tmp_path, ELSA_PREBUILT=str(folder)).stderr
    shutil.copytree(compiled_library, folder)
    record = json.loads((folder / "build.json").read_text())
    for change, message in [
        ({"cuda": {"nvcc": "release 13.0"}}, "CUDA kernels, which fit one torch alone"),
        ({"source_sha256": "0"}, "is not that of these sources"),
    ]:
        (folder / "build.json").write_text(json.dumps(record | change))
        done = build_wheel(tmp_path, ELSA_PREBUILT=str(folder))
        assert done.returncode != 0
        assert message in done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_a_command_says_what_it_needs(installed: Path) -> None:
    done = run(installed, "from pipelines.__main__ import run", "run()")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: click is missing: this command needs the extra `pipeline`"
    )


def test_the_extras_install_all_that_is_imported() -> None:
    """What pipelines imports, a package that the project names brings, and no accident."""
    from tests.test_imports import imported, modules

    named = packages(PROJECT["dependencies"])
    named |= packages([x for lines in PROJECT["optional-dependencies"].values() for x in lines])
    known = {MODULES.get(name, name.replace("-", "_")) for name in named}
    known |= {"pynvml", "PIL", "ruamel", "ops", "elsa", "pipelines"}
    used = {name.split(".")[0] for p in modules("pipelines").values() for name in imported(p)}
    assert used - set(sys.stdlib_module_names) - known == set()


def test_the_constraints_are_what_setup_installs() -> None:
    """And name no registry. `make constraints` writes them anew."""
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text
    found = dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.M))
    assert text.count("--hash=sha256:") >= len(found)
    assert found == {name: version(name) for name in found}
    pins = PYPROJECT["tool"]["uv"]["constraint-dependencies"]
    assert pins == [f"{name}=={number}" for name, number in found.items()]
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values(), DEVELOPMENT]
    assert packages([line for lines in groups for line in lines]) - {"elsa-pipeline"} <= set(found)
