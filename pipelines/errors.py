"""The error that a user is meant to read."""


class PipelineError(Exception):
    """What is wrong, where, and how to mend it, in one message.

    The stages print it without a traceback and exit with code 1.
    """
