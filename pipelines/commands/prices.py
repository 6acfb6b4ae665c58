"""What an hour of a machine costs and a kWh emits, by a file that a user may edit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipelines.errors import PipelineError
from pipelines.paths import ROOT
from pipelines.schema.values import Section

FILE = ROOT / "pipelines/cluster/prices.yaml"
OLD_DAYS = 180
"""From this age on a price is told to be old."""


class Price(Section):
    """Of an instance for an hour."""

    price: Annotated[float, Field(gt=0)]
    region: str
    date: date
    source: str


class Instance(Section):
    """A machine that a provider lends."""

    gpu: str
    """A key of `PEAK_FLOPS`."""
    gpus: Annotated[int, Field(ge=1)]
    on_demand: Price | None = None
    spot: Price | None = None


class Grid(Section):
    """Grams of CO2 equivalent per kWh, by region."""

    year: int
    source: str
    regions: dict[str, Annotated[float, Field(ge=0)]]


class Prices(Section):
    """The whole file."""

    currency: str
    instances: dict[str, Instance]
    carbon: list[Grid]


@dataclass(frozen=True)
class Rates:
    """What a plan calculates with."""

    gpu: str
    price: float
    """Of one GPU with its share of the machine, per hour; 0: unknown."""
    carbon: float
    """Grams of CO2 per kWh; 0: unknown."""
    watts: float = 0.0
    """Of a worker; 0: unknown, or that of the GPU."""
    notes: Sequence[str] = ()
    """Where the numbers are from."""


def read_prices(file: Path) -> Prices:
    """The file's content.

    Raises:
        PipelineError: it is not there, or not of this form.
    """
    try:
        return Prices.model_validate(YAML(typ="safe").load(file.read_text()))
    except OSError as error:
        raise PipelineError(f"--prices {file}: {error.strerror}") from None
    except YAMLError as error:
        raise PipelineError(f"--prices {file} is not YAML: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise PipelineError(
            f"--prices {file}: {where}: {first['msg']}", f"Write it as in {FILE.relative_to(ROOT)}"
        ) from None


def rates_of(instance: str, spot: bool, region: str | None, file: Path, today: date) -> Rates:
    """The rates of an instance.

    Args:
        region: whose grid counts; None: the price's.
        today: to tell old prices.

    Raises:
        PipelineError: the file lacks the instance, its price or the region.
    """
    prices = read_prices(file)
    found = prices.instances.get(instance)
    if found is None:
        raise PipelineError(
            f"--instance {instance} is not in {file.name}",
            f"Choose one of {', '.join(prices.instances)}, or add it with its price",
        )
    kind = "spot" if spot else "on_demand"
    price = found.spot if spot else found.on_demand
    if price is None:
        raise PipelineError(
            f"{file.name} has no {kind} price of {instance}", "Add the day's, with date and source"
        )
    age = (today - price.date).days
    notes = [
        f"{instance} {kind.replace('_', ' ')}: {price.price:g} {prices.currency}/h in"
        f" {price.region} on {price.date} ({price.source})"
        + (f"; {age} days old: look the day's up" if age > OLD_DAYS else "")
    ]
    carbon, note = carbon_of(prices, region or price.region, region is not None)
    return Rates(found.gpu, price.price / found.gpus, carbon, notes=[*notes, note])


def carbon_of(prices: Prices, region: str, asked: bool) -> tuple[float, str]:
    """Grams of CO2 per kWh in a region, and where that is from; 0 where it is not known.

    Raises:
        PipelineError: the region was `asked` for, and the file lacks it.
    """
    for grid in prices.carbon:
        if region in grid.regions:
            grams = grid.regions[region]
            return grams, f"{region}: {grams:g} g CO2/kWh on average in {grid.year} ({grid.source})"
    if asked:
        known = sorted(name for grid in prices.carbon for name in grid.regions)
        raise PipelineError(
            f"--region {region} has no carbon intensity", f"Choose one of {', '.join(known)}"
        )
    return 0.0, f"{region}: carbon intensity not known"


def apply_prices(given: Mapping[str, Any]) -> Rates:
    """The rates that the options of `elsa plan` ask for.

    Raises:
        PipelineError: options that exclude each other, or that the file of prices lacks.
    """
    price, carbon, file = given["price"], given["carbon"], given["prices"] or FILE
    if not given["instance"]:
        for option in ("spot",) if given["region"] else ("spot", "prices"):
            if given[option]:
                raise PipelineError(f"--{option} is of an instance", "Name it with --instance")
        notes = []
        if given["region"]:
            if carbon:
                raise PipelineError("--region and --carbon say the same", "Give one of them")
            carbon, note = carbon_of(read_prices(file), given["region"], asked=True)
            notes.append(note)
        return Rates(given["gpu"], price, carbon, given["watts"], notes)
    for option in ("price", "gpu"):
        if given[option]:
            raise PipelineError(f"--instance and --{option} say the same", "Give one of them")
    today = datetime.now(UTC).date()
    found = rates_of(given["instance"], given["spot"], given["region"], file, today)
    return replace(found, carbon=carbon or found.carbon, watts=given["watts"])
