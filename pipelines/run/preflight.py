"""Whether the nodes can run a training: asked before each one, and by `elsa doctor`.

What a node must have is checked on that node: in this process for the driver's own, which costs a
local run nothing, and by a Ray task on every other.
"""

import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

from pipelines.errors import PipelineError
from pipelines.params import Scaling
from pipelines.paths import ROOT
from pipelines.run.display import Progress
from pipelines.run.finding import Finding, short
from pipelines.run.shared_storage import Mark
from pipelines.run.tracking_uri import without_password

OBJECT_STORE = 512 * 2**20
NEEDED_MEMORY = 2 * 2**30
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
ANSWER_S = 180
"""Seconds in which a node must have checked itself; imports of torch and MLflow are in it."""


@dataclass(frozen=True)
class Needs:
    """What a training needs of each node. Made by the driver, sent to the nodes."""

    storage: str
    """Ray Train's storage: an absolute folder or a URL."""
    tracking_uri: str
    data: Mapping[str, str]
    """Data sets by name: the folder or URL that their images are read from."""
    use_gpu: bool
    op: bool = True
    """Whether the compiled operator must be there."""


def check_memory() -> None:
    """Reject a local Ray where it would be killed.

    Raises:
        PipelineError: too little memory or shared memory.
    """
    free = psutil.virtual_memory().available
    if free < NEEDED_MEMORY:
        raise PipelineError(
            f"not enough memory: {free / 2**30:.1f} GiB free, a local Ray and its workers need"
            f" {NEEDED_MEMORY / 2**30:.0f} GiB",
            "End other programs, or set RAY_ADDRESS to a cluster",
        )
    shared = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    if shared < OBJECT_STORE:
        raise PipelineError(
            f"not enough shared memory for Ray's object store: {shared / 2**20:.0f} MiB free in"
            f" /dev/shm, {OBJECT_STORE / 2**20:.0f} MiB needed",
            "Free some (`ls -la /dev/shm`), or give a container more (`docker run --shm-size=2g`)",
        )


def require(stage: str, scaling: Scaling, needs: Needs) -> None:
    """Wait for the workers' resources, then check every node that can run a worker.

    Raises:
        PipelineError: all that is missing, on which node, and how to fix it.
    """
    wait_for_workers(stage, scaling)
    failed = [finding for finding in check_nodes(needs, scaling) if finding.fix]
    if failed:
        lines = [f"  {one.check} on {one.node}: {one.found}. {one.fix}" for one in failed]
        raise PipelineError("\n".join(["not all nodes can run this stage:", *lines]))


def bundle(scaling: Scaling) -> dict[str, float]:
    """Resources of one worker."""
    gpus = {"GPU": scaling.gpus_per_worker} if scaling.use_gpu else {}
    return {"CPU": scaling.cpus_per_worker, **gpus}


