"""How a setting is refused: one line that names it, its value and what is allowed."""

from __future__ import annotations

from typing import Any

from blip2.errors import ConfigError


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Raise unless `condition` holds.

    Raises:
        ConfigError: `name` is `value`: it must be `allowed`.
    """
    if not condition:
        raise ConfigError(f"{name} is {value!r}: it must be {allowed}")
