"""Reads the sampled values of a trial: flat names and JSON scalars, a kind and its values per family.

A family (lambda schedules, SNR curricula, loss weightings) lists its kinds as a table of rules; ``read_kind``
checks the values of that family against it and leaves every other family's values alone. A value that does
not fit never reaches training: it is refused with a ``UserError`` that names key, value and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainables.errors import UserError
from trainables.settings import Scalar


@dataclass(frozen=True)
class Number:
    """A finite number from ``low`` to ``high``; ``low`` itself is excluded if ``above``."""

    low: float
    high: float
    above: bool = False

    def read(self, key: str, value: Scalar) -> float:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not fits or not self.low <= value <= self.high or (self.above and value == self.low):  # type: ignore[operator]
            least = f"above {self.low:g}" if self.above else f"from {self.low:g}"
            raise UserError(f"{key} = {value!r}: allowed is a number {least} to {self.high:g}")
        return float(value)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Choice:
    """One of ``options``."""

    options: tuple[str, ...]

    def read(self, key: str, value: Scalar) -> str:
        if value not in self.options:
            raise UserError(f"{key} = {value!r}: allowed are {', '.join(self.options)}")
        return str(value)


Rule = Number | Choice
Kinds = Mapping[str, Mapping[str, Rule]]


def read_kind(
    params: Mapping[str, Scalar], kind_key: str, kinds: Kinds, prefixes: tuple[str, ...]
) -> tuple[str, dict[str, Any]]:
    """The kind that ``params[kind_key]`` names, and its checked values.

    Args:
        params: all values of a trial; those of other families are not looked at.
        kinds: the rules of each kind's values, by name.
        prefixes: names with one of these beginnings belong to this family.

    Raises:
        UserError: an unknown or missing kind; a value that is missing, breaks its rule, or belongs to this
            family but not to this kind.
    """
    if kind_key not in params:
        raise UserError(f"{kind_key}: missing; allowed are {', '.join(kinds)}")
    kind = Choice(tuple(kinds)).read(kind_key, params[kind_key])
    rules = kinds[kind]
    needed = ", ".join(rules) or "no further value"
    for key, value in params.items():
        if key.startswith(prefixes) and key != kind_key and key not in rules:
            raise UserError(
                f"{key} = {value!r}: not a value of {kind_key} = {kind!r}, which takes {needed}; remove it"
            )
    for key in rules:
        if key not in params:
            raise UserError(f"{key}: missing; {kind_key} = {kind!r} takes {needed}")
    return kind, {key: rule.read(key, params[key]) for key, rule in rules.items()}
