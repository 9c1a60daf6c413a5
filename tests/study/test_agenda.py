"""The agenda with slots played by the test: nothing runs twice, nothing is lost, nothing is told too early."""

from __future__ import annotations

import json
import logging
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from study.agenda import Agenda, StudyFailed
from study.config import SearchConfig, StudyConfig
from study.folder import StudyFolder
from study.search import Search, build_job
from trainables.settings import TrainingConfig

EPOCHS = 3


def config(trials: int) -> StudyConfig:
    search = SearchConfig(trials=trials, sampler="random", startup_trials=4, recipes=("alpha",))
    return StudyConfig(training=TrainingConfig(epochs=EPOCHS), search=search)


def open_agenda(path: Path, trials: int = 6, **rest: Any) -> Agenda:
    search = Search(
        config(trials),
        StudyFolder(path),
        space=lambda trial: {"x": trial.suggest_float("x", 0.0, 1.0)},
        recipes={"alpha": {"x": 0.5}},
        cache_dir=path,
    )
    return Agenda(search, **rest)


def epoch(number: int, official: float = 50.0, table: bool = True) -> dict[str, Any]:
    """What a slot returns."""
    record = {
        "epoch": number,
        "epochs": EPOCHS,
        "done": number == EPOCHS,
        "metrics": {"official": official + number, "epoch_s": 2.0, "odd": math.inf},
        "table": [{"machine": "m"}] if table else None,
    }
    return {"epoch": number, "official": official, "failed": None, "record": record}


def play(agenda: Agenda, job: dict[str, Any], epochs: int = EPOCHS) -> None:
    agenda.started(job["id"])
    for number in range(1, epochs + 1):
        agenda.reported(job["id"], epoch(number))
    agenda.ended(job["id"])


def fail(agenda: Agenda, job: dict[str, Any], reason: str = "boom") -> None:
    agenda.started(job["id"])
    agenda.reported(job["id"], {"done": True, "failed": reason, "traceback": "line 1\nline 2\n", "epoch": 0})
    agenda.ended(job["id"])


def confirmations(agenda: Agenda, count: int = 2) -> Callable[[], list[dict[str, Any]]]:
    def jobs() -> list[dict[str, Any]]:
        return [
            build_job(
                agenda.search.config,
                agenda.folder,
                job_id=f"c-best-s{seed}",
                role="confirm",
                params={"x": 0.5},
                cache_dir=agenda.folder.path,
                seed=seed,
                split="confirm",
            )
            for seed in range(count)
        ]

    return jobs


def with_confirmations(path: Path, trials: int, **rest: Any) -> Agenda:
    agenda = open_agenda(path, trials, **rest)
    agenda._after_search = confirmations(agenda)
    return agenda


class Diary:
    """Notes events, and whether the files were there before it heard."""

    def __init__(self, folder: StudyFolder) -> None:
        self.folder, self.events = folder, []

    def job_started(self, job: dict[str, Any]) -> None:
        assert self.folder.job(job["id"]) == job
        self.events.append(("started", job["id"]))

    def job_reported(self, job: dict[str, Any], record: dict[str, Any]) -> None:
        assert record["epoch"] in [r["epoch"] for r in self.folder.records(job["id"])]
        self.events.append(("reported", job["id"], record["epoch"]))

    def job_ended(self, job: dict[str, Any], result: dict[str, Any]) -> None:
        self.events.append(("ended", job["id"], result["state"]))


def test_the_confirmation_waits_for_the_last_trial(tmp_path: Path) -> None:
    agenda = with_confirmations(tmp_path, trials=3)
    jobs = [agenda.next() for _ in range(3)]
    assert agenda.next() is None
    for job in jobs[:2]:
        play(agenda, job)
        assert agenda.next() is None
    assert not agenda.draining
    play(agenda, jobs[2], epochs=2)
    first, second = agenda.next(), agenda.next()
    assert [first["id"], second["id"]] == ["c-best-s0", "c-best-s1"]
    assert agenda.next() is None
    assert agenda.draining
    assert not agenda.over
    play(agenda, first)
    play(agenda, second)
    assert agenda.over
    assert agenda.next() is None
    assert Counter(t.state.name for t in agenda.search.study.get_trials()) == {"COMPLETE": 2, "PRUNED": 1}


