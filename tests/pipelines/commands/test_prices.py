"""Prices come from a dated file; what it lacks is told."""

from datetime import date
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipelines.cli import main
from pipelines.commands.prices import FILE, apply_prices, rates_of, read_prices
from pipelines.errors import PipelineError
from pipelines.train.cost import PEAK_FLOPS

OWN = """\
currency: EUR
instances:
  mine: {gpu: l4, gpus: 4, on_demand: {price: 8, region: here, date: 2026-01-31, source: the shop}}
carbon: [{year: 2025, source: the grid, regions: {here: 400, there: 20}}]
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own.yaml"
    file.write_text(OWN)
    return file


def options(**given) -> dict:
    none = {"instance": None, "spot": False, "region": None, "prices": None}
    return {**none, "gpu": "", "price": 0.0, "watts": 0.0, "carbon": 0.0, **given}


def test_each_shipped_price_has_its_source_and_a_gpu_that_is_known() -> None:
    prices = read_prices(FILE)
    assert prices.instances
    for instance in prices.instances.values():
        assert instance.gpu in PEAK_FLOPS
        for price in filter(None, (instance.on_demand, instance.spot)):
            assert price.source
            assert price.date > date(2025, 1, 1)
    # What cluster.yaml starts.
    assert "g6.12xlarge" in prices.instances


def test_a_gpu_costs_its_share_of_the_instance_and_old_prices_are_told(own: Path) -> None:
    rates = rates_of("mine", False, None, own, date(2026, 2, 10))
    assert (rates.gpu, rates.price, rates.carbon) == ("l4", 2.0, 400)
    assert rates.notes[0] == "mine on demand: 8 EUR/h in here on 2026-01-31 (the shop)"
    assert rates_of("mine", False, "there", own, date(2026, 2, 10)).carbon == 20
    assert "334 days old" in rates_of("mine", False, None, own, date(2026, 12, 31)).notes[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"instance": "yours"}, r"--instance yours is not in own.yaml. Choose one of mine, or add"),
        ({"instance": "mine", "spot": True}, "own.yaml has no spot price of mine. Add the day's"),
        ({"instance": "mine", "region": "x"}, "--region x has no carbon intensity. Choose one of"),
        ({"instance": "mine", "price": 2.0}, "--instance and --price say the same"),
        ({"instance": "mine", "gpu": "t4"}, "--instance and --gpu say the same"),
        ({"region": "here", "carbon": 5.0}, "--region and --carbon say the same"),
        ({"spot": True}, "--spot is of an instance. Name it with --instance"),
    ],
)
def test_what_does_not_fit_is_one_message(own: Path, given: dict, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        apply_prices(options(prices=own, **given))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("currency: [", "is not YAML"),
        (OWN.replace("gpus: 4", "gpus: 0"), "instances.mine.gpus: Input should be greater"),
        (OWN.replace("date: 2026-01-31, ", ""), "instances.mine.on_demand.date: Field required"),
        (OWN + "more: 1\n", "more: Extra inputs are not permitted"),
    ],
)
def test_a_broken_file_is_told_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(PipelineError, match=message):
        read_prices(file)


def test_a_file_that_is_not_there_is_told_by_the_command(tmp_path: Path) -> None:
    words = ["plan", "recipe=demo", "--instance", "x", "--prices", str(tmp_path / "no.yaml")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code
    assert "No such file" in str(done.exception or done.output)
