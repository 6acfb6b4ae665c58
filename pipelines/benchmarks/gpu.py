"""All that a GPU proves and measures, in one command: `make gpu`.

    python -m pipelines.benchmarks.gpu --out gpu-out

Each part is a process of its own with a time limit and a log. What fails, faults or runs over is
told, and the rest goes on; the most important parts come first. The folder then holds `report.md`
to read, `figures.json`, and the logs. It needs torch, timm, safetensors, ninja, nvcc and pytest;
the part `training` also pydantic and ruamel.yaml. With `--device cpu` it rehearses what a CPU can
run.

Exit codes: 0 all parts that could run are done, 1 some failed, 2 torch sees no GPU.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipelines.benchmarks.gpu_counters import COUNTERS, table_of

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "timm", "safetensors", "ninja", "pytest", "pydantic", "natten")
GPU_TESTS = ("tests/ops/test_cuda.py", "tests/elsa/test_layers.py")
PARAMETERS = ("pydantic", "ruamel.yaml")
"""What reads the parameters of a training."""
TOOLS = ("nvcc", "ninja", "c++", "ncu", "compute-sanitizer")
ERRORS = ".stderr.log"
STAGES = ["tiny, small stage 1", "tiny, small stage 2", "tiny, small stage 3"]


@dataclass(frozen=True)
class Part:
    """A process to run."""

    name: str
    title: str
    limit: float
    """Seconds."""
    command: list[str]
    """`{json}` becomes the file for its figures, `{batch}` the batch size."""
    batch: int = 0
    """Halved, and tried again, where the GPU's memory is too small."""
    tool: str = ""
    """What must be on PATH; without it the part is left out."""
    modules: tuple[str, ...] = ()
    """What must be importable, likewise."""


@dataclass
class Outcome:
    """What came of a part."""

    name: str
    title: str
    status: str
    seconds: float = 0.0
    command: str = ""
    notes: list[str] = field(default_factory=list)
    figures: Any = None

    @property
    def failed(self) -> bool:
        return not self.status.startswith(("done", "left out"))


def parts_of(device: str) -> list[Part]:
    """The parts in the order in which they run."""
    cuda = device == "cuda"
    on, figures = ["--device", device], ["--json", "{json}"]
    models = ["-m", "elsa.benchmarks.models", *on, "--models", "elsa_swin_tiny"]
    models += ["swin_tiny_patch4_window7_224", "--batch", "{batch}"]
    if not cuda:
        models += ["--img-size", "32", "--repetitions", "1"]
    operator = ["-m", "ops.benchmarks.elsa_attention", *on, *figures, "--batch", "{batch}"]
    training = ["-m", "pipelines.benchmarks.gpu_training", *on]
    softmax = ["-m", "ops.benchmarks.window_softmax", *on, *figures, "--batch", "{batch}"]
    images, batch = (128, 64) if cuda else (1, 1)
    every = [
        Part("values", "Values, gradients, repeatability", 90, ["-m", "ops.check", *on, *figures]),
        Part("operator", "The operator beside its peers", 110, operator, batch),
        Part("training", "The training loop", 110, [*training, *figures], modules=PARAMETERS),
        Part("softmax", "The softmax of a window beside torch's", 30, softmax, batch),
        Part("models", "Models, bfloat16", 50, [*models, "--amp", "bfloat16"], images),
        Part("profile", "A training step by kernel", 40, ["-m", "elsa.benchmarks.profile", *on]),
    ]
    if not cuda:
        every[1].command.extend(["--seconds", "0.05", "--no-unfold", "--shapes", STAGES[2]])
        return every
    every[0].command.append("--thorough")
    every[1].command.extend(["--seconds", "0.15"])
    tests = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *GPU_TESTS]
    if importlib.util.find_spec("xdist"):  # a kernel that faults spoils its own process alone
        tests += ["-n", "4"]
    every.insert(1, Part("tests", "pytest -m gpu", 120, tests))
    counters = ["ncu", "--csv", "--print-units", "base", "--clock-control", "none"]
    counters += [
        "--metrics",
        ",".join(COUNTERS),
        "-k",
        "regex:product_kernel|gradient_kernel|window_softmax",
    ]
    counters += [sys.executable, *operator[:2], *on, "--once", "--shapes", *STAGES]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9"]
    check = [sys.executable, "-m", "ops.check", *on]
    halves = ["--amp", "bfloat16"]
    kinds = {"channels_last": [*halves, "--channels-last"], "float16": ["--amp", "float16"]}
    kinds["compiled"] = [*halves, "--compile"]
    dense = ["-m", "pipelines.benchmarks.gpu_dense", *on, *figures]
    mm = ("mmcv", "mmdet", "mmseg", *PARAMETERS)
    return [
        *every,
        Part("dense", "Detection and segmentation", 120, dense, modules=mm),
        Part("counters", "Counters of the operator's kernels", 60, counters, tool="ncu"),
        *(
            Part(f"models_{kind}", f"Models, {kind}", 75, [*models, *more], images)
            for kind, more in kinds.items()
        ),
        *(
            Part(tool, tool, 60, [*sanitizer, "--tool", tool, *check], tool="compute-sanitizer")
            for tool in ("memcheck", "racecheck")
        ),
    ]