def references(path: Path, *names: str) -> list[dict[str, Any]]:
    return [
        build_job(
            config(0), StudyFolder(path), job_id=f"b-{name}", role="baseline", params={}, cache_dir=path
        )
        for name in names
    ]


def test_a_trial_trains_while_the_second_slot_computes_what_all_are_scored_with(tmp_path: Path) -> None:
    agenda = open_agenda(tmp_path, 2, before_search=references(tmp_path, "oracle", "teacher", "autoencoder"))
    jobs = [agenda.next() for _ in range(5)]
    assert [job["id"] for job in jobs] == ["t0000", "b-oracle", "b-teacher", "b-autoencoder", "t0001"]
    assert agenda.next() is None
    for job in jobs:
        play(agenda, job)
    assert agenda.next() is None
    assert agenda.over


def test_one_slot_trains_before_it_has_the_references(tmp_path: Path) -> None:
    agenda = open_agenda(tmp_path, 1, before_search=references(tmp_path, "oracle", "teacher"))
    order = []
    while (job := agenda.next()) is not None:
        order.append(job["id"])
        play(agenda, job)
    assert order == ["t0000", "b-oracle", "b-teacher"]


def test_references_are_made_up_for_when_every_trial_has_ended(tmp_path: Path) -> None:
    agenda = open_agenda(tmp_path, 1)
    play(agenda, agenda.next())
    assert agenda.next() is None
    agenda = open_agenda(tmp_path, 1, before_search=references(tmp_path, "oracle", "teacher"))
    assert [agenda.next()["id"] for _ in range(2)] == ["b-oracle", "b-teacher"]


def test_results_say_what_happened(tmp_path: Path) -> None:
    agenda = open_agenda(tmp_path)
    diary = Diary(agenda.folder)
    agenda._listeners.append(diary)
    whole, stopped, failed, nan = (agenda.next() for _ in range(4))
    play(agenda, whole)
    agenda.started(stopped["id"])
    agenda.reported(stopped["id"], epoch(1))
    agenda.reported(stopped["id"], epoch(2, table=False) | {"num_workers": 4})
    agenda.ended(stopped["id"])
    agenda.started(failed["id"])
    agenda.reported(failed["id"], epoch(1))
    agenda.reported(
        failed["id"], {"done": True, "failed": "Error:\n  of   two lines", "traceback": "tb", "epoch": 1}
    )
    agenda.ended(failed["id"])
    agenda.started(nan["id"])
    agenda.reported(nan["id"], epoch(1, official=math.nan))
    agenda.ended(nan["id"])

    results = {job["id"]: agenda.folder.result(job["id"]) for job in (whole, stopped, failed, nan)}
    assert [r["state"] for r in results.values()] == ["finished", "stopped", "failed", "failed"]
    assert [r["epoch"] for r in results.values()] == [3, 2, 1, 1]
    assert [r["reason"] for r in results.values()] == [
        None,
        None,
        "Error: of two lines",
        "official is nan after epoch 1",
    ]
    assert results["t0000"]["metrics"] == {"official": 53.0, "epoch_s": 2.0, "odd": None}
    assert results["t0001"]["metrics"]["official"] == 51.0  # the last full scoring, not the partial one
    assert [r["num_workers"] for r in results.values()] == [1, 4, 1, 1]
    assert (agenda.folder.job_path("t0002") / "traceback.txt").read_text() == "tb"
    assert [e for e in diary.events if e[1] == "t0002"] == [
        ("started", "t0002"),
        ("reported", "t0002", 1),
        ("ended", "t0002", "failed"),
    ]
    assert agenda.search.study.best_trial.number == 0


def test_a_job_that_loses_its_slot_goes_on_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    agenda = open_agenda(tmp_path, trials=2)
    play(agenda, agenda.next())
    job = agenda.next()
    for attempt in range(2):
        agenda.started(job["id"])
        agenda.reported(job["id"], epoch(attempt + 1))
        agenda.lost(job["id"], "worker died\nof the cold")
        assert agenda.folder.result(job["id"]) is None
        assert agenda.next() == job
    agenda.lost(job["id"], "worker died\nof the cold")  # this time before it started
    result = agenda.folder.result(job["id"])
    assert result["state"] == "failed"
    assert result["reason"] == "lost its slot 3 times: worker died of the cold"
    assert [r["epoch"] for r in agenda.folder.records(job["id"])] == [1, 2]
    assert agenda.next() is None
    assert agenda.over
    assert caplog.text.count("goes on in another one") == 2


