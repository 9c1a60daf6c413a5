"""Events on disk: what survives a crash, a full disk and a second reader."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from study.spool import Spool


def test_spool_survives_a_line_cut_short(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "a")
    for number in range(3):
        spool.append({"number": number})
    item = spool.next()
    assert item is not None
    spool.take(item[1])
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"number": 3, "cut')
    spool = Spool(tmp_path, "a")
    spool.append({"number": 4})
    assert [event["number"] for event in spool.taken()] == [0]
    seen = []
    while item := spool.next():
        seen.append(item[0]["number"])
        spool.take(item[1])
    assert seen == [1, 2, 4]
    assert spool.num_waiting() == 0
    assert Spool(tmp_path, "b").num_waiting() == 4


def test_spool_on_a_full_disk_keeps_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path, "a")
    spool.append({"number": 0})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            spool.append({"number": 1})
    spool.append({"number": 2})
    assert [event["number"] for event, _ in spool._read(0)] == [0, 2]
