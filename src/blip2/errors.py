"""Errors that a user can act on: one line each, shown without a traceback, exit code 2."""

import re
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


def one_line(text: str) -> str:
    """A message in which line ends and control characters, of file names above all, are written as escapes."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda match: repr(match[0])[1:-1], text)


@contextmanager
def os_error_as(kind: type[Blip2Error], what: str) -> Iterator[None]:
    """Turn an `OSError` of the block into an error of this kind: `what: reason`."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {error.strerror or error}") from error
