"""What is freed stays with the process: batches of the same size cost no new pages."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

COUNT = """
import resource
import sys

import numpy as np

from trainables.heap import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory() and keep_freed_memory()
for _ in range(100):
    parts = [np.ones(1_000_000, np.float32) for _ in range(8)]
    del parts
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def faults(root: Path, how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", COUNT, how], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc's allocator")
def test_pages_are_taken_once(root: Path) -> None:
    assert faults(root, "kept") + 50_000 < faults(root, "as it is")