def _output(command: Sequence[str], otherwise: str = "not known") -> str:
    """What a command prints; `otherwise` where it is not there, fails, or takes a minute."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
        )
    except (OSError, subprocess.SubprocessError):
        return otherwise
    return done.stdout.strip()


def environment() -> dict[str, Any]:
    """Versions, tools and the GPU with what else uses it."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    query = ["nvidia-smi", "--format=csv,noheader"]
    fields = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,power.limit"
    gpu = bool(shutil.which("nvidia-smi"))
    return {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "packages": versions,
        "tools": {tool: bool(shutil.which(tool)) for tool in TOOLS},
        "gpu": _output([*query, f"--query-gpu={fields}"]) if gpu else "no nvidia-smi",
        "other processes on it": _output([*query, "--query-compute-apps=pid,used_memory"])
        if gpu
        else "",
        "commit": _output(["git", "describe", "--always", "--dirty"]),
    }


def run(part: Part, folder: Path, seconds: float, env: dict[str, str]) -> Outcome:
    """Run one part for at most so long; never raises for what the part does."""
    batch, notes = part.batch, []
    began = time.monotonic()
    while True:
        figures = folder / f"{part.name}.json"
        words = [w.replace("{json}", str(figures)) for w in part.command]
        words = [w.replace("{batch}", str(batch)) for w in words]
        command = words if not words[0].startswith("-") else [sys.executable, *words]
        left = seconds - (time.monotonic() - began)
        code = _process(command, folder, part.name, left, env)
        text = _printed(folder, part.name) + _printed(folder, part.name, ERRORS)
        small = code not in (0, None) and "out of memory" in text.lower()
        if not small or batch < 2:
            break
        notes.append(f"too little memory for batch {batch}: tried again with {batch // 2}")
        batch //= 2
    status = "done" if code == 0 else f"stopped: it took longer than {seconds:.0f} s"
    if code:
        status = f"failed with code {code}" if code > 0 else f"killed by signal {-code}"
    outcome = Outcome(part.name, part.title, status, time.monotonic() - began, notes=notes)
    outcome.command = shlex.join("python" if w == sys.executable else w for w in command)
    if figures.is_file():
        try:
            outcome.figures = json.loads(figures.read_text())
        except ValueError:
            outcome.notes.append("its figures were cut off")
    return outcome


def _process(
    command: list[str], folder: Path, name: str, seconds: float, env: dict[str, str]
) -> int | None:
    """Its exit code; None where it was stopped after so many seconds."""
    with (
        (folder / f"{name}.log").open("w") as log,
        (folder / f"{name}{ERRORS}").open("w") as errors,
    ):
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=env,
                stdout=log,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            errors.write(f"{error}\n")
            return 127
        try:
            return process.wait(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            return None
        finally:  # it leads a group of its own: also what it left behind
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, number)
                    process.wait(timeout=5)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue


def _printed(folder: Path, name: str, ending: str = ".log") -> str:
    file = folder / f"{name}{ending}"
    return file.read_text(errors="replace").rstrip() if file.is_file() else ""


def build(folder: Path, env: dict[str, str], device: str, seconds: float) -> Outcome:
    """The operator in `build/op`, built unless what is there fits the checkout and the device."""
    out = str(ROOT / "build/op")
    test = f"import ops; assert ops.load_library({out!r})['cuda'] or {device == 'cpu'}"
    if not _process([sys.executable, "-c", test], folder, "build", 60, env):
        return Outcome("build", "Building the operator", "done: the library in build/op fits")
    # Without its check, which would withdraw a library that differs: the next part tells how.
    script = f"from pathlib import Path; from ops import build; build.build(Path({out!r}), True)"
    part = Part("build", "Building the operator", 240, ["-c", script])
    return run(part, folder, min(part.limit, seconds), env)


