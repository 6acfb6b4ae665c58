"""Where the seconds go before a training stage's first step and after its last.

    elsa compose recipe=smoke && dvc repro report       # inputs for the stages
    python -m pipelines.benchmarks.startup --out startup

Each stage is run anew as DVC starts it, in this checkout: its outputs and MLflow run are those of a
`--force`. The program notes events (`ELSA_TRACE`), and all of its processes are looked at ten times
a second. Printed are the events; for each process when it began and its processor seconds before
the first step; how soon a run without data, checks and model makes a step, as the limit; and what
large packages take to import, each in a process of its own. `startup.png` is the timeline.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipelines.benchmarks.common import STAGES, markdown, parser_of
from pipelines.errors import PipelineError
from pipelines.paths import ROOT
from pipelines.run.trace import VARIABLE

LOOK_S = 0.1
FIRST_STEP, LAST_STEP = "first step", "loop ended"
NAMED = (FIRST_STEP, LAST_STEP, "Ray started", "worker reached")
MODULES = ("torch", "ray.train.torch", "timm", "mlflow", "pipelines.mm.train", "mmseg.apis")


@dataclass
class Process:
    """A process of a stage, in seconds since the stage's command."""

    name: str
    begun: float
    looks: list[tuple[float, float]] = field(default_factory=list)
    """(when, processor seconds until then)."""

    def used(self, until: float) -> float:
        """Processor seconds until then."""
        return max((cpu for when, cpu in self.looks if when <= until), default=0.0)


@dataclass
class Timeline:
    """A run of a stage."""

    stage: str
    seconds: float
    events: list[tuple[float, int, str]]
    """(when, process, what)."""
    processes: dict[int, Process]

    def at(self, event: str, last: bool = False) -> float:
        """When an event came, the first or the last time."""
        found = [when for when, _, name in self.events if name == event]
        return (max if last else min)(found)


def observe(stage: str, module: list[str], trace: Path) -> Timeline:
    """Run a module and its arguments, and look at it.

    Raises:
        PipelineError: it failed.
    """
    start = time.time()
    with (trace.parent / "output").open("w+") as output:
        environment = {**os.environ, VARIABLE: str(trace)}
        command = [sys.executable, "-m", *module]
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        processes: dict[int, Process] = {}
        while child.poll() is None:
            look(psutil.Process(child.pid), start, processes)
            time.sleep(LOOK_S)
        seconds = time.time() - start
        if child.returncode:
            output.seek(0)
            raise PipelineError(f"stage {stage} failed: {output.read()[-500:]}")
    lines = [line.split(" ", 2) for line in trace.read_text().splitlines()]
    events = [(float(when) - start, int(process), name) for when, process, name in lines]
    return Timeline(stage, seconds, sorted(events), processes)


def look(root: psutil.Process, start: float, processes: dict[int, Process]) -> None:
    """Note the processor seconds of a process and of all below it."""
    try:
        found = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    now = time.time() - start
    for one in found:
        try:
            with one.oneshot():
                times, words = one.cpu_times(), one.cmdline()
                known = processes.setdefault(one.pid, Process("", one.create_time() - start))
        except psutil.Error:
            continue
        known.looks.append((now, times.user + times.system))
        # Ray's workers have their name only once they have work.
        known.name = name_of(words) or known.name


def name_of(words: list[str]) -> str:
    """What a process is, from its command line."""
    if not words:
        return ""
    if words[0].startswith("ray::"):
        return words[0].strip()
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    scripts = [Path(word).name for word in words[:4] if word.endswith(".py")]
    return module or (scripts or [Path(words[0]).name])[0]


def table_of_events(line: Timeline) -> str:
    """The events in order, each the first time that it comes."""
    rows, before, seen = [], 0.0, set[str]()
    for when, process, name in [*line.events, (line.seconds, 0, "process ended")]:
        if name in seen:
            continue
        seen.add(name)
        where = line.processes[process].name if process in line.processes else ""
        row = {line.stage: name, "at": f"{when:.1f} s", "took": f"{when - before:.1f} s"}
        rows.append({**row, "process": where or f"pipelines.{line.stage}"})
        before = when
    return markdown(rows)