def places_on(resources: Mapping[str, float], scaling: Scaling) -> int:
    """How many workers fit on a node of these resources."""
    return int(min(resources.get(kind, 0) // amount for kind, amount in bundle(scaling).items()))


def check_workers(scaling: Scaling, nodes: Sequence[Mapping[str, Any]]) -> Finding:
    """Whether all workers fit on the nodes (as of `ray.nodes()`) at the same time."""
    fitting = sum(places_on(node["Resources"], scaling) for node in nodes)
    have = "; ".join(
        f"{node['NodeManagerAddress']}: {node['Resources'].get('CPU', 0):g} CPUs,"
        f" {node['Resources'].get('GPU', 0):g} GPUs"
        for node in nodes
    )
    needed = " and ".join(f"{amount:g} {kind}" for kind, amount in bundle(scaling).items())
    found = (
        f"{min(fitting, scaling.num_workers)} of scaling.num_workers={scaling.num_workers} fit"
        f" ({needed} each) on {have or 'no node'}"
    )
    fix = "Lower scaling.num_workers or scaling.cpus_per_worker, or use more nodes"
    if scaling.use_gpu and not any(node["Resources"].get("GPU") for node in nodes):
        fix += "; without any GPU, set scaling.use_gpu=false"
    return Finding("workers", "all nodes", found, "" if fitting >= scaling.num_workers else fix)


def wait_for_workers(stage: str, scaling: Scaling) -> None:
    """Return as soon as all workers fit; a cluster gets `scaling.wait_s` seconds to grow to that.

    Raises:
        PipelineError: they do not fit; Ray itself would wait forever, without a word.
    """
    from ray.autoscaler.sdk import request_resources

    end = time.monotonic() + (scaling.wait_s if os.environ.get("RAY_ADDRESS") else 0)
    progress: Progress | None = None
    told = ""
    try:
        while (finding := check_workers(scaling, alive_nodes())).fix:
            left = end - time.monotonic()
            if left <= 0:
                waited = f" after waiting scaling.wait_s={scaling.wait_s} s" if progress else ""
                raise PipelineError(
                    f"too few resources{waited}: {finding.found}. {finding.fix}"
                    + ("" if scaling.wait_s else "; where a cluster grows, set scaling.wait_s")
                )
            if progress is None:
                progress = Progress(stage)
                # An autoscaler starts all nodes at once then, before any worker asks for one.
                request_resources(bundles=[bundle(scaling)] * scaling.num_workers)
            if finding.found != told:
                told = finding.found
                progress.line(f"waiting up to {left:.0f} s for nodes: {told}")
            done = scaling.wait_s - left
            progress.update(int(done), scaling.wait_s, "s", "waiting for nodes")
            time.sleep(min(2.0, left))
    finally:
        if progress:
            request_resources(bundles=[])  # or the nodes would be kept after the run
            progress.close()


def alive_nodes() -> list[dict[str, Any]]:
    """The nodes of the connected Ray."""
    return [node for node in ray.nodes() if node["Alive"]]


def check_nodes(needs: Needs, scaling: Scaling) -> list[Finding]:
    """Findings of the driver's node and of all others that can run a worker."""
    here = ray.get_runtime_context().get_node_id()
    nodes = {node["NodeID"]: node for node in alive_nodes()}
    others = [
        id_ for id_, node in nodes.items() if id_ != here and places_on(node["Resources"], scaling)
    ]
    address = nodes[here]["NodeManagerAddress"]
    mark = Mark(needs.storage)
    found = [mark.leave(address)]
    trains = not others or places_on(nodes[here]["Resources"], scaling) > 0
    found += check_node(needs, address, versions(), trains=trains)
    if others:
        found += _ask(others, nodes, needs, mark if not found[0].fix else None)
    mark.remove()
    return found


def _ask(
    others: Sequence[str], nodes: Mapping[str, Any], needs: Needs, mark: Mark | None
) -> list[Finding]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(_check_other_node)
    tasks = {}
    for id_ in others:
        where = NodeAffinitySchedulingStrategy(id_, soft=False)
        address = nodes[id_]["NodeManagerAddress"]
        asked = task.options(scheduling_strategy=where).remote(needs, address, versions(), mark)
        tasks[asked] = address
    answered, silent = ray.wait(list(tasks), num_returns=len(tasks), timeout=ANSWER_S)
    found = []
    for ref in answered:
        try:
            found += ray.get(ref)
        except ray.exceptions.RayError as error:
            fix = f"Check that {ROOT} on that node is this checkout with its environment"
            found.append(Finding("node", tasks[ref], f"can't run a task: {short(error)}", fix))
    for ref in silent:
        fix = "Look at its load and its disk (`ray status`), or take it out of the cluster"
        found.append(Finding("node", tasks[ref], f"no answer within {ANSWER_S} s", fix))
        ray.cancel(ref, force=True)
    return found


def _check_other_node(
    needs: Needs, address: str, expected: Mapping[str, str], mark: Mark | None
) -> list[Finding]:
    found = [mark.find(address)] if mark else []
    return found + check_node(needs, address, expected, driver=False)


def check_node(
    needs: Needs,
    node: str,
    expected: Mapping[str, str],
    *,
    driver: bool = True,
    trains: bool = True,
) -> list[Finding]:
    """Findings of the node that this runs on.

    Args:
        node: its name in the findings.
        expected: `versions()` of the driver.
        driver: whether this is the driver's own node.
        trains: whether a worker may run here; the driver's node of a cluster may only drive.
    """
    found = [_versions(node, expected), _tracking(needs.tracking_uri, node, driver)]
    if trains:
        found.append(_memory(node))
        if needs.op:
            found.append(_operator(node, needs.use_gpu))
    return found + [_data(node, name, place) for name, place in needs.data.items()]


def versions() -> dict[str, str]:
    """What must be the same on all nodes."""
    import torch

    return {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "ray": ray.__version__,
    }


def _versions(node: str, expected: Mapping[str, str]) -> Finding:
    have = versions()
    differing = [
        f"{name} {have[name]}, the driver has {value}"
        for name, value in expected.items()
        if have[name] != value
    ]
    fix = "Run `uv sync` there, from the same commit as here, and restart Ray on it"
    if differing:
        return Finding("versions", node, "; ".join(differing), fix)
    return Finding("versions", node, ", ".join(f"{k} {v}" for k, v in have.items()))


def _memory(node: str) -> Finding:
    free = psutil.virtual_memory().available
    found = f"{free / 2**30:.1f} GiB free"
    fix = f"A worker needs {NEEDED_MEMORY / 2**30:.0f} GiB: end other programs there"
    return Finding("memory", node, found, "" if free >= NEEDED_MEMORY else fix)


def _operator(node: str, use_gpu: bool) -> Finding:
    import torch

    from ops import StaleLibraryError, load_library

    folder = ROOT / "build/op"
    build = (
        f"Run `python -m ops.build` in {ROOT} on that node, or `dvc repro --force build_op`"
        " while all nodes are up"
    )
    try:
        record = load_library(folder)
    except (FileNotFoundError, StaleLibraryError, RuntimeError, OSError) as error:
        return Finding("operator", node, short(error), build)
    # A task without GPUs may see none although the node has some.
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if use_gpu and not hidden and not torch.cuda.is_available():
        fix = "Install the NVIDIA driver that this torch's CUDA needs; `nvidia-smi` must work"
        return Finding("operator", node, "torch sees no GPU", fix)
    if use_gpu and not record["cuda"]:
        return Finding("operator", node, "built without its CUDA kernels", build)
    kinds = "CPU and CUDA" if record["cuda"] else "CPU"
    return Finding("operator", node, f"loads, with kernels for {kinds}")


def _tracking(uri: str, node: str, driver: bool) -> Finding:
    shown = without_password(uri)
    if uri.startswith("sqlite:"):
        if driver:
            return Finding("tracking", node, "a sqlite file of this machine")
        fix = (
            "Start a server that all nodes reach (`mlflow server`, pipelines/README.md) and set"
            " MLFLOW_TRACKING_URI to it"
        )
        return Finding("tracking", node, f"{shown} is a file of the driver's machine", fix)
    from pipelines.run import tracking

    try:
        tracking.ping(uri)
    except PipelineError as error:
        fix = (
            "From that node, MLFLOW_TRACKING_URI must be reachable, with a user and password in"
            " ~/.mlflow/credentials where the server asks for them"
        )
        return Finding("tracking", node, f"{shown}: {error}", fix)
    return Finding("tracking", node, f"{shown} answers")


def _data(node: str, name: str, place: str) -> Finding:
    from pipelines.data import store

    shown = store.public_url(place)
    fix = "Every node must read it at this path or URL: mount it there, or use shards at a URL"
    try:
        if store.is_url(place):
            store.Store(place).read(store.INDEX)
        else:
            first = next((path for path in Path(place).rglob("*") if path.is_file()), None)
            if first is None:
                return Finding(f"data {name}", node, f"no file in {shown}", fix)
            with first.open("rb") as file:
                file.read(1)
    except (OSError, PipelineError) as error:
        return Finding(f"data {name}", node, short(error), fix)
    return Finding(f"data {name}", node, f"reads {shown}")
