"""Folders for the tests on real clusters."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project as a user has it, installed nowhere."""
    folder = tmp_path_factory.mktemp("project") / "checkout"
    for package in ("study", "trainables", "search_spaces", "cluster"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore", "Makefile", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """A folder with a path short enough for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield folder
    deadline = time.monotonic() + 20
    while folder.exists() and time.monotonic() < deadline:  # processes that end late still write
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.2)
