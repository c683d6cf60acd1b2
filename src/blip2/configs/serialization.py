"""Configurations as nested plain dicts, as YAML and JSON hold them, and back."""

from __future__ import annotations

import contextlib
import dataclasses
from types import UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

from blip2.errors import ConfigError


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict of a config, ready for YAML or JSON (tuples become lists)."""
    return _plain(dataclasses.asdict(config))


def from_dict(kind: type[Any], values: dict[str, Any], where: str = "config") -> Any:
    """Build config class `kind` from a nested dict, as YAML or JSON give it.

    Raises:
        ConfigError: an unknown key, a value of another type, or one that the class refuses; `where`
            names the file.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: not a group of settings")
    hints = get_type_hints(kind)
    unknown = sorted(set(map(str, values)) - set(hints))
    if unknown:
        raise ConfigError(f"{where}: unknown setting {unknown[0]!r}; known: {', '.join(hints)}")
    return kind(**{name: _read(hints[name], value, f"{where}: {name}") for name, value in values.items()})


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _read(hint: Any, value: Any, where: str) -> Any:
    """A plain value as the type of its setting; YAML reads 3e-4 as a text, which is a number here."""
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return from_dict(cast(type, hint), value, where)
        raise ConfigError(f"{where} is {value!r}: it must be a group of settings")
    if isinstance(hint, UnionType):
        if value is None:
            return None
        hint = get_args(hint)[0]
    if get_origin(hint) is tuple:
        if isinstance(value, list | tuple) and len(value) == len(get_args(hint)):
            return tuple(_read(part, x, where) for part, x in zip(get_args(hint), value, strict=True))
        raise ConfigError(f"{where} is {value!r}: it must be a list of {len(get_args(hint))} numbers")
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)
    elif type(value) is hint:
        return value
    raise ConfigError(f"{where} is {value!r}: it must be {_WORDS[hint]}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value
