"""Compiling the operator: `python -m ops.build --out build/op`.

The result is a folder with `elsa_ops.so` and its record `build.json`. Neither holds a time or a
path of this machine: the same sources, compiler and torch give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch

from ops import library
from ops.check import check, devices
from ops.sources import SOURCE_DIR, file_digest

# No -march: every instruction set is compiled into its own file and chosen when the op runs.
# The target version is torch 2.10, the first whose stable ABI has all that the CPU's part uses; the
# headers of that ABI need C++20.
CXX_FLAGS = ("-O3", "-g0", "-DNDEBUG", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000")
CUDA_FLAGS = ("-O3", "-DNDEBUG", "--expt-relaxed-constexpr")
CUDA_ARCH_LIST = "8.0;9.0+PTX"  # unless TORCH_CUDA_ARCH_LIST says otherwise
LINK_FLAGS = ("-Wl,--strip-all", "-Wl,--build-id=none")
SANITIZE_FLAGS = ("-fsanitize=address", "-fno-omit-frame-pointer", "-g1", "-O1")

# Runs in a process of its own: `load` also loads what it built, which this process may not want.
_COMPILE = """
import json, sys
from torch.utils.cpp_extension import load
load(**json.loads(sys.argv[1]), is_python_module=False)
"""


class BuildError(RuntimeError):
    """The operator could not be compiled; the message says what to install or what failed."""


def build(
    out_dir: str | os.PathLike[str], verbose: bool = False, sanitize: bool = False
) -> dict[str, Any]:
    """Compile `ops/csrc` into `out_dir/elsa_ops.so` and write `out_dir/build.json`.

    Args:
        out_dir: made if missing; a library already there is replaced in one step.
        verbose: show ninja's progress and the compiler's output.
        sanitize: with AddressSanitizer, for `make asan`; loads only where its runtime is preloaded.

    The CUDA kernels are built where torch sees a GPU, or with FORCE_CUDA=1.

    Returns:
        The record: compiler, flags, torch, Python and machine, digests of sources and library.

    Raises:
        BuildError: no compiler, no ninja, no Python headers, a GPU without a CUDA toolkit that
            fits torch, or the compiler's own error.
    """
    compiler = _compiler()
    env = _tools_env()
    cuda = _cuda() if torch.cuda.is_available() or os.environ.get("FORCE_CUDA") == "1" else None
    out = Path(out_dir).resolve()
    out.mkdir(parents=True, exist_ok=True)
    suffixes = (".cpp", ".cu") if cuda else (".cpp",)
    sources = sorted(str(p) for p in SOURCE_DIR.rglob("*") if p.suffix in suffixes)
    cxx_flags, link_flags = list(CXX_FLAGS), list(LINK_FLAGS)
    if sanitize:
        cxx_flags += SANITIZE_FLAGS
        link_flags += SANITIZE_FLAGS[:1]
    with tempfile.TemporaryDirectory(prefix=".build-", dir=out) as work:
        request = {
            "name": Path(library.LIBRARY_NAME).stem,
            "sources": sources,
            "extra_cflags": [*cxx_flags, *_path_maps(), f"-ffile-prefix-map={work}=build"],
            "extra_cuda_cflags": list(CUDA_FLAGS),
            "extra_ldflags": link_flags,
            "build_directory": work,
            "with_cuda": bool(cuda),
            "verbose": True,
        }
        if cuda:
            env["CUDA_HOME"] = cuda["home"]
            env["TORCH_CUDA_ARCH_LIST"] = cuda["arch_list"]
        command = [sys.executable, "-c", _COMPILE, json.dumps(request)]
        if verbose:
            print(f"compiling {len(sources)} files with {compiler['version']}", flush=True)
        done = subprocess.run(
            command,
            env=env,
            text=True,
            stdout=None if verbose else subprocess.PIPE,
            stderr=None if verbose else subprocess.STDOUT,
            check=False,
        )
        built = Path(work) / library.LIBRARY_NAME
        # `load` also loads what it linked, which AddressSanitizer allows only where preloaded.
        if not built.is_file() or (done.returncode != 0 and not sanitize):
            output = done.stdout or "see the compiler's output above"
            raise BuildError(f"compiling the ELSA operator failed:\n{output[-6000:]}")
        record = {
            **library.environment(cuda=bool(cuda)),
            "torch": torch.__version__,
            "compiler": compiler["version"],
            "flags": cxx_flags,
            "link_flags": link_flags,
            "instruction_sets": _instruction_sets(),
            "cuda": {k: v for k, v in cuda.items() if k != "home"} if cuda else False,
            "library_sha256": file_digest(built),
        }
        text = json.dumps(record, indent=2, sort_keys=True) + "\n"
        (Path(work) / library.RECORD_NAME).write_text(text)
        # The old record goes first: an interruption leaves "not built", never a wrong pair.
        (out / library.RECORD_NAME).unlink(missing_ok=True)
        for name in (library.LIBRARY_NAME, library.RECORD_NAME):
            (Path(work) / name).replace(out / name)
    return record


def withdraw(out_dir: str | os.PathLike[str]) -> None:
    """Make a library that failed its check count as not built."""
    (Path(out_dir) / library.RECORD_NAME).unlink(missing_ok=True)


def _compiler() -> dict[str, str]:
    name = os.environ.get("CXX", "c++")
    path = shutil.which(name)
    if path is None:
        raise BuildError(
            f"no C++ compiler: {name!r} is not on PATH. Install one (Debian, Ubuntu: "
            "`apt install g++`; Fedora: `dnf install gcc-c++`) or set CXX."
        )
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    first = (shown.stdout.splitlines() or [""])[0]
    return {"path": path, "version": first.replace(path, name)}


def _cuda() -> dict[str, str]:
    """CUDA's home, the version of nvcc and the architectures to build for."""
    built_for = torch.version.cuda
    on_path = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), on_path and Path(on_path).resolve().parent.parent]
    home = next(
        (
            Path(home)
            for home in (*homes, "/usr/local/cuda")  # where its packages put it
            if home
            and all((Path(home) / f).is_file() for f in ("bin/nvcc", "include/cuda_runtime.h"))
        ),
        None,
    )
    if home is None:
        raise BuildError(
            "no CUDA toolkit for the GPU kernels: none at CUDA_HOME, nvcc on PATH or "
            f"/usr/local/cuda. Install CUDA {built_for} (the version of this torch), or build for "
            "the CPU alone: with CUDA_VISIBLE_DEVICES= and without FORCE_CUDA"
        )
    command = [str(home / "bin/nvcc"), "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", shown)
    if built_for is None or found is None or found[1] != built_for.split(".")[0]:
        raise BuildError(
            f"the CUDA toolkit is {found[0] if found else 'of unknown version'}, but this torch is "
            f"built for CUDA {built_for}: install that one and set CUDA_HOME to it"
        )
    arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCH_LIST
    return {"home": str(home), "nvcc": found[0], "arch_list": arch_list}


