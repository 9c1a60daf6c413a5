"""Which code made a study's numbers: known in a checkout, and comparable in a copy without git."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from study import provenance


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What ``ray job submit`` uploads, within a checkout of something else."""
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    for package in provenance.PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "*.png")
        shutil.copytree(provenance.ROOT / package, tmp_path / "copy" / package, ignore=ignored)
    return tmp_path / "copy"


def test_a_copy_has_no_commit_and_the_source_of_its_checkout(copy: Path) -> None:
    assert provenance.commit(copy) == "unknown"
    assert provenance.source(copy) == provenance.source()


@pytest.mark.parametrize("name", ["trainables/loop.py", "trainables/encoders/weights/tiny.safetensors"])
def test_a_changed_file_is_another_source(copy: Path, name: str) -> None:
    before = provenance.source(copy)
    with open(copy / name, "ab") as file:
        file.write(b" ")
    assert provenance.source(copy) != before


def test_a_moved_file_is_another_source(copy: Path) -> None:
    before = provenance.source(copy)
    (copy / "study" / "outlet.py").rename(copy / "study" / "drain.py")
    assert provenance.source(copy) != before


def test_a_commit_is_marked_when_files_differ_from_it(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        who = ["-c", "user.name=one", "-c", "user.email=one@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True)

    git("init", "--quiet")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "--quiet", "-m", "first")
    clean = provenance.commit(tmp_path)
    assert len(clean) == 12
    (tmp_path / "file").write_text("b")
    assert provenance.commit(tmp_path) == f"{clean}-dirty"
