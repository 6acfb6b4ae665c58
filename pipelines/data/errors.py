"""The error of a data set."""

from pipelines.errors import PipelineError


class DataError(PipelineError, ValueError):
    """A data set that is missing, incomplete or not what it should be."""
