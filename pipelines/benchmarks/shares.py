"""What the same bits on any number of workers cost: a step of our reducer beside one of DDP's.

    python -m pipelines.benchmarks.shares --workers 2

Worker processes with gloo over loopback take turns, block by block, at the same steps by
`DistributedDataParallel` and by `pipelines.train.reduction`, each worker with one share. `bytes` is
what the loopback device counted, `ring` what a ring's all-reduce of the gradients has to send.
`whole on 1` is a single worker's time for all shares one after the other, over that for the same
images in one pass.

`--slow N` has the last worker sleep as long again as it computes: half the speed. Then a step has
N shares, once the same number for each worker, then as `follow_speed` allots them, in rounds with
what each worker does alone: the throughput is in percent of that sum, the median of the rounds.
"""

import argparse
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import elsa  # noqa: F401  registers its models with timm
from pipelines.benchmarks.common import markdown
from pipelines.train.agreement import gather
from pipelines.train.reduction import Reducer
from pipelines.train.shares import seed_share

CASES = {"demo": ("elsa_swin_micro", 56, 64), "tiny": ("elsa_swin_tiny", 224, 4)}
"""Model, size and number of a step's images."""
BLOCK, ROUNDS = 5, 8
SLOW_STEPS = 12


@dataclass(frozen=True)
class Case:
    """A step that is measured."""

    model: str
    size: int
    batch: int
    shares: int

    def make(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = timm.create_model(self.model, img_size=self.size, num_classes=10).train()
        return model, torch.optim.AdamW(model.parameters(), fused=True)

    def images(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a share."""
        count = self.batch // self.shares
        return torch.randn(count, 3, self.size, self.size), torch.randint(10, (count,))


@contextmanager
def half_speed(slow: bool) -> Iterator[list[float]]:
    """Take twice the time that was computed, if `slow`; afterwards the seconds are in the list."""
    took: list[float] = []
    began, computed = time.perf_counter(), time.thread_time()
    yield took
    if slow:
        time.sleep(time.thread_time() - computed)
    took.append(time.perf_counter() - began)


def our_step(case: Case, rank: int, workers: int, slow: bool = False) -> tuple[Any, Reducer]:
    """A function that does a step and returns the seconds of a share's forward pass."""
    model, optimizer = case.make()
    reducer = Reducer(model, case.shares, rank, workers)
    images, labels = case.images()

    def step() -> float:
        forward = 0.0
        for share in reducer.own:
            seed_share(0, 0, 0, share)
            with reducer.share(share) as added_up:
                with half_speed(slow) as took:
                    loss = nn.functional.cross_entropy(model(images), labels)
                added_up.append(loss)
                forward += took[0]
                with half_speed(slow):
                    loss.backward()
        reducer.finish()
        optimizer.step()
        return forward / len(reducer.own)

    return step, reducer


def ddp_step(case: Case) -> Callable[[], None]:
    model, optimizer = case.make()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    images, labels = case.images()

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(images), labels).backward()
        optimizer.step()

    return step


def loopback_bytes() -> int:
    """That the loopback device has sent since the machine started."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip()[:3] == "lo:")


def timed(step: Callable[[], Any], count: int, together: bool) -> tuple[float, int]:
    """Seconds of a step, and bytes over loopback."""
    if together:
        dist.barrier()
    sent, began = loopback_bytes(), time.perf_counter()
    for _ in range(count):
        step()
    if together:
        dist.barrier()
    return (time.perf_counter() - began) / count, (loopback_bytes() - sent) // count


def compare(rank: int, workers: int, port: int, case: Case, results: Any) -> None:
    """DDP and the reducer in turns; what a worker process runs."""
    _join(rank, workers, port)
    steps = {"DDP": ddp_step(case), "ours": our_step(case, rank, workers)[0]}
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in steps}
    for step in steps.values():
        step(), step()
    for round in range(ROUNDS):
        for name in (list(steps), list(steps)[::-1])[round % 2]:
            found[name].append(timed(steps[name], BLOCK, together=True))
    if rank == 0:
        results.put(found)
    dist.destroy_process_group()


def alone(case: Case) -> dict[int, list[float]]:
    """Seconds of a step on one worker, in one pass and in all shares."""
    torch.set_num_threads(1)
    cases = {n: Case(case.model, case.size, case.batch, n) for n in (1, case.shares)}
    steps = {n: our_step(each, 0, 1)[0] for n, each in cases.items()}
    found: dict[int, list[float]] = {n: [] for n in steps}
    for step in steps.values():
        step()
    for _ in range(ROUNDS // 2):
        for n, step in steps.items():
            found[n].append(timed(step, BLOCK, together=False)[0])
    return found


def unequal(rank: int, workers: int, port: int, case: Case, results: Any) -> None:
    """Rounds of a step together, with a slow last worker, and of what each worker does alone. From
    the second round on the shares follow the speed."""
    _join(rank, workers, port)
    slow = rank == workers - 1
    step, reducer = our_step(case, rank, workers, slow)
    each = our_step(case, 0, 1, slow)[0]  # all shares, one after the other
    step(), each()
    rounds = []
    for _ in range(1 + ROUNDS):
        seconds = []

        def noted() -> None:
            seconds.append(step())  # noqa: B023

        took, _ = timed(noted, SLOW_STEPS, together=True)
        counts = [len(own) for own in reducer.ranges]
        reducer.follow_speed(statistics.median(seconds))
        dist.barrier()
        took_alone, _ = timed(each, SLOW_STEPS // 2, together=False)
        speeds = gather(case.batch / took_alone, workers)
        rounds.append((case.batch / took, counts, speeds))
    if rank == 0:
        results.put(rounds)
    dist.barrier()
    dist.destroy_process_group()


def _join(rank: int, workers: int, port: int) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers
    )


def spawned(function: Callable[..., None], workers: int, case: Case) -> Any:
    """What rank 0 of so many processes puts into the queue."""
    context = get_context("spawn")
    results: Any = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (workers, port, case, results)
    processes = [
        context.Process(target=function, args=(rank, *arguments)) for rank in range(workers)
    ]
    for process in processes:
        process.start()
    found = results.get()
    for process in processes:
        process.join()
    return found


def row(name: str, workers: int) -> dict[str, str]:
    """One row of the table."""
    model, size, batch = CASES[name]
    case = Case(model, size, batch, workers)
    found = spawned(compare, workers, case)
    ddp, ours = ([seconds for seconds, _ in found[kind]] for kind in ("DDP", "ours"))
    ratios = [b / a for a, b in zip(ddp, ours, strict=True)]
    gradients = 4 * sum(p.numel() for p in case.make()[0].parameters())
    one = alone(case)
    return {
        "model": f"{model}, {size} px, {batch} images",
        "DDP ms": f"{1000 * statistics.median(ddp):.0f}",
        "ours ms": f"{1000 * statistics.median(ours):.0f}",
        "ours / DDP": f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        "DDP MB": f"{statistics.median(sent for _, sent in found['DDP']) / 1e6:.1f}",
        "ours MB": f"{statistics.median(sent for _, sent in found['ours']) / 1e6:.1f}",
        "ring MB": f"{2 * (workers - 1) * gradients / 1e6:.1f}",
        "whole on 1": f"{statistics.median(one[workers]) / statistics.median(one[1]):.2f}",
    }


def slow_row(workers: int, shares: int) -> dict[str, str]:
    """One row of the table of unequal workers."""
    model, size, _ = CASES["demo"]
    (equal, *rounds) = spawned(unequal, workers, Case(model, size, 8 * shares, shares))
    each = [statistics.median(of_worker) for of_worker in zip(*(r[2] for r in rounds), strict=True)]
    reached = [rate / sum(speeds) for rate, _, speeds in rounds]
    rate = statistics.median(rate for rate, _, _ in rounds)
    return {
        "images/s of each worker": ", ".join(f"{speed:.0f}" for speed in each),
        "equal shares": f"{equal[0]:.0f} ({equal[0] / sum(equal[2]):.0%})",
        "shares by speed": f"{rate:.0f} ({statistics.median(reached):.0%},"
        f" {min(reached):.0%} to {max(reached):.0%})",
        "the last shares": ", ".join(map(str, rounds[-1][1])),
    }


def main() -> None:
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.benchmarks.shares", description=description
    )
    parser.add_argument("--workers", type=int, default=2, help="default %(default)s")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--slow", type=int, metavar="N", help="shares, where one is slow")
    arguments = parser.parse_args()
    if arguments.workers < 2:
        sys.exit("error: --workers must be 2 or more")
    if arguments.slow:
        print(markdown([slow_row(arguments.workers, arguments.slow)]))
    else:
        print(markdown([row(name, arguments.workers) for name in arguments.cases]))


if __name__ == "__main__":
    main()
