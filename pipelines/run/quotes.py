"""What a stage is expected to take, from a probe of it, and kept for when it has run."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pipelines.data.files import write_whole
from pipelines.errors import PipelineError
from pipelines.params import Params
from pipelines.paths import SHARED
from pipelines.run.identity import tracked_params

QUOTES = SHARED / ".runs" / "quotes"
BLOCK_S, BLOCKS = 5.0, 6
"""Steps beside each other are alike: they are looked at in blocks of so many seconds, or of shorter
ones where there would be fewer blocks."""
ONCE, GUESSED = 0.25, 0.5
"""How far a part may be off that was measured once, or not at all; by convention."""
DRIFT = 0.1
"""How far a machine's speed is off over longer times than a probe: a shared machine lost 15% within
the nine minutes of a pretraining."""
UNSEEN_S = 10.0
"""What a probe does not see: imports of a new process, outputs, pictures of curves, the model in
MLflow. 4 to 13 s in the demo's stages."""
EVALUATION = 2 / 3
"""Of a training image's time an evaluated one takes where none was seen: between a third, as a
classifier needs no backward pass, and the whole, as a detector's results are put together."""


@dataclass(frozen=True)
class Quote:
    """Seconds of a stage from its command to its outputs, 95% of them within `low` and `high`."""

    seconds: float
    low: float
    high: float
    images_per_second: float
    """While it trains, of all workers."""
    made: str
    """Date and time."""


@dataclass(frozen=True)
class Timeline:
    """What a probe saw; times by the clock of rank 0."""

    steps: Sequence[tuple[float, int]]
    """After a step: the time, and the images done of the whole training."""
    evaluated: Sequence[tuple[float, float]]
    """Begin (the last step before) and end of what an epoch ends with, evaluation included."""
    total: int
    """Images of the whole training."""
    around: float
    """Seconds before the first step and after the last event: of Ray, the workers and the data."""


def expect(seen: Timeline, each: float, whole: float, made: str) -> Quote:
    """What the stage takes.

    Args:
        each: images that are evaluated where an epoch is.
        whole: images that are evaluated in the whole training.

    Raises:
        PipelineError: too few steps for an interval.
    """
    ends = [end for _, end in seen.evaluated]
    spans = [
        (after - before, more - done)
        for (before, done), (after, more) in pairwise(seen.steps)
        if not any(before < end <= after for end in ends)
    ]
    taken = sum(seconds for seconds, _ in spans)
    blocks = _blocks(spans, min(BLOCK_S, taken / BLOCKS))
    if len(blocks) < 3:
        raise PipelineError(
            f"the probe saw {len(spans)} steps in {taken:.0f} s: too few to tell how they vary",
            "Probe for longer",
        )
    from scipy.stats import t

    step = taken / sum(images for _, images in spans)
    spread = float(t.ppf(0.975, len(blocks) - 1)) * stdev(blocks) / len(blocks) ** 0.5
    training = seen.total * step
    each_took = [end - begin for begin, end in seen.evaluated]
    if seen.steps[-1][1] >= seen.total:  # it has seen them all
        evaluation = sum(each_took)
    else:
        evaluation = whole * (fmean(each_took) / each if ends else EVALUATION * step)
    parts = [
        (training, math.hypot(seen.total * spread, DRIFT * training)),
        (seen.around, ONCE * seen.around),
        (evaluation, (ONCE if ends else GUESSED) * evaluation),
        (UNSEEN_S, GUESSED * UNSEEN_S),
    ]
    seconds = sum(part for part, _ in parts)
    half = math.hypot(*(error for _, error in parts))
    return Quote(seconds, max(seconds - half, 0.0), seconds + half, 1 / step, made)


def _blocks(spans: Sequence[tuple[float, int]], length: float) -> list[float]:
    """Seconds per image of successive blocks of steps that take so many seconds."""
    found, seconds, images = [], 0.0, 0
    for took, done in spans:
        seconds, images = seconds + took, images + done
        if seconds >= length:
            found.append(seconds / images)
            seconds, images = 0.0, 0
    return found


def quote_file(stage: str, params: Params) -> Path:
    """Where the quote of a stage with these parameters is, on as many workers."""
    workers = params.scaling.model_dump(mode="json", include={"num_workers", "cpus_per_worker"})
    counted = json.dumps([tracked_params(stage, params), workers], sort_keys=True)
    return QUOTES / f"{stage}-{hashlib.sha256(counted.encode()).hexdigest()[:12]}.json"


def keep_quote(stage: str, params: Params, quote: Quote) -> None:
    """Keep it for the stage's metrics, whole or not at all."""
    file = quote_file(stage, params)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(asdict(quote), indent=2))


def quoted(stage: str, params: Params) -> Mapping[str, Any]:
    """Metrics that show the last quote beside what was then taken; empty where there was none."""
    file = quote_file(stage, params)
    if not file.is_file():
        return {}
    quote = Quote(**json.loads(file.read_text()))
    return {
        "quoted_s": round(quote.seconds, 1),
        "quoted_low_s": round(quote.low, 1),
        "quoted_high_s": round(quote.high, 1),
    }
