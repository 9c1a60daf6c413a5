"""What a study says while it runs: aligned lines, what is best, and what is left."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest

from study.progress import LEGEND, Progress

EXPECTED = {"frozen baseline": 2, "trial": 4, "frozen confirm": 2, "confirm": 4}


def job(
    job_id: str, role: str = "trial", *, system: str = "retain", baseline: str | None = None
) -> dict[str, Any]:
    label = "snr_sigmoid, uniform, dwa"
    return {"id": job_id, "role": role, "trial": {"system": system}, "label": label, "baseline": baseline}


def result(
    official: float = 80.0, *, state: str = "finished", seconds: float = 100.0, **more: Any
) -> dict[str, Any]:
    metrics = {"official": official, "low/official": official - 10, "gap_closed": 0.25}
    return {"state": state, "reason": None, "epoch": 5, "metrics": metrics, "duration_s": seconds} | more


class Screen(Progress):
    """Progress that can be read back."""

    def __init__(self, expected: dict[str, int] = EXPECTED, *, num_slots: int = 1, **rest: Any) -> None:
        self.out = io.StringIO()
        super().__init__(expected, num_slots=num_slots, begun=time.monotonic(), out=self.out, **rest)

    def lines(self) -> list[str]:
        return self.out.getvalue().replace(LEGEND + "\n", "").splitlines()


def test_lines_are_aligned_and_say_what_happened() -> None:
    screen = Screen()
    screen.job_ended(
        job("b-teacher", "baseline", system="frozen", baseline="teacher"), result(71.25, seconds=1)
    )
    screen.job_ended(job("t0000", baseline="paper"), result(80.0))
    screen.job_ended(job("t0001"), result(9.5, state="stopped", epoch=2))
    screen.job_ended(job("t0002"), result(100.0))
    screen.job_ended(job("t0003"), result(state="failed", reason="loss tag is nan in epoch 1"))
    lines = screen.lines()
    assert [line.index("official") for line in lines[:4]] == [lines[0].index("official")] * 4
    assert [line.index("gap") for line in lines[:4]] == [lines[0].index("gap")] * 4
    assert lines[0].startswith("[ 1/12] b-teacher      official  71.2  low  61.2  gap   25%")
    assert lines[1].endswith("paper (published); best so far")
    assert lines[2].endswith("snr_sigmoid, uniform, dwa; stopped at epoch 2")
    assert lines[3].endswith("dwa; best so far")
    assert (
        lines[4] == "[ 5/12] t0003          FAILED: loss tag is nan in epoch 1  (snr_sigmoid, uniform, dwa)"
    )
    assert max(map(len, lines)) <= 120


def test_long_names_of_confirmations_keep_the_columns() -> None:
    screen = Screen()
    screen.job_ended(job("b-teacher", "baseline", system="frozen", baseline="teacher"), result())
    screen.job_ended(job("c-alignment-s0", "confirm"), result())
    long = [job(f"c-{who}", "confirm") for who in ("paper-s0", "best2-t0031-s10")]
    screen.confirming(long)
    for each in long:
        screen.job_ended(each, result())
    early, late = ([line.index(" official") for line in screen.lines()[i : i + 2]] for i in (0, 2))
    assert early[0] == early[1]
    assert late[0] == late[1]


def test_the_columns_are_explained_once_before_the_first_line() -> None:
    screen = Screen()
    for number in range(2):
        screen.job_ended(job(f"t000{number}"), result())
    assert screen.out.getvalue().startswith(LEGEND)
    assert screen.out.getvalue().count(LEGEND) == 1


def test_best_is_said_when_it_changes_and_only_of_whole_trials() -> None:
    screen = Screen()
    for number, (value, state) in enumerate(
        [(70, "finished"), (90, "stopped"), (69, "finished"), (71, "finished")]
    ):
        screen.job_ended(job(f"t000{number}"), result(value, state=state))
    screen.job_ended(job("c-paper-s0", "confirm"), result(99))
    assert ["best so far" in line for line in screen.lines()] == [True, False, False, True, False]


def test_time_left_counts_trials_at_their_mean_and_confirmations_at_that_of_whole_trials() -> None:
    screen = Screen(num_slots=2)
    assert screen.left_s() is None
    screen.job_ended(job("t0000"), result(seconds=200))
    screen.job_ended(job("t0001"), result(seconds=100, state="stopped"))
    # two trials at 150 s, four confirmations at 200 s, frozen ones at nothing, on two slots
    assert screen.left_s() == (2 * 150 + 4 * 200) / 2
    screen.job_ended(job("t0002"), result(seconds=150))
    screen.job_ended(job("t0003"), result(state="failed", seconds=1, reason="no luck"))
    screen.job_ended(job("c-paper-s0", "confirm"), result(seconds=300))
    screen.job_ended(job("c-teacher-s0", "confirm", system="frozen"), result(seconds=20))
    assert screen.left_s() == (3 * 300 + 20) / 2


def test_time_spent_on_running_jobs_is_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    screen = Screen({"trial": 3})
    screen.job_ended(job("t0000"), result(seconds=100))
    screen.job_started(job("t0001"))
    screen.job_started(job("t0002"))
    monkeypatch.setattr(time, "monotonic", lambda: now + 1000)  # longer than expected: not below nothing
    assert screen.left_s() == 0


def test_earlier_runs_count_and_teach() -> None:
    earlier = [(job("t0000"), result(85, seconds=600)), (job("t0001"), result(60, seconds=600))]
    screen = Screen({"trial": 4}, earlier=earlier)
    assert (screen.done, screen.total) == (2, 4)
    screen.job_ended(job("t0002"), result(84, seconds=600))
    assert "~10 min left" in screen.lines()[0]
    assert screen.lines()[0].startswith("[3/4]")
    assert "best so far" not in screen.lines()[0]


def test_nothing_is_left_at_the_end() -> None:
    screen = Screen({"trial": 1})
    screen.job_ended(job("t0000"), result(seconds=600))
    assert "left" not in screen.lines()[0]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(10, "<1 min left"), (100, "~2 min left"), (5940, "~99 min left"), (7500, "~2.1 h left")],
)
def test_time_left_in_words(seconds: float, words: str) -> None:
    screen = Screen({"trial": 2})
    screen.job_ended(job("t0000"), result(seconds=seconds))
    assert words in screen.lines()[0]


def test_the_number_of_confirmations_is_put_right_when_it_is_known() -> None:
    screen = Screen({"trial": 1, "frozen confirm": 2, "confirm": 9})
    assert screen.total == 12
    screen.confirming([job("c-teacher-s0", "confirm", system="frozen"), job("c-paper-s0", "confirm")])
    assert screen.total == 3


def test_the_first_training_step_and_a_long_silence_are_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    record = {"epoch": 2, "epochs": 5, "metrics": {"official": 70.0, "train_s": 3.0, "epoch_s": 4.0}}
    screen.job_reported(job("t0000"), record)
    screen.job_reported(job("t0000"), record)
    assert len(screen.lines()) == 1
    assert screen.lines()[0].startswith("first training step ")
    monkeypatch.setattr(screen, "_spoke", time.monotonic() - 61)
    screen.job_reported(job("t0000"), record)
    assert screen.lines()[1] == "t0000 is at epoch 2 of 5, official  70.0"


def test_a_repeated_epoch_is_no_first_training_step() -> None:
    screen = Screen()
    screen.job_started(job("t0000"))
    metrics = {"official": 70.0, "train_s": 30.0, "epoch_s": 40.0}
    screen.job_reported(job("t0000"), {"epoch": 1, "epochs": 5, "metrics": metrics})
    assert screen.lines() == []
    trained = metrics | {"train_s": 1e-6, "epoch_s": 2e-6}
    screen.job_reported(job("t0000"), {"epoch": 2, "epochs": 5, "metrics": trained})
    assert screen.lines()[0].startswith("first training step ")


def test_what_was_not_measured_is_a_dash() -> None:
    screen = Screen()
    screen.job_ended(job("t0000"), result() | {"metrics": {}})
    assert "official     -  low     -  gap     -" in screen.lines()[0]
