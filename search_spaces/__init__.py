"""One define-by-run search space per system, with its published recipes; and the spaces of several systems as one.

A system is a module of this package and a module of the same name in ``trainables``; both are found by being there.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import trainables
from trainables.errors import UserError

if TYPE_CHECKING:
    from search_spaces.axes import Axes, Branches, Trial
    from trainables.settings import Scalar


def _names(package: list[str]) -> set[str]:
    return {module.name for module in pkgutil.iter_modules(package)}


SYSTEMS = tuple(sorted(_names(__path__) & _names(trainables.__path__)))


class Space(Protocol):
    """What a system's module here has. ``PAPER`` is the published setting's name among ``RECIPES``."""

    @property
    def PAPER(self) -> str: ...

    @property
    def RECIPES(self) -> Mapping[str, Mapping[str, Scalar]]: ...

    @property
    def BRANCHES(self) -> Branches: ...

    @property
    def AXES(self) -> Axes: ...

    @property
    def CHOICES(self) -> Mapping[str, str]: ...

    def space(self, trial: Trial) -> dict[str, Scalar]: ...

    def describe(self, params: Mapping[str, Scalar]) -> str: ...

    def explain(self, params: Mapping[str, Scalar]) -> str: ...


def systems_of(text: str) -> tuple[str, ...]:
    """The systems that a setting names: ``adapt``, or several as in ``[retain, adapt]``, each once and sorted."""
    names = (part.strip(" '\"") for part in text.strip("[]() ").split(","))
    return tuple(sorted({name for name in names if name}))


def papers(system: str) -> list[str]:
    """The recipes that are a paper's own setting: one for each system."""
    names = systems_of(system)
    if len(names) == 1:
        return [load(system).PAPER]
    from search_spaces.joint import recipe_name

    return [recipe_name(name, load(name).PAPER) for name in names]


def load(system: str) -> Space:
    """The search space of a system, or of several between commas. Raises UserError listing the systems there are."""
    names = systems_of(system)
    if not names or not set(names) <= set(SYSTEMS):
        raise UserError(
            f"system = {system!r}: allowed are {', '.join(SYSTEMS)}, or several as in [{SYSTEMS[0]},...]"
        )
    spaces: dict[str, Space] = {name: importlib.import_module(f"search_spaces.{name}") for name in names}
    if len(spaces) == 1:
        return spaces[names[0]]
    from search_spaces.joint import Joint

    return Joint(spaces)
