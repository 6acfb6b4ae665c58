"""Quote what a recipe's training stages will take here, from a probe of each."""

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from pipelines.commands.plan import WATTS, print_table
from pipelines.commands.prices import Rates
from pipelines.params import Params, compose
from pipelines.run.probe import probe
from pipelines.run.quotes import Quote, expect, keep_quote
from pipelines.sweeps.cost import all_trials
from pipelines.tasks import TASKS, Job, Task, task_of_stage


def quote(task: Task, params: Params, job: Job, seconds: float) -> Quote:
    """Probe the training of a task; the quote is kept, and shown beside what it then takes.

    Raises:
        PipelineError: it is too short to tell, or fails.
    """
    seen = probe(task.loop, job, seconds, task.loop.preload(job.params.scaling))
    each, whole = task.evaluated_images(params, job.dataset)
    made = datetime.now(UTC).isoformat(timespec="seconds")
    found = expect(seen, each, whole, made)
    keep_quote(task.stage, params, found)
    return found


def row_of(stage: str, found: Quote, work: Quote, rates: Rates) -> dict[str, Any]:
    """A line of the table.

    Args:
        work: seconds of all workers together.
    """
    row: dict[str, Any] = {
        "stage": stage,
        "images/s": f"{found.images_per_second:,.1f}" if found.images_per_second else "",
        "hours": _interval(found, 1 / 3600),
    }
    if rates.price:
        row["price"] = _interval(work, rates.price / 3600)
    if rates.watts:
        row["kWh"] = _interval(work, rates.watts / 3.6e6)
    if rates.watts and rates.carbon:
        row["kg CO2"] = _interval(work, rates.watts * rates.carbon / 3.6e9)
    return row


def _interval(found: Quote, factor: float) -> str:
    middle, low, high = (factor * value for value in (found.seconds, found.low, found.high))
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def show_quote(overrides: Sequence[str], seconds: float, sweep: bool, rates: Rates) -> None:
    """Probe the stages of these overrides one after the other, and print the quotes.

    Args:
        seconds: of each probe, from its first step on.
        sweep: with the sweep, by a probe of one of its trials.

    Raises:
        PipelineError: what a training needs is missing, or it is too short to tell.
    """
    params = compose(overrides)
    rates = replace(rates, watts=rates.watts or _watts(params, rates.gpu))
    wanted = [(TASKS[name].stage, TASKS[name], params, 1.0) for name in params.tasks]
    if sweep:
        trials = all_trials(params)
        task, name = task_of_stage(trials.base.stage), f"sweep, {trials.count} trials"
        wanted.append((name, task, trials.base.params, trials.in_base))
    # All before the first probe: what is missing should be told at once.
    jobs = [task.check(task.for_probe(one)) for _, task, one, _ in wanted]
    found = [
        times(quote(task, one, job, seconds), count)
        for (_, task, one, count), job in zip(wanted, jobs, strict=True)
    ]
    work = [
        times(one, of.scaling.num_workers) for one, (_, _, of, _) in zip(found, wanted, strict=True)
    ]
    names = [name for name, *_ in wanted]
    rows = [row_of(*line, rates) for line in zip(names, found, work, strict=True)]
    rows.append(row_of("all", total(found), total(work), rates))
    print(
        f"\n{params.recipe} on {params.scaling.num_workers} workers, by {seconds:g} s of each stage"
        " here: from its command to its outputs, in\nhours, and in brackets where that lies with"
        " 95%, if the machine stays as it was. The report shows\nthe quote beside what a stage then"
        " took." + ("" if rates.watts else " Energy needs --watts.") + "\n"
    )
    for note in rates.notes:
        print(note)
    print_table(rows)


def times(one: Quote, count: float) -> Quote:
    """Of so many runs after each other, which are off by the same factor."""
    return replace(one, seconds=one.seconds * count, low=one.low * count, high=one.high * count)


def total(quotes: Sequence[Quote]) -> Quote:
    """Of stages after each other, each off by itself."""
    middle = sum(one.seconds for one in quotes)
    low = math.hypot(*(one.seconds - one.low for one in quotes))
    high = math.hypot(*(one.high - one.seconds for one in quotes))
    return Quote(middle, middle - low, middle + high, 0.0, quotes[-1].made)


def _watts(params: Params, gpu: str) -> float:
    """That a worker draws at most, if it has a GPU that is known here; else 0."""
    import torch

    if params.budget.watts or not params.scaling.use_gpu:
        return params.budget.watts
    name = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    return next((value for key, value in WATTS.items() if key in (gpu or name)), 0.0)
