"""What is written on a disk that is full, then read-only, then has room: ``python full_disk.py FOLDER``, in a mount
namespace of its own. Used by test_disks.py."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from study.folder import StudyFolder
from study.spool import Spool
from trainables.cache import make_all
from trainables.checkpoint import load_checkpoint, save_checkpoint
from trainables.errors import UserError
from trainables.files import no_room, write_atomically


def mount(disk: Path, *options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(disk)], check=True)


def refused(write: Callable[[], object]) -> None:
    found: BaseException | None = None
    try:
        write()
    except (OSError, UserError) as error:
        found = error
    assert no_room(found), repr(found)


def record(epoch: int) -> dict[str, object]:
    return {"epoch": epoch, "epochs": 9, "done": False, "metrics": {"official": 50.0 + epoch}}


def state(disk: Path) -> tuple[object, ...]:
    """What readers see."""
    folder, spool = StudyFolder(disk / "study"), Spool(disk / "study" / "spool", "mlflow")
    with warnings.catch_warnings(action="error"):
        kept = load_checkpoint(folder.checkpoint_path("t0000"))
    assert kept is not None
    return (
        kept[1]["epoch"],
        [r["epoch"] for r in folder.records("t0000")],
        folder.job("t0000"),
        spool.num_waiting(),
    )


def main(disk: Path) -> None:
    mount(disk, "size=1m")
    folder, cache = StudyFolder(disk / "study"), disk / "cache" / "targets-0.npy"
    checkpoints = folder.checkpoint_path("t0000")
    spool = Spool(folder.path / "spool", "mlflow")
    folder.write_job({"id": "t0000", "role": "trial", "params": {"x": 0.5}})
    folder.append_record("t0000", record(1))
    spool.append({"kind": "table", "id": "t0000"})
    save_checkpoint(checkpoints, 1, {"w": torch.ones(1000)}, {})
    before = state(disk)

    writes: list[Callable[[], object]] = [
        lambda: save_checkpoint(checkpoints, 2, {"w": torch.ones(200_000)}, {}),
        lambda: folder.append_record("t0000", record(2) | {"pad": "x" * 200_000}),
        lambda: folder.write_job({"id": "t0000", "role": "trial", "params": {}, "pad": "x" * 200_000}),
        lambda: folder.write_result("t0000", {"state": "finished", "metrics": {}, "pad": "x" * 200_000}),
        lambda: spool.append({"kind": "table", "id": "x" * 200_000}),
        lambda: make_all({cache: lambda: (1, [np.ones((1, 100_000))])}),
        lambda: write_atomically(disk / "findings.md", "x" * 200_000),
    ]
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    for write in writes:
        refused(write)
        assert state(disk) == before
        assert not list(disk.rglob("*.partial")), "half a file was left"
        assert not cache.exists()
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for write in writes[:1] + writes[2:4]:
        refused(write)
    subprocess.run(["mount", "-o", "remount,rw,size=20m", str(disk)], check=True)
    assert state(disk) == before
    for write in writes:
        write()
    folder.append_record("t0000", record(3))
    kept, told, *_ = state(disk)
    assert kept == 2
    assert told == [1, 2, 3]
    print(json.dumps("all kept"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