def report(found: dict[str, Any], outcomes: list[Outcome], folder: Path, device: str) -> str:
    """The page as Markdown."""
    gpu = found["gpu"] if device == "cuda" else "a CPU: a rehearsal, no figure counts"
    lines = [f"# GPU run, {time.strftime('%Y-%m-%d')}, on {gpu}", ""]
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    lines += [f"Commit {found['commit']}, Python {found['python']}, {packages}.", ""]
    if found["other processes on it"]:
        others = found["other processes on it"]
        lines += [f"**In use by others**, so that times may be off: {others}", ""]
    lines += ["| part | result | s |", "|---|---|---:|"]
    lines += [f"| {o.title} | {o.status} | {o.seconds:.0f} |" for o in outcomes]
    for outcome in outcomes:
        command = f" `{outcome.command}`" if outcome.command else ""
        lines += ["", f"## {outcome.title}", "", f"{outcome.status}.{command}", ""]
        lines += [f"{note}\n" for note in outcome.notes]
        printed = _printed(folder, outcome.name).splitlines()
        if outcome.name == "counters" and not outcome.failed:
            lines += [table_of("\n".join(printed))]
        elif printed and outcome.name != "build":
            tail = printed[-60:]
            fence = [] if any(line.startswith("|") for line in tail) else ["```"]
            lines += [*fence, *tail, *fence]
        if outcome.failed:
            errors = _printed(folder, outcome.name, ERRORS) or "\n".join(printed)
            lines += ["", "```", *errors.splitlines()[-25:], "```"]
    return "\n".join(lines)


def _without_folders(text: str, folder: Path) -> str:
    """The text as it can be committed: without this machine's folders."""
    for place, name in ((folder, folder.name), (ROOT, "."), (Path(sys.prefix), "python")):
        text = text.replace(str(place), name)
    return text


def sees_gpu() -> bool:
    """Whether torch sees a GPU; asked in a process of its own, which a broken driver may kill."""
    test = "import torch; raise SystemExit(not torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", test], capture_output=True, check=False, cwd=ROOT)
    return done.returncode == 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-out"), help="default: %(default)s")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=8, help="for all; default %(default)s")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="these alone")
    arguments = parser.parse_args(argv)
    parts = parts_of(arguments.device)
    if unknown := set(arguments.parts or ()) - {part.name for part in parts}:
        parser.error(
            f"--parts: {', '.join(sorted(unknown))} unknown; there are "
            f"{', '.join(part.name for part in parts)}"
        )
    if arguments.device == "cuda" and not sees_gpu():
        print(
            "error: torch sees no GPU here. `--device cpu` rehearses the harness", file=sys.stderr
        )
        return 2
    return measure(parts, arguments)


def measure(parts: list[Part], arguments: argparse.Namespace) -> int:
    """Run the parts and write the folder; the report is whole after each part."""
    deadline = time.monotonic() + 60 * arguments.minutes
    folder = arguments.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    # Without kernels for the device a part must fail, and not fall back to the reference.
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "ELSA_OPS_BACKEND": "compiled"}
    env["ELSA_OPS_LIBRARY"] = str(ROOT / "build/op")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    if arguments.device == "cuda":
        env.setdefault("TORCH_CUDA_ARCH_LIST", _architecture())
    found, outcomes = environment(), []

    def note(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(f"{outcome.title}: {outcome.status} ({outcome.seconds:.0f} s)", flush=True)
        figures = {"environment": found, "parts": [asdict(o) for o in outcomes]}
        page = report(found, outcomes, folder, arguments.device)
        for name, text in (("figures.json", json.dumps(figures, indent=2)), ("report.md", page)):
            _replace(folder / name, _without_folders(text, folder) + "\n")

    note(build(folder, env, arguments.device, deadline - time.monotonic()))
    for part in parts:
        if arguments.parts and part.name not in arguments.parts:
            continue
        left = min(part.limit, deadline - time.monotonic())
        missing = [] if not part.tool or shutil.which(part.tool) else [part.tool]
        missing += [name for name in part.modules if not _importable(name)]
        if missing:
            note(Outcome(part.name, part.title, f"left out: not installed: {', '.join(missing)}"))
        elif left < 5:
            note(Outcome(part.name, part.title, "left out: no time left"))
        else:
            note(run(part, folder, left, env))
    print(f"written: {arguments.out / 'report.md'}")
    return 1 if any(outcome.failed for outcome in outcomes) else 0


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def _architecture() -> str:
    test = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
    return _output([sys.executable, "-c", test], otherwise="9.0")


def _replace(file: Path, text: str) -> None:
    aside = file.with_name(file.name + ".part")
    aside.write_text(text)
    aside.replace(file)


if __name__ == "__main__":
    sys.exit(main())