def _tools_env() -> dict[str, str]:
    """This process's environment, with the virtual environment's own ninja on PATH."""
    env = dict(os.environ)
    scripts = sysconfig.get_path("scripts")
    env["PATH"] = os.pathsep.join([env.get("PATH", ""), scripts])
    if shutil.which("ninja", path=env["PATH"]) is None:
        raise BuildError("ninja is missing. Install it: `pip install ninja` (or `uv sync`).")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise BuildError(
            "Python's headers are missing. Install them (Debian, Ubuntu: `apt install "
            "python3-dev`) or use a Python from uv, which has them."
        )
    env.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    return env


def _path_maps() -> list[str]:
    """Keep this machine's folders out of __FILE__, hence out of the library."""
    return [
        f"-ffile-prefix-map={SOURCE_DIR}=ops/csrc",
        f"-ffile-prefix-map={Path(torch.__file__).parent}=torch",
    ]


def _instruction_sets() -> list[str]:
    x86 = platform.machine() == "x86_64"
    return ["generic", "avx2", "avx512"] if x86 else ["generic"]


def build_checked(
    out_dir: str | os.PathLike[str], tolerance: float
) -> tuple[dict[str, Any], dict[str, float]]:
    """Build into `out_dir`, load and check: the build record, and the largest errors by
    device/dtype/tensor. A library that fails its check counts as not built.

    Raises:
        BuildError: it does not compile, or a float32 error is above `tolerance`.
        RuntimeError: an error beyond the tolerance of its dtype.
    """
    record = build(out_dir)
    try:
        library.load_library(out_dir)
        errors = {
            f"{device}/{key.replace(' ', '/')}": value
            for device in devices()
            for key, value in check(device).items()
        }
        largest = max(value for key, value in errors.items() if "/float32/" in key)
        if largest > tolerance:
            raise BuildError(
                f"the float32 operator differs from the reference by {largest:.3g}, more than"
                f" build_op.tolerance={tolerance:.3g}"
            )
    except BaseException:  # an interrupt too: nobody checked this library
        withdraw(out_dir)
        raise
    return record, errors


def main(argv: list[str] | None = None) -> int:
    """Build, load and check; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ops.build", description="Compile, load and check the ELSA operator."
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=library.DEFAULT_DIR,
        help=f"folder to write (default: {library.DEFAULT_DIR})",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")
    parser.add_argument(
        "--sanitize",
        action="store_true",
        help="with AddressSanitizer and without the check; `make asan` builds this and runs tests",
    )
    args = parser.parse_args(argv)
    try:
        record = build(args.out, verbose=not args.quiet, sanitize=args.sanitize)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.sanitize:
        print(f"built {args.out}/{library.LIBRARY_NAME} with AddressSanitizer; not checked")
        return 0
    try:
        library.load_library(args.out)
        errors = {
            f"{device} {key}": error for device in devices() for key, error in check(device).items()
        }
    except RuntimeError as error:
        withdraw(args.out)
        print(f"error: {error}", file=sys.stderr)
        return 1
    name, largest = max(errors.items(), key=lambda item: item[1])
    print(f"built {args.out}/{library.LIBRARY_NAME} with {record['compiler']}")
    print(f"checked against the float64 reference; largest relative error {largest:.2g} ({name})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
