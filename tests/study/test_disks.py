"""Disks that are full or read-only: nothing is corrupted, no trial is judged, and the same command goes on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from study import cluster, run
from study.agenda import StudyFailed
from tests.study.test_agenda import fail, open_agenda, play
from trainables.errors import UserError
from trainables.files import NO_ROOM, no_room

HERE = Path(__file__).parent


def test_a_real_disk_that_is_full_then_read_only_then_has_room(root: Path, tmp_path: Path) -> None:
    isolated = ["unshare", "--mount", "--map-root-user"]
    if subprocess.run(
        [*isolated, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True, check=False
    ).returncode:
        pytest.skip("no file system can be mounted here, not even in a namespace of its own")
    done = subprocess.run(
        [*isolated, sys.executable, str(HERE / "full_disk.py"), str(tmp_path)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "all kept" in done.stdout


@pytest.mark.parametrize("number", NO_ROOM)
def test_a_job_without_room_is_not_judged_and_runs_again(number: int, tmp_path: Path) -> None:
    first = {"id": "b-teacher", "role": "baseline", "params": {}, "baseline": "teacher"}
    reason = f"OSError: [Errno {number}] {os.strerror(number)}: 'epoch-0001.safetensors'"
    agenda = open_agenda(tmp_path, trials=3, before_search=[first])
    assert agenda.next()["id"] == "t0000"
    with pytest.raises(StudyFailed, match="Make room"):
        fail(agenda, agenda.next(), reason)
    again = open_agenda(tmp_path, trials=3, before_search=[first])
    trial, job = again.next(), again.next()
    assert (trial["id"], job) == ("t0000", first)
    play(again, trial)
    play(again, job)
    job = again.next()
    with pytest.raises(StudyFailed, match=r"t0001: .*give the same command again"):
        fail(again, job, f"/cache: cannot hold targets-0.npy ({os.strerror(number)}); free space")
    with pytest.raises(StudyFailed):
        again.lost(job["id"], f"workers lost after 3 s: {reason}")
    assert again.folder.result(job["id"]) is None
    mended = open_agenda(tmp_path, trials=3, before_search=[first])
    jobs = []
    while job := mended.next():
        jobs.append(job["id"])
        play(mended, job)
    assert jobs == ["t0001", "t0002"]


def test_the_driver_s_own_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any) -> None:
        raise RuntimeError("while writing " * 99) from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run, "run", full)
    assert run.main(["--storage", str(tmp_path), "--name", "mine"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: cannot write (")
    assert said.count("\n") == 1
    assert len(said) < 500
    assert "give the same command again" in said


def test_other_errors_of_files_are_no_want_of_room() -> None:
    assert not no_room(PermissionError(errno.EACCES, "Permission denied"))
    assert not no_room(None)


def test_ray_is_not_started_on_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster._require_room()
    monkeypatch.setattr(cluster, "TEMP_BYTES", 1 << 60)
    with pytest.raises(UserError, match=r"Ray's temporary files need .*RAY_TMPDIR"):
        cluster._require_room()