def test_the_time_before_a_loss_counts(tmp_path: Path) -> None:
    agenda = open_agenda(tmp_path, trials=1)
    job = agenda.next()
    agenda.started(job["id"])
    agenda.reported(job["id"], epoch(1))
    agenda.reported(job["id"], epoch(2))
    agenda = open_agenda(tmp_path, trials=1)  # the driver was killed
    assert agenda.next() == job
    agenda.started(job["id"])
    agenda.reported(job["id"], epoch(2))
    agenda.reported(job["id"], epoch(3))
    agenda.ended(job["id"])
    assert 4.0 <= agenda.folder.result(job["id"])["duration_s"] < 14.0
    assert [r["epoch"] for r in agenda.folder.records(job["id"])] == [1, 2, 3]


def test_three_failures_at_the_start_stop_the_study_and_are_run_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    agenda = with_confirmations(tmp_path, trials=5)
    diary = Diary(agenda.folder)
    agenda._listeners.append(diary)
    running = agenda.next()
    for reason in ("no such file", "out of memory", "no such file"):
        agenda.check()
        fail(agenda, agenda.next(), reason)
    with pytest.raises(StudyFailed, match="t0001, t0003: no such file; t0002: out of memory") as failed:
        agenda.next()
    kept = agenda.folder.job_path("t0001") / "traceback.txt"
    assert str(kept) in str(failed.value)
    assert kept.read_text() == "line 1\nline 2\n"
    assert caplog.records == []  # the listeners say it
    assert [e for e in diary.events if e[0] == "ended"] == [
        ("ended", f"t000{n}", "failed") for n in (1, 2, 3)
    ]
    assert not any(agenda.folder.result(i) for i in agenda.folder.job_ids())

    mended = with_confirmations(tmp_path, trials=5)
    jobs = []
    while job := mended.next():
        jobs.append(job["id"])
        play(mended, job)
    assert jobs == [running["id"], "t0001", "t0002", "t0003", "t0004", "c-best-s0", "c-best-s1"]
    assert mended.over
    assert not kept.exists()


def test_failures_are_kept_once_a_trial_has_succeeded(tmp_path: Path) -> None:
    agenda = open_agenda(tmp_path, trials=6)
    fail(agenda, agenda.next())
    fail(agenda, agenda.next())
    assert agenda.folder.result("t0000") is None
    play(agenda, agenda.next(), epochs=2)
    assert [agenda.folder.result(f"t000{n}")["state"] for n in range(3)] == ["failed", "failed", "stopped"]
    for _ in range(3):
        fail(agenda, agenda.next())
    assert agenda.next() is None
    assert agenda.over
    assert Counter(t.state.name for t in agenda.search.study.get_trials()) == {"FAIL": 5, "PRUNED": 1}


def test_five_failures_alike_stop_a_study_that_worked_before_and_it_goes_on(tmp_path: Path) -> None:
    agenda = with_confirmations(tmp_path, trials=15)
    play(agenda, agenda.next())
    for n in range(4):
        fail(agenda, agenda.next(), f"no file /cache/{n}")
    play(agenda, agenda.next())
    for reason in ("no file", "no memory", "no file", "no file", "no file"):
        fail(agenda, agenda.next(), reason)
    running = agenda.next()
    fail(agenda, agenda.next(), "no file")
    fail(agenda, agenda.next(), "no file")
    with pytest.raises(StudyFailed) as failed:
        agenda.next()
    ids = [f"t{n:04d}" for n in (8, 9, 10, 12, 13)]
    assert f"5 trials in a row failed alike ({', '.join(ids)}: no file). The traceback is in " in str(
        failed.value
    )
    assert agenda.folder.result("t0013")["state"] == "failed"

    mended = with_confirmations(tmp_path, trials=15)
    jobs = []
    while job := mended.next():
        jobs.append(job["id"])
        play(mended, job)
    assert jobs == [running["id"], "t0014", "c-best-s0", "c-best-s1"]
    assert mended.over


def test_a_search_in_which_everything_failed_is_a_failed_study(tmp_path: Path) -> None:
    agenda = open_agenda(tmp_path, trials=2)
    fail(agenda, agenda.next())
    fail(agenda, agenda.next())
    with pytest.raises(StudyFailed, match="every trial failed"):
        agenda.next()


