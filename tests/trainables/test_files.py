"""Whole or not at all, and one writer at a time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainables.files import content_digest, exclusive, write_atomically

ROOT = Path(__file__).resolve().parents[2]


def test_writes_text_and_bytes_and_makes_the_folder(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_atomically(path, "tür")
    assert path.read_text(encoding="utf-8") == "tür"
    write_atomically(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_a_failure_keeps_the_old_content_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_atomically(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


HOLD = """
import sys
from pathlib import Path
from trainables.files import exclusive
with exclusive(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    sys.stdin.readline()
"""


def test_a_lock_is_seen_by_other_processes_and_dies_with_its_holder(tmp_path):
    path = tmp_path / "deep" / "thing"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "True\n"
        with exclusive(path, wait=False) as mine:
            assert not mine
    finally:
        holder.kill()
        holder.communicate()
    with exclusive(path) as mine:
        assert mine
        with exclusive(path, wait=False) as again:
            assert not again


def test_an_error_inside_frees_the_lock(tmp_path):
    with pytest.raises(RuntimeError), exclusive(tmp_path / "a"):
        raise RuntimeError
    with exclusive(tmp_path / "a", wait=False) as mine:
        assert mine


def test_the_digest_of_a_file_is_of_its_content(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.write_bytes(b"abc")
    assert content_digest(one) == content_digest(other) == hashlib.sha256(b"abc").hexdigest()
    one.write_bytes(b"abcd")
    assert content_digest(one) != content_digest(other)
