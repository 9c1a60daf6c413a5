"""The spaces of several systems as one: ``system`` is drawn first, then a point of that system's own space.

A point carries its system beside the system's values, under the values' own names, so that runs of all systems can be
searched by them. The sampler knows each value under ``<system>.<name>``: two systems may mean different ranges by one
name, and what one learns from must not steer the other. Recipes are called ``<system>-<recipe>``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from search_spaces.axes import Options, Range, Trial
from trainables.settings import Scalar

if TYPE_CHECKING:
    from search_spaces import Space

SYSTEM = "system"


def recipe_name(system: str, recipe: str) -> str:
    """A recipe's name in a study of several systems."""
    return f"{system}-{recipe}"


def named(params: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """A point under the names that the sampler knows; one of a single system's space as it is."""
    system = params.get(SYSTEM)
    return {k if system is None or k == SYSTEM else f"{system}.{k}": v for k, v in params.items()}


class Joint:
    """What a system's module has, for several: see ``search_spaces.Space``."""

    def __init__(self, spaces: Mapping[str, Space]) -> None:
        self._spaces = spaces
        self.PAPER = recipe_name(next(iter(spaces)), next(iter(spaces.values())).PAPER)
        self.RECIPES: dict[str, dict[str, Scalar]] = {
            recipe_name(system, name): {SYSTEM: system, **params}
            for system, space in spaces.items()
            for name, params in space.RECIPES.items()
        }
        self.BRANCHES: dict[str, dict[str, tuple[str, ...]]] = {SYSTEM: dict.fromkeys(spaces, ())}
        self.AXES: dict[str, Range | Options] = {SYSTEM: Options(tuple(spaces), "which system is trained")}
        for system, space in spaces.items():
            self.AXES |= {f"{system}.{name}": axis for name, axis in space.AXES.items()}
            for key, kinds in space.BRANCHES.items():
                self.BRANCHES.setdefault(key, {}).update(kinds)
        self.CHOICES = {name: axis.words for name, axis in self.AXES.items()}

    def space(self, trial: Trial) -> dict[str, Scalar]:
        """One point: the system, and all that its own space draws."""
        system = trial.suggest_categorical(SYSTEM, tuple(self._spaces))
        return {SYSTEM: system, **self._spaces[system].space(_Prefixed(trial, system))}

    def describe(self, params: Mapping[str, Scalar]) -> str:
        """A short label: the system, then its kinds."""
        return f"{params[SYSTEM]}: {self._spaces[str(params[SYSTEM])].describe(params)}"

    def explain(self, params: Mapping[str, Scalar]) -> str:
        """All choices of a trial in words, for reports."""
        return f"{params[SYSTEM]}; {self._spaces[str(params[SYSTEM])].explain(params)}"


class _Prefixed:
    """A trial that asks for a system's values under the system's name."""

    def __init__(self, trial: Trial, system: str) -> None:
        self._trial, self._system = trial, system

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return self._trial.suggest_float(f"{self._system}.{name}", low, high, log=log)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._trial.suggest_categorical(f"{self._system}.{name}", choices)
