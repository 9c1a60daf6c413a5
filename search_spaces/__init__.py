"""One define-by-run search space per system, with its published recipes."""

from __future__ import annotations

import importlib
from types import ModuleType

from trainables.errors import UserError

SYSTEMS = ("retain", "adapt", "identify")


def load(system: str) -> ModuleType:
    """The module of a system's search space. Raises UserError listing the systems there are."""
    if system not in SYSTEMS:
        raise UserError(f"system = {system!r}: allowed are {', '.join(SYSTEMS)}")
    return importlib.import_module(f"search_spaces.{system}")
