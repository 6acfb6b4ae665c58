"""Building, loading, refusing stale libraries, and the choice of backend."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import ops
from ops import build, elsa_attention, library, sources
from tests.ops.oracle import make_inputs


@pytest.fixture
def copied(compiled_library: Path, tmp_path: Path) -> Path:
    for name in (library.LIBRARY_NAME, library.RECORD_NAME):
        shutil.copy(compiled_library / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def fresh_state(monkeypatch: pytest.MonkeyPatch):
    """As in a process that has loaded nothing, with nothing to be found."""
    state = library._State()
    state.backend = "auto"
    monkeypatch.setattr(library, "state", state)
    monkeypatch.setattr(library, "DEFAULT_DIR", Path("/nonexistent"))
    monkeypatch.delenv("ELSA_OPS_LIBRARY", raising=False)
    return state


def run(code: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_loading_again_returns_the_record(compiled_library, copied):
    record = ops.load_library(compiled_library)
    assert ops.load_library(copied) == record
    assert ops.loaded_library() == compiled_library.resolve()


def change_record(directory, **changes):
    path = directory / library.RECORD_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("key", ["machine", "source_sha256", "library_sha256"])
def test_stale_library_is_refused(copied, key):
    change_record(copied, **{key: "other"})
    with pytest.raises(ops.StaleLibraryError, match=f"{key}: built 'other'") as caught:
        ops.load_library(copied)
    assert "dvc repro build_op" in str(caught.value)
    assert "python -m ops.build" in str(caught.value)


def test_the_torch_it_was_built_with_matters_for_cuda_alone(copied):
    """The CPU's part uses torch's stable ABI; kernels for GPUs use ATen."""
    change_record(copied, torch="2.10.0")
    assert ops.load_library(copied)
    for key in ("torch", "torch_cxx11_abi"):
        built_here = {"torch": torch.__version__, "torch_cxx11_abi": True}
        change_record(copied, cuda={"nvcc": "release 13.0"}, **{**built_here, key: "other"})
        with pytest.raises(ops.StaleLibraryError, match=f"{key}: built 'other'"):
            ops.load_library(copied)


def test_the_library_uses_torch_by_its_stable_c_functions_alone(compiled_library):
    """Else it would load under the torch it was built with and under no other."""
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", "--format=posix", compiled_library / library.LIBRARY_NAME],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = [line.split()[0] for line in listing.splitlines()]
    assert "torch_call_dispatcher" in names
    foreign = [
        n for n in names if n.startswith("_ZN") and any(m in n for m in ("c10", "2at", "torch"))
    ]
    assert foreign == []


def test_altered_library_or_broken_record_is_refused(copied):
    with (copied / library.LIBRARY_NAME).open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ops.StaleLibraryError, match="library_sha256"):
        ops.load_library(copied)
    for text in ("{", "[]"):
        (copied / library.RECORD_NAME).write_text(text)
        with pytest.raises(ops.StaleLibraryError, match=r"record|JSON"):
            ops.load_library(copied)


def test_changed_source_makes_the_library_stale(compiled_library, tmp_path, monkeypatch):
    shutil.copytree(sources.SOURCE_DIR, tmp_path / "csrc")
    monkeypatch.setattr(sources, "SOURCE_DIR", tmp_path / "csrc")
    with (tmp_path / "csrc" / "ops.cpp").open("a") as source:
        source.write("// a comment\n")
    assert ops.load_library(compiled_library)
    with (tmp_path / "csrc" / "ops.cpp").open("a") as source:
        source.write("int changed;\n")
    with pytest.raises(ops.StaleLibraryError, match="source_sha256"):
        ops.load_library(compiled_library)


def test_missing_library(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ops\.build"):
        ops.load_library(tmp_path)


def test_first_use_loads_the_named_folder_or_raises(copied):
    code = (
        "import torch, ops; v = torch.zeros(1, 2, 3, 3); h = torch.zeros(1, 1, 9, 3, 3);"
        "ops.elsa_attention(v, h, kernel_size=3); print(ops.loaded_library())"
    )
    done = run(code, ELSA_OPS_LIBRARY=str(copied))
    assert done.stdout.strip() == str(copied.resolve()), done.stderr
    with (copied / library.LIBRARY_NAME).open("ab") as stream:
        stream.write(b"\0")
    done = run(code, ELSA_OPS_LIBRARY=str(copied))
    assert done.returncode != 0
    assert "StaleLibraryError" in done.stderr


def test_fallback_warns_once(fresh_state):
    v, h, *_ = make_inputs(1, 2, 1, 3, 3, 3)
    with pytest.warns(UserWarning, match=r"python -m ops\.build"):
        elsa_attention(v, h, kernel_size=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        elsa_attention(v, h, kernel_size=3)
    with ops.use_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("error")
        elsa_attention(v, h, kernel_size=3)


def test_compiled_backend_without_a_library_is_an_error(fresh_state):
    v, h, *_ = make_inputs(1, 2, 1, 3, 3, 3)
    with ops.use_backend("compiled"), pytest.raises(RuntimeError, match="is not built"):
        elsa_attention(v, h, kernel_size=3)


def test_device_without_compiled_kernel():
    with pytest.raises(RuntimeError, match="no kernel for cuda tensors: it was built without CUDA"):
        library.use_compiled("cuda", "compiled")


@pytest.mark.parametrize("backend", ["auto", "compiled", "reference"])
def test_meta_tensors(backend):
    v, h = torch.zeros(1, 2, 3, 3, device="meta"), torch.zeros(1, 1, 9, 3, 3, device="meta")
    with ops.use_backend(backend):
        assert elsa_attention(v, h, kernel_size=3).shape == v.shape


def test_backend_names(monkeypatch):
    with pytest.raises(ValueError, match="'fast'"):
        ops.set_backend("fast")
    monkeypatch.setenv("ELSA_OPS_BACKEND", "fast")
    with pytest.raises(ValueError, match="ELSA_OPS_BACKEND"):
        library._State()
    with ops.use_backend("reference"):
        assert ops.get_backend() == "reference"
    assert ops.get_backend() == "compiled"


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler.*apt install g\+\+"):
        build.build(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_ninja(tmp_path, monkeypatch):
    which = shutil.which
    monkeypatch.setattr(
        build.shutil, "which", lambda name, path=None: None if name == "ninja" else which(name)
    )
    with pytest.raises(build.BuildError, match="pip install ninja"):
        build.build(tmp_path / "out")


def test_compiler_error_is_shown_and_nothing_is_left(tmp_path, monkeypatch):
    source = tmp_path / "csrc"
    source.mkdir()
    (source / "ops.cpp").write_text("#error this cannot compile\n")
    monkeypatch.setattr(build, "SOURCE_DIR", source)
    with pytest.raises(build.BuildError, match="this cannot compile"):
        build.build(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_command_line_help():
    done = subprocess.run(
        [sys.executable, "-m", "ops.build", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "--out" in done.stdout


def test_record_holds_no_path_or_time(compiled_library):
    text = (compiled_library / library.RECORD_NAME).read_text()
    root = str(Path(ops.__file__).parent.parent)
    assert root not in text
    assert str(Path(torch.__file__).parent) not in text
    content = (compiled_library / library.LIBRARY_NAME).read_bytes()
    assert root.encode() not in content
    assert str(Path(torch.__file__).parent).encode() not in content
