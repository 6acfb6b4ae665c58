"""The error of a data set."""

from pydantic import ValidationError

from pipelines.errors import PipelineError


class DataError(PipelineError, ValueError):
    """A data set that is missing, incomplete or not what it should be."""


def brief(error: Exception) -> str:
    """What an error says, on one line: of pydantic's the first three faults."""
    if not isinstance(error, ValidationError):
        return str(error)
    faults = error.errors(include_url=False)
    places = (".".join(map(str, fault["loc"])) or "the whole" for fault in faults)
    told = (f"{place}: {fault['msg']}" for place, fault in zip(places, faults, strict=True))
    return "; ".join(list(told)[:3])
