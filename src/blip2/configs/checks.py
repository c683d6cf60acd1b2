"""How a setting is refused: one line that names it, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from blip2.errors import ConfigError


@dataclass(frozen=True)
class Rule:
    """What a value must be, as a test and in words. None, where a setting may be it, meets every rule."""

    holds: Callable[[Any], bool]
    allowed: str


POSITIVE = Rule(lambda value: value > 0, "positive")
BELOW_ONE = Rule(lambda value: 0 <= value < 1, "in [0, 1)")
UP_TO_ONE = Rule(lambda value: 0 < value <= 1, "in (0, 1]")


def at_least(least: int) -> Rule:
    return Rule(lambda value: value >= least, f"{least} or more")


def one_of(names: Sequence[str], *, null: bool = False) -> Rule:
    return Rule(lambda value: value in names, f"one of {', '.join(names)}" + (", or null" if null else ""))


def given(what: str) -> Rule:
    return Rule(bool, what)


def check(config: object, group: str = "", **rules: Rule) -> None:
    """Hold the settings of a config to their rules; `group` is what stands before their names.

    Raises:
        ConfigError: `group` and the setting's name, its value and what it must be.
    """
    for name, rule in rules.items():
        value = getattr(config, name)
        require(value is None or rule.holds(value), group + name, value, rule.allowed)


def require(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Raise unless `condition` holds.

    Raises:
        ConfigError: `name` is `value`: it must be `allowed`.
    """
    if not condition:
        raise ConfigError(f"{name} is {value!r}: it must be {allowed}")
