"""A quote is what a stage takes, of what a probe of it saw."""

import numpy as np
import pytest

from pipelines.errors import PipelineError
from pipelines.params import compose
from pipelines.run import quotes
from pipelines.run.quotes import Timeline, expect, keep_quote, quote_file, quoted

IMAGES = 64


def timeline(
    random: np.random.Generator, steps: int, per_epoch: int, evaluation: float, epochs: int = 10
) -> Timeline:
    """Steps of 0.1 s, more or less, whose time also drifts; an evaluation after each epoch."""
    now, seen, evaluated = 100.0, [(100.0, IMAGES)], []
    for step in range(1, steps):
        took = 0.1 * random.uniform(0.7, 1.3) * (1 + 0.1 * np.sin(step / 50))
        if step % per_epoch == 0:
            evaluated.append((now, now + evaluation))
            now += evaluation
        now += took
        seen.append((now, (step + 1) * IMAGES))
    if steps == epochs * per_epoch:
        evaluated.append((now, now + evaluation))
    return Timeline(seen, evaluated, epochs * per_epoch * IMAGES, 23.0)


def test_the_interval_holds_what_such_a_training_takes() -> None:
    random, within, off = np.random.default_rng(0), 0, []
    for _ in range(100):
        found = expect(timeline(random, 600, 500, 4.0), 100, 1100, "now")
        taken = timeline(random, 5000, 500, 4.0).steps[-1][0] - 100 - 9 * 4.0
        taken += 20 + 11 * 4.0 + 3 + quotes.UNSEEN_S
        within += found.low <= taken <= found.high
        off.append(found.seconds / taken - 1)
    assert within >= 95
    assert abs(np.mean(off)) < 0.01


def test_a_training_that_the_probe_saw_whole_takes_what_it_took() -> None:
    seen = timeline(np.random.default_rng(0), 400, 40, 2.0)
    found = expect(seen, 100, 99_999, "now")
    taken = 20 + (seen.steps[-1][0] - 100) + 2.0 + 3 + quotes.UNSEEN_S
    assert found.seconds == pytest.approx(taken, rel=0.01)


def test_an_evaluation_that_was_not_seen_is_guessed_and_widens_the_interval() -> None:
    seen = timeline(np.random.default_rng(0), 500, 1000, 4.0)
    few, many = (expect(seen, 100, whole, "now") for whole in (0, 100_000))
    guessed = quotes.EVALUATION * 100_000 / few.images_per_second
    assert many.seconds - few.seconds == pytest.approx(guessed)
    assert many.high - many.seconds > guessed / 2


def test_too_few_steps_are_told() -> None:
    steps = [(100.0, 64), (110.0, 128), (120.0, 192)]
    with pytest.raises(PipelineError, match=r"saw 2 steps in 20 s.* Probe for longer"):
        expect(Timeline(steps, [], 6400, 23.0), 100, 100, "now")


def test_it_is_shown_by_the_run_of_the_same_parameters_alone(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(quotes, "QUOTES", tmp_path / "quotes")
    params = compose(["recipe=smoke"])
    found = expect(timeline(np.random.default_rng(0), 600, 500, 4.0), 100, 1100, "now")
    assert quoted("pretrain", params) == {}
    keep_quote("pretrain", params, found)
    assert quoted("pretrain", params) == {
        "quoted_s": round(found.seconds, 1),
        "quoted_low_s": round(found.low, 1),
        "quoted_high_s": round(found.high, 1),
    }
    assert quoted("detect", params) == {}
    for change in ("pretrain.epochs=99", "scaling.num_workers=1", "model.name=elsa_swin_tiny"):
        assert quote_file("pretrain", compose(["recipe=smoke", change])) != (
            quote_file("pretrain", params)
        )
