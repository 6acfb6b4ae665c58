"""Comparisons count as statistics says."""

from dataclasses import replace

import pytest
from scipy import stats

from pipelines.errors import PipelineError
from pipelines.results import comparison
from pipelines.results.comparison import Scored
from pipelines.results.sequential import Design


def record(run_id: str, seed: int, top1: float, lam: int) -> Scored:
    return Scored(
        run_id=run_id,
        name=run_id,
        seed=seed,
        params={"model.lam": str(lam), "pretrain.seed": str(seed), "pretrain.lr": "0.1"},
        metrics={"final/top1": top1, "final/parameters": 1e6},
    )


def test_seeds_pair_where_they_are_the_same():
    ours, theirs = {0: 60.0, 1: 70.0, 2: 80.0}, {0: 59.0, 1: 68.0, 2: 79.0}
    runs = [record(f"a{s}", s, v, 1) for s, v in theirs.items()]
    runs += [record(f"b{s}", s, v, 0) for s, v in ours.items()]
    result = comparison.compare(runs, "top1")
    assert result["reference"] == "lam=1"
    row = result["rows"][1]
    paired = stats.ttest_rel(list(ours.values()), list(theirs.values())).confidence_interval(0.95)
    assert row["difference"] == pytest.approx((paired.low + paired.high) / 2)
    assert row["difference_ci95"] == pytest.approx((paired.high - paired.low) / 2)
    assert row["paired_seeds"] == 3
    alone = stats.ttest_1samp(list(ours.values()), 0).confidence_interval(0.95)
    assert row["ci95"] == pytest.approx((alone.high - alone.low) / 2)
    assert row["verdict"] == "open"
    assert row["finding"] == "+1.3 ± 1.4 to lam=1 after 3 seeds: open"
    table = comparison.markdown(result)
    assert "| lam=0 | 3 | 70.0 | 24.8 | +1.3 | 1.4 | open | 1.00 |" in table


def test_other_seeds_are_not_paired_and_one_seed_has_no_interval():
    ours, theirs = {0: 60.0, 1: 70.0, 2: 80.0}, {3: 10.0, 4: 12.0, 5: 11.0}
    row = comparison.difference(ours, theirs, Design(1, 3))
    test = stats.ttest_ind(list(ours.values()), list(theirs.values()), equal_var=False)
    low, high = test.confidence_interval(0.95)
    assert (row["difference"], row["paired_seeds"], row["verdict"]) == (59, 0, "better")
    assert row["difference_ci95"] == pytest.approx((high - low) / 2)
    more = comparison.difference(ours, theirs, Design(10, 3))
    assert more["difference_ci95"] > 1.5 * row["difference_ci95"]
    row = comparison.difference({0: 1.0}, {0: 2.0}, Design(1, 3))
    assert (row["difference"], row["difference_ci95"], row["verdict"]) == (-1.0, None, "open")
    assert comparison.interval([3.0]) == (3.0, None)


def test_runs_that_share_no_metric_are_not_compared():
    runs = [record("a", 0, 1.0, 0), record("b", 0, 1.0, 1)]
    runs[1] = replace(runs[1], metrics={"final/mIoU": 40.0})
    with pytest.raises(PipelineError, match=r"run b \(b\) has no metric top1"):
        comparison.compare(runs, "top1")
    with pytest.raises(PipelineError, match="no finished runs"):
        comparison.compare([], "top1")
