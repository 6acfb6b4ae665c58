"""Check weights against their training: replay parts of the run between its kept checkpoints."""

import io
import json
import random
import sys
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

import torch

from pipelines.data.weights import TENSORS, read_description
from pipelines.errors import PipelineError
from pipelines.params import Params, load_params
from pipelines.paths import ROOT
from pipelines.run import checkpoints
from pipelines.run.identity import Inputs, RunState, stage_inputs
from pipelines.run.session import storage_path
from pipelines.run.stage import RUNS
from pipelines.tasks import Task, task_of_stage
from pipelines.train.replay import (
    chain_digest,
    finished_epochs,
    read_chain,
    replay,
    state_digest,
    tensors_digest,
)


def verify(stage: str, segments: int, seed: int) -> bool:
    """Print which replayed segments agree; whether all do.

    Args:
        segments: how many to replay, chosen at random; 0 replays all.
        seed: of the choice.

    Raises:
        PipelineError: the weights were made from other inputs, or are not those of the run, or
            there is nothing to replay.
    """
    params = load_params()
    task = task_of_stage(stage)
    run = _run_of(task, params)
    job = task.check(params)
    device = torch.device("cuda" if params.scaling.use_gpu else "cpu")
    if params.scaling.use_gpu and not task.section(params).deterministic:
        raise PipelineError(
            f"{stage}.deterministic=false: on GPUs its bits need not repeat, so a replay tells"
            " nothing",
            f"Train with {stage}.deterministic=true to verify it",
        )
    # As a worker has it: sums depend on how many threads share them.
    torch.set_num_threads(params.scaling.cpus_per_worker)
    torch.set_flush_denormal(True)
    with ExitStack() as stack:
        kept = _kept(f"{storage_path(params)}/{run}", stack)
        chain = read_chain(kept[-1][1])
        if len(chain) < kept[-1][0]:
            raise PipelineError(
                f"{run} has no chain of its epochs: an earlier version of this code trained it",
                "Train anew with --force",
            )
        _compare_weights(task, kept[-1][1], chain)
        agreed = True
        for epochs, folder in kept:
            if state_digest(folder) != chain[epochs - 1]:
                print(f"the checkpoint kept after epoch {epochs} is not what was written then")
                agreed = False
        starts: list[tuple[int, Path | None]] = [(0, None), *kept[:-1]]
        pairs = list(zip(starts, kept, strict=True))
        count = min(segments or len(pairs), len(pairs))
        for (first, start), (last, _) in sorted(random.Random(seed).sample(pairs, count)):
            print(f"replaying to epoch {last}, from {first}", file=sys.stderr, flush=True)
            with redirect_stdout(io.StringIO()):  # the loop's own words
                replayed = replay(task.loop, job, device, start, last)
            other = [epoch for epoch, digest in replayed.items() if digest != chain[epoch - 1]]
            agreed &= not other
            what = f"other bits from epoch {other[0]} on" if other else "the same bits"
            several = f"epochs {first + 1} to {last}" if last > first + 1 else f"epoch {last}"
            print(f"{several} replayed: {what}", flush=True)
    print(
        f"{count} of {len(pairs)} segments. If one of all was made by other means than this"
        f" training, that is found with a probability of {count / len(pairs):.0%}."
    )
    return agreed


def _kept(run: str, stack: ExitStack) -> list[tuple[int, Path]]:
    """The checkpoints of a run that end an epoch: how many are over, and the folder.

    Args:
        run: folder or URL of the run.
        stack: until its end the folders are there.

    Raises:
        PipelineError: there is none, or one is damaged.
    """
    found: dict[int, Path] = {}
    for checkpoint in checkpoints.all_of(run):
        folder = Path(stack.enter_context(checkpoint.as_directory()))
        if wrong := checkpoints.fault(folder):
            raise PipelineError(f"checkpoint {folder.name} can't be used: {wrong}")
        if epochs := finished_epochs(folder):
            found[epochs] = folder
    if not found:
        raise PipelineError(
            f"storage.path has no checkpoint of {run.rpartition('/')[2]} at the end of an epoch, so"
            " there is nothing to replay",
            "Train with storage.keep_checkpoints=0, which keeps all of them",
        )
    return sorted(found.items())


def _run_of(task: Task, params: Params) -> str:
    """Name of the Ray Train run that made the weights of these parameters.

    Raises:
        PipelineError: what makes the result has changed since.
    """
    description = read_description(ROOT / f"weights/{task.stage}")
    now = stage_inputs(task.stage, params)
    state = RunState.load(RUNS / f"{task.stage}-{description.identity}")
    if now.identity != description.identity:
        then = Inputs(**state.inputs) if state.inputs else None
        differs = f" ({', '.join(now.differences(then))})" if then else ""
        raise PipelineError(
            f"weights/{task.stage} were made from other inputs than those that are here{differs}:"
            f" run {description.identity}, now {now.identity}",
            "Check out the commit, the parameters and the data that they were made from",
        )
    attempt = f"-{state.attempt}" if state.attempt > 1 else ""
    return f"{task.stage}-{description.identity}{attempt}"


def _compare_weights(task: Task, last: Path, chain: list[str]) -> None:
    """Check that the weights are those that the last checkpoint ends with, and its chain the run's.

    Raises:
        PipelineError: they are others.
    """
    ours, theirs = ROOT / f"weights/{task.stage}" / TENSORS, last / task.weights
    if not theirs.is_file() or tensors_digest(ours) != tensors_digest(theirs):
        raise PipelineError(
            f"weights/{task.stage} are not those that the run's last checkpoint holds",
            "Run the stage again: it writes them from that checkpoint",
        )
    lineage = json.loads((ROOT / f"lineage/{task.stage}.json").read_text())
    if lineage.get("chain") != chain_digest(chain):
        raise PipelineError(
            f"lineage/{task.stage}.json tells of another chain of epochs than the last checkpoint",
            "Restore both, or train anew with --force",
        )