def table_of_processes(line: Timeline) -> str:
    """What each process used before the first step, the most first."""
    first = line.at(FIRST_STEP)
    known = [one for one in line.processes.values() if one.begun < first and one.used(first) > 0.2]
    rows = [
        {
            "process": one.name or "(short-lived)",
            "began": f"{max(one.begun, 0):.1f} s",
            "processor before the first step": f"{one.used(first):.1f} s",
        }
        for one in sorted(known, key=lambda one: -one.used(first))
    ]
    total = sum(one.used(first) for one in line.processes.values())
    share = total / (first * len(os.sched_getaffinity(0)))
    used = f"{total:.1f} s, {share:.0%} of all cores"
    rows.append({"process": "all", "began": "", "processor before the first step": used})
    return markdown(rows)


def imports(module: str, most: int = 8) -> str:
    """The packages that take longest to import with a module, in one process on its own."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    took: Counter[str] = Counter()
    for text in done.stderr.splitlines():
        parts = text.removeprefix("import time:").split("|")
        if len(parts) == 3 and parts[0].strip().isdigit():
            took[parts[2].strip().split(".")[0]] += int(parts[0])
    shown = ", ".join(f"{name} {us / 1e6:.1f}" for name, us in took.most_common(most))
    return f"`import {module}`: {sum(took.values()) / 1e6:.1f} s, of it {shown}"


def draw(lines: list[Timeline], file: Path) -> None:
    """Each process as a bar, dark where it computes, and the events as marks."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(lines), 1, figsize=(11, 3.6 * len(lines)), squeeze=False)
    for axis, line in zip(axes[:, 0], lines, strict=True):
        shown = [one for one in line.processes.values() if one.looks and one.looks[-1][1] > 0.2]
        shown.sort(key=lambda one: -one.begun)
        for row, one in enumerate(shown):
            for (then, before), (now, after) in zip(one.looks, one.looks[1:], strict=False):
                busy = min((after - before) / max(now - then, 1e-9), 1)
                axis.barh(row, now - then, left=then, height=0.8, color=str(0.9 - 0.7 * busy))
        for when, _, name in line.events:
            axis.axvline(when, color="tab:red", linewidth=0.5)
            if name in NAMED and when == line.at(name):
                axis.text(when, len(shown) - 0.4, name, rotation=30, fontsize=8)
        axis.set_yticks(range(len(shown)), [one.name for one in shown], fontsize=8)
        axis.set_xlim(0, line.seconds)
        axis.set_xlabel(f"seconds since the command of {line.stage}; dark is computing")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Print and draw the timelines."""
    parser = parser_of("startup", __doc__)
    parser.add_argument("--stage", action="append", choices=STAGES, help="default: all of them")
    parser.add_argument("--out", type=Path, default=Path("startup"), help="folder of the picture")
    arguments = parser.parse_args()
    lines = []
    for stage in arguments.stage or STAGES:
        with tempfile.TemporaryDirectory() as scratch:
            line = observe(stage, [f"pipelines.{stage}", "--force"], Path(scratch) / "trace")
            smallest = ["pipelines.benchmarks.smallest_run", stage]
            least = observe(stage, smallest, Path(scratch) / "least").at(FIRST_STEP)
        lines.append(line)
        ended = line.at(LAST_STEP, last=True)
        print(
            f"\n## {stage}: {line.at(FIRST_STEP):.1f} s to the first step ({least:.1f} s without"
            f" data, checks and model), {line.seconds - ended:.1f} s"
            f" from the loop's end to the process's, of {line.seconds:.1f} s\n"
        )
        print(f"{table_of_events(line)}\n\n{table_of_processes(line)}")
    print("\n## Imports alone\n")
    for module in MODULES:
        print(f"- {imports(module)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(lines, arguments.out / "startup.png")
    print(f"\n{arguments.out / 'startup.png'}")


if __name__ == "__main__":
    try:
        main()
    except PipelineError as error:
        sys.exit(f"error: {error}")
