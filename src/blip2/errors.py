"""Errors that a user can act on: one line each, shown without a traceback, exit code 2."""


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
