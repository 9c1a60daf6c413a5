"""Events on disk: what survives a crash, a full disk and a second reader."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from study.spool import Spool
from trainables.files import write_atomically


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


def filled(path: Path, reader: str = "a") -> Spool:
    spool = Spool(path, reader)
    for number in range(5):
        spool.append({"number": number, "text": "x" * 100})
    while item := spool.next():
        spool.take(item[1])
    return spool


def numbers(spool: Spool) -> list[int]:
    return [event["number"] for event, _ in spool._read(0)]


def test_what_everybody_has_is_summed_up(tmp_path: Path) -> None:
    spool = filled(tmp_path)
    assert spool.compact({"number": -1})
    assert numbers(spool) == [-1]
    spool.append({"number": 5})
    again = Spool(tmp_path, "a")
    assert [event["number"] for event in again.taken()] == [-1]
    assert again.next() == ({"number": 5}, again.size_bytes())
    assert Spool(tmp_path, "b").num_waiting() == 2


def test_what_somebody_lacks_stays(tmp_path: Path) -> None:
    spool = filled(tmp_path)
    spool.append({"number": 5})
    assert not spool.compact({"number": -1})  # not yet read
    spool.take(spool.size_bytes())
    other = Spool(tmp_path, "b")
    other.take(0)
    assert not spool.compact({"number": -1})
    while item := other.next():
        other.take(item[1])
    spool.refuse({"number": 5}, "no")
    assert not spool.compact({"number": -1})
    spool.retry_refused()
    assert numbers(spool) == [0, 1, 2, 3, 4, 5, 5]


@pytest.mark.parametrize("crash", [0, 1])
def test_a_crash_while_summing_up_delivers_everything_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: int
) -> None:
    """Before the cursors have moved, and between them and the events."""
    spool, written = filled(tmp_path), 0

    def write(path: Path, content: str | bytes) -> None:
        nonlocal written
        written += 1
        if written > crash:
            raise OSError(28, "No space left on device")
        write_atomically(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("study.spool.write_atomically", write)
        with pytest.raises(OSError, match="No space"):
            spool.compact({"number": -1, "text": "y" * 50})
    again = Spool(tmp_path, "a")
    assert again.num_waiting() == (5 if crash else 0)
    assert numbers(again) == [0, 1, 2, 3, 4]
    assert again.num_waiting() == Spool(tmp_path, "a").num_waiting()


def test_a_cursor_behind_the_end_is_put_right_before_the_file_grows(tmp_path: Path) -> None:
    filled(tmp_path)
    events = tmp_path / "events.jsonl"
    events.write_bytes(events.read_bytes().splitlines(keepends=True)[0])
    other = Spool(tmp_path, "b")
    for number in range(1, 100):
        other.append({"number": number})
    assert Spool(tmp_path, "a").num_waiting() == 100
