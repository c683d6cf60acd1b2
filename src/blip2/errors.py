"""Errors that a user can act on: one line each, shown without a traceback, exit code 2."""

from collections.abc import Iterator
from contextlib import contextmanager


class Blip2Error(Exception):
    """Base of every error whose message is written for the user."""


class ConfigError(Blip2Error):
    """A setting that cannot be used; the message names it, its value and what is allowed."""


class DataError(Blip2Error):
    """Data that cannot be read; the message names the file and the cause."""


class CheckpointError(Blip2Error):
    """A checkpoint or run folder that cannot be loaded or written."""


class RunError(Blip2Error):
    """A run that cannot go on (non-finite loss, vanished data, full disk)."""


@contextmanager
def os_error_as(kind: type[Blip2Error], what: str) -> Iterator[None]:
    """Turn an `OSError` of the block into an error of this kind: `what: reason`."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {error.strerror or error}") from error
