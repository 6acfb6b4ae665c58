"""Show whether training can run here, or on the cluster of RAY_ADDRESS, and what to fix."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.errors import PipelineError
from pipelines.params import Params, load_params
from pipelines.paths import ROOT
from pipelines.run.finding import Finding
from pipelines.run.preflight import Needs
from pipelines.run.tracking_uri import tracking_uri
from pipelines.tasks import TASKS

HERE = "this machine"
LATER = "not yet: "
"""How a finding starts that is no failure: a stage that has not run makes it."""


def check_dvc_lock(root: Path = ROOT) -> Finding:
    """Whether DVC can read the lock file that it writes in place, so that a kill cuts it short."""
    path = root / ".dvc/tmp/rwlock"
    try:
        json.loads(path.read_text())
    except FileNotFoundError:
        return Finding("DVC lock", HERE, "free")
    except ValueError:
        fix = "If no `dvc` is running, `rm .dvc/tmp/rwlock`"
        return Finding("DVC lock", HERE, "a killed DVC left .dvc/tmp/rwlock half-written", fix)
    return Finding("DVC lock", HERE, "readable")


def check_params() -> tuple[Params | None, Finding]:
    """The parameters, None if the schema rejects them."""
    try:
        params = load_params()
    except PipelineError as error:
        return None, Finding("parameters", HERE, error.wrong, error.fix or "Fix it in params.yaml")
    return params, Finding("parameters", HERE, f"recipe {params.recipe}")


def check_training(params: Params) -> list[Finding]:
    """The preflight of the training stages, of what is made already."""
    from pipelines.data.dataset import locate
    from pipelines.run import preflight, session

    data, later = {}, []
    for name in (TASKS[task].dataset for task in params.tasks):
        if not (ROOT / "data" / name).is_dir():
            later.append(Finding(f"data {name}", HERE, f"{LATER}`dvc repro prepare` makes it"))
            continue
        try:
            data[name] = locate(params, name)
        except PipelineError as error:
            later.append(Finding(f"data {name}", HERE, f"{LATER}{error}"))
    op = (ROOT / "build/op").is_dir()
    if not op:
        later.append(Finding("operator", HERE, f"{LATER}`dvc repro build_op` makes it"))
    needs = Needs(session.storage_path(params), tracking_uri(), data, params.scaling.use_gpu, op)
    if os.environ.get("RAY_ADDRESS"):
        with session.ray_session(trains=False):
            workers = preflight.check_workers(params.scaling, preflight.alive_nodes())
            if workers.fix and params.scaling.wait_s:
                grows = f"; a stage waits scaling.wait_s={params.scaling.wait_s} s for more nodes"
                workers = Finding(workers.check, workers.node, workers.found + grows)
            return [workers, *preflight.check_nodes(needs, params.scaling), *later]
    return [*_without_ray(params, needs), *later]


def _without_ray(params: Params, needs: Needs) -> list[Finding]:
    """The same of this machine alone, without the seconds that a Ray takes to start."""
    import torch

    from pipelines.run import preflight
    from pipelines.run.shared_storage import Mark

    resources = {"CPU": len(os.sched_getaffinity(0)), "GPU": torch.cuda.device_count()}
    found = [
        preflight.check_workers(
            params.scaling, [{"NodeManagerAddress": HERE, "Resources": resources}]
        )
    ]
    try:
        preflight.check_memory()
    except PipelineError as error:
        found.append(_failure("memory", error))
    mark = Mark(needs.storage)
    found.append(mark.leave(HERE))
    mark.remove()
    return found + preflight.check_node(needs, HERE, preflight.versions())


def diagnose() -> list[Finding]:
    """All findings, the DVC lock and the parameters first."""
    params, finding = check_params()
    found = [check_dvc_lock(), finding]
    if params:
        try:
            found += check_training(params)
        except PipelineError as error:
            found.append(_failure("Ray", error))
    return found


def _failure(check: str, error: PipelineError) -> Finding:
    return Finding(check, HERE, error.wrong, error.fix or "Start it again, or look into its logs")


def show(findings: Sequence[Finding]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "check", "where", "found", "fix", title="Doctor")
    for one in findings:
        mark = "[green]ok"
        if one.fix:
            mark = "[red]fails"
        elif one.found.startswith(LATER):
            mark = "[yellow]later"
        table.add_row(mark, *(escape(text) for text in (one.check, one.node, one.found, one.fix)))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def show_diagnosis() -> bool:
    """Print all findings; whether nothing must be fixed."""
    findings = diagnose()
    show(findings)
    return not any(one.fix for one in findings)
