"""The rules of the house that a reader should be able to rely on: who imports whom, and how long a file gets."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("study", "search_spaces", "trainables")
MODULES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
MOST_LINES = 400

ENGINES = {"ray", "optuna", "mlflow"}
FORBIDDEN = {
    "trainables": ENGINES | {"study", "search_spaces", "tests"},
    "search_spaces": ENGINES | {"study", "tests", "torch", "numpy"},
    "study": {"tests"},
}


def imports(tree: ast.AST, *, typing_only: bool = False) -> set[str]:
    """Top-level packages that a module imports anywhere; without those under ``if TYPE_CHECKING`` unless asked."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing_only:
            found |= {name for other in node.orelse for name in imports(ast.Module([other], []))}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            found.add((node.module or "").split(".")[0])
        else:
            found |= imports(node, typing_only=typing_only)
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    tree = ast.parse(path.read_text())
    package = path.relative_to(ROOT).parts[0]
    assert not imports(tree) & FORBIDDEN[package]
    if package == "trainables":
        assert not imports(tree, typing_only=True) & FORBIDDEN[package]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_says_what_it_is_and_stays_short(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no docstring at its head"
    assert len(text.splitlines()) <= MOST_LINES, "split it"


def test_packages_are_at_most_one_level_deep() -> None:
    assert [name_of(p) for p in MODULES if len(p.relative_to(ROOT).parts) > 3] == []


def test_the_import_check_sees_through_functions_and_type_checking() -> None:
    tree = ast.parse(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import optuna\nelse:\n    import mlflow.tracking\n"
        "def f():\n    import ray.tune\n"
    )
    assert imports(tree) == {"typing", "mlflow", "ray"}
    assert imports(tree, typing_only=True) == {"typing", "optuna", "mlflow", "ray"}


def test_only_the_driver_writes_to_mlflow_and_optuna() -> None:
    """What runs on other nodes never reaches a store, so a SQLite file on the driver's disk serves a cluster too."""
    reached, waiting = set[str](), ["study.slots", "study.worker"]
    while waiting:
        module = waiting.pop()
        path = ROOT / f"{module.replace('.', '/')}.py"
        if module in reached or not path.exists():
            continue
        reached.add(module)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module not in (None, "study.config"):  # a type alone
                waiting += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
    assert {"study.control", "study.pristine", "trainables.settings"} <= reached, "the search follows imports"
    for module in reached:
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
        assert not imports(tree) & {"mlflow", "optuna"}, module
    assert not {name for name in reached if name.startswith(("study.track", "study.mirror", "study.search"))}