def test_few_failures_of_a_resumed_study_are_kept(tmp_path: Path) -> None:
    agenda = open_agenda(tmp_path, trials=2)
    play(agenda, agenda.next())
    play(agenda, agenda.next())
    agenda = open_agenda(tmp_path, trials=4)
    fail(agenda, agenda.next())
    fail(agenda, agenda.next())
    assert agenda.next() is None
    assert agenda.over
    assert agenda.folder.result("t0003")["reason"] == "boom"


def test_confirm_jobs_fail_alone_and_are_not_repeated(tmp_path: Path) -> None:
    agenda = with_confirmations(tmp_path, trials=1)
    play(agenda, agenda.next())
    fail(agenda, agenda.next())
    assert agenda.folder.result("c-best-s0")["state"] == "failed"
    agenda = with_confirmations(tmp_path, trials=1)  # killed here
    job = agenda.next()
    assert job["id"] == "c-best-s1"
    play(agenda, job)
    assert agenda.over
    again = with_confirmations(tmp_path, trials=1)
    assert again.next() is None
    assert again.over


def test_a_listener_that_raises_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise OSError("server gone")

    agenda = open_agenda(tmp_path, trials=2)
    diary = Diary(agenda.folder)
    agenda._listeners += [Broken(), diary]
    with caplog.at_level(logging.ERROR):
        play(agenda, agenda.next())
        play(agenda, agenda.next())
    assert caplog.text.count("the study goes on") == 1
    assert len(diary.events) == 2 * (2 + EPOCHS)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 10_000), slots=st.integers(1, 4), trials=st.integers(1, 7))
def test_any_course_of_events_ends_with_every_job_ended_once(
    tmp_path_factory: pytest.TempPathFactory, seed: int, slots: int, trials: int
) -> None:
    """Slots that report, fail, are stopped, are lost; a driver that is killed: in any order."""
    draw, path = random.Random(seed), tmp_path_factory.mktemp("agenda")
    agenda = with_confirmations(path, trials)
    live: dict[str, int] = {}  # job -> last epoch of its checkpoint
    ends: Counter[str] = Counter()
    for _ in range(2000):
        try:
            job = agenda.next() if len(live) < slots else None
        except StudyFailed as error:
            if "in a row" in str(error):
                live.clear()
                agenda = with_confirmations(path, trials)
                continue
            assert not any(
                (agenda.folder.result(i) or {"state": "failed"})["state"] != "failed" for i in ends
            )
            return
        if job is not None:
            assert job["id"] not in live
            assert agenda.folder.result(job["id"]) is None
            live[job["id"]] = len(agenda.folder.records(job["id"]))
            agenda.started(job["id"])
            continue
        if agenda.over:
            break
        assert live  # it never waits for nothing
        job_id, chance = draw.choice(sorted(live)), draw.random()
        if chance < 0.03:
            live.clear()
            agenda = with_confirmations(path, trials)
            continue
        if chance < 0.1:
            agenda.lost(job_id, "slot lost")
        elif chance < 0.15:
            agenda.reported(job_id, {"done": True, "failed": "boom", "traceback": None, "epoch": 0})
            agenda.ended(job_id)
        else:
            live[job_id] += 1
            agenda.reported(job_id, epoch(live[job_id]))
            stop = chance < 0.3 and job_id.startswith("t")
            if not stop and live[job_id] < EPOCHS:
                continue
            agenda.ended(job_id)
        del live[job_id]
        if agenda.folder.result(job_id) is not None:
            ends[job_id] += 1
    assert agenda.over
    ids = [f"t{n:04d}" for n in range(trials)] + ["c-best-s0", "c-best-s1"]
    assert sorted(agenda.folder.job_ids()) == sorted(ids)
    assert max(ends.values()) == 1
    for job_id in ids:
        result, records = agenda.folder.result(job_id), agenda.folder.records(job_id)
        assert [r["epoch"] for r in records] == list(range(1, len(records) + 1))
        assert (result["state"] == "finished") == (len(records) == EPOCHS and result["reason"] is None)
        json.dumps(result, allow_nan=False)
    told = {"finished": "COMPLETE", "stopped": "PRUNED", "failed": "FAIL"}
    for trial in agenda.search.study.get_trials():
        assert trial.state.name == told[agenda.folder.result(f"t{trial.number:04d}")["state"]]
