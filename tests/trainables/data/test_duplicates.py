"""The same sound twice in a manifest."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainables.data.audio import AudioFile
from trainables.data.duplicates import join_copies, refuse_overlaps
from trainables.data.manifest import Row


def row(number: int, path: str = "a.wav", start_s: float = 0, end_s: float | None = None, **more: str) -> Row:
    machine = {
        "role": "machine",
        "name": "pump",
        "kind": "",
        "label": "normal",
        "domain": "source",
        "split": "train",
    }
    cells = {**machine, "recording": "pump/r", **more}
    return Row(where=f"m.csv, row {number}", path=path, start_s=start_s, end_s=end_s, **cells)


def noise(number: int, path: str, **more: str) -> Row:
    return row(number, path, **({"role": "noise", "kind": "stationary", "label": "", "domain": ""} | more))


def check(*rows: Row) -> None:
    files = {r.path: AudioFile(num_frames=80000, rate_hz=8000, num_channels=1) for r in rows}
    refuse_overlaps(rows, {r.path: Path(r.path) for r in rows}, files)


def join(*rows: Row, same: tuple[str, ...]) -> tuple[list[Row], list[str]]:
    hashes = {r.path: "same" if r.path in same else r.path for r in rows}
    files = {p: AudioFile(num_frames=1, rate_hz=1, num_channels=1, sha256=h) for p, h in hashes.items()}
    return join_copies(rows, {r.path: Path(r.path) for r in rows}, files)


def test_pieces_side_by_side_pass() -> None:
    check(row(2, end_s=2), row(3, start_s=2, end_s=4, split="test"), row(4, start_s=4, label="anomaly"))
    check(row(2), row(3, "b.wav", label="anomaly"))


def test_overlaps_for_the_same_use_pass() -> None:
    check(row(2, end_s=2), row(3, start_s=1, end_s=3))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (row(2), row(3)),
        (row(2, end_s=2), row(3, end_s=2, split="test")),
        (row(2), row(3, start_s=0, end_s=10)),
    ],
)
def test_a_doubled_row(refusal, first: Row, second: Row) -> None:
    with refusal("m.csv, row 3, columns path, start_s, end_s: a.wav from 0 to", "is also row 2"):
        check(first, second)


def test_two_spellings_of_one_file(refusal) -> None:
    rows = [row(2), row(3, "./a.wav")]
    files = {r.path: AudioFile(num_frames=80000, rate_hz=8000, num_channels=1) for r in rows}
    with refusal("row 3", "is also row 2"):
        refuse_overlaps(rows, {r.path: Path("/data/a.wav") for r in rows}, files)


@pytest.mark.parametrize(
    "more",
    [{"split": "test"}, {"label": "anomaly"}, {"name": "fan"}, {"domain": "target"}, {"recording": "pump/s"}],
)
def test_an_overlap_that_contradicts_itself(refusal, more: dict[str, str]) -> None:
    with refusal("m.csv, row 4, column start_s: a.wav from 3 s overlaps row 2"):
        check(row(2), row(3, start_s=1, end_s=2), row(4, start_s=3, end_s=4, **more))


def test_copies_count_as_one_recording_and_are_named() -> None:
    first, second = (
        noise(2, "a.wav", recording="x/1", split="train"),
        noise(3, "b.wav", recording="y/2", split="test"),
    )
    rows, notes = join(first, second, noise(4, "c.wav"), same=("a.wav", "b.wav"))
    assert [r.recording for r in rows] == ["x/1", "x/1", "pump/r"]
    assert [r.split for r in rows[:2]] == ["train", "test"]
    assert notes == ["Files that are copies of others count as one recording with them: b.wav (of a.wav)."]


def test_many_copies_are_counted() -> None:
    rows = [noise(i, f"{i}.wav") for i in range(6)]
    _, notes = join(*rows, same=tuple(r.path for r in rows))
    assert notes[0].endswith("3.wav (of 0.wav) and 2 more.")


def test_nothing_to_say_without_copies() -> None:
    rows = [row(2, "a.wav", end_s=1), row(3, "a.wav", start_s=1, split="test"), row(4, "b.wav")]
    assert join(*rows, same=()) == (rows, [])


@pytest.mark.parametrize(
    "more", [{"split": "test"}, {"label": "anomaly"}, {"name": "fan"}, {"role": "noise"}]
)
def test_a_copy_that_contradicts_the_original(refusal, more: dict[str, str]) -> None:
    with refusal("m.csv, row 3, column path: b.wav is a copy of a.wav in row 2", "remove one of the two"):
        join(row(2, "a.wav"), row(3, "b.wav", **more), same=("a.wav", "b.wav"))


def test_an_overlap_is_found_with_whatever_reaches_furthest(refusal) -> None:
    with refusal("row 4, column start_s: a.wav from 4 s overlaps row 3"):
        check(row(2, end_s=2), row(3, start_s=2, end_s=5, split="test"), row(4, start_s=4, end_s=6))
