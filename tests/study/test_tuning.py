"""The study on real Ray Tune, with slots that train nothing; and the scheduler without Ray."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import ASHAScheduler

from study import tuning
from study.agenda import StudyFailed
from study.folder import StudyFolder
from study.tuning import TUNE_ENVIRONMENT, StudyASHA, StudyCallback, StudySearcher

SCRIPT = Path(__file__).with_name("toy_study.py")
EPOCHS = 6


# -- the scheduler -------------------------------------------------------------------------------------------


def asha(**rest: Any) -> StudyASHA:
    return StudyASHA(**{"epochs": 9, "grace_epochs": 1, "reduction_factor": 3, **rest})


def job_of(job_id: str, role: str = "trial", baseline: str | None = None) -> dict[str, Any]:
    return {"id": job_id, "role": role, "baseline": baseline}


def play(scheduler: StudyASHA, folder: StudyFolder, events: list[tuple[str, int, float]]) -> list[str]:
    """Feed the scheduler the events of trials that have not ended, and keep the study's files. Its verdicts."""
    verdicts = []
    for job_id, epoch, value in events:
        if folder.result(job_id):
            verdicts.append("-")
            continue
        folder.write_job(job_of(job_id))
        folder.append_record(job_id, {"epoch": epoch, "done": epoch == 9, "metrics": {"official": value}})
        verdicts.append(scheduler.judge(job_of(job_id), epoch, value))
        if verdicts[-1] == "STOP" or epoch == 9:
            folder.write_result(job_id, {"state": "stopped" if epoch < 9 else "finished"})
    return verdicts


def history(seed: int, trials: int = 14) -> list[tuple[str, int, float]]:
    """Epochs of several trials at once, each trial's in order."""
    draw = random.Random(seed)
    todo = {f"t{n:04d}": (0, draw.uniform(40, 60)) for n in range(trials)}
    events = []
    while todo:
        job_id = draw.choice(sorted(todo)[:4])
        epoch, level = todo.pop(job_id)
        events.append((job_id, epoch + 1, level + epoch + draw.gauss(0, 1)))
        if epoch + 1 < 9:
            todo[job_id] = (epoch + 1, level)
    return events


@pytest.mark.parametrize("seed", range(5))
def test_replayed_rungs_are_those_of_the_uninterrupted_run(tmp_path: Path, seed: int) -> None:
    events = history(seed)
    whole = asha()
    verdicts = play(whole, StudyFolder(tmp_path / "whole"), events)
    assert {"STOP", "CONTINUE"} < set(verdicts)
    finished = asha()
    finished.replay(StudyFolder(tmp_path / "whole"))
    assert finished.rungs() == whole.rungs()
    assert [len(values) for values in whole.rungs().values()][-1] == 14

    for cut in (len(events) // 3, len(events) // 2):
        folder = StudyFolder(tmp_path / f"cut{cut}")
        play(asha(), folder, events[:cut])
        resumed = asha()
        resumed.replay(folder)
        for job_id in folder.job_ids():  # interrupted trials first report their last epoch again
            if folder.result(job_id) is None:
                last = folder.records(job_id)[-1]
                resumed.judge(job_of(job_id), last["epoch"], last["metrics"]["official"])
        assert play(resumed, folder, events[cut:]) == verdicts[cut:]
        assert resumed.rungs() == whole.rungs()


def test_a_verdict_that_was_not_carried_out_is_given_again(tmp_path: Path) -> None:
    folder, first = StudyFolder(tmp_path), asha()
    for n, value in enumerate([60.0, 50.0]):
        folder.write_job(job_of(f"t000{n}"))
        folder.append_record(f"t000{n}", {"epoch": 1, "metrics": {"official": value}})
        verdict = first.judge(job_of(f"t000{n}"), 1, value)
    assert verdict == "STOP"  # and the driver is killed before the trial hears of it
    resumed = asha()
    resumed.replay(folder)
    assert resumed.judge(job_of("t0000"), 1, 60.0) == "CONTINUE"
    assert resumed.judge(job_of("t0001"), 1, 50.0) == "STOP"


def test_recipes_and_confirm_jobs_run_to_the_end() -> None:
    scheduler = asha()
    assert scheduler.judge(job_of("t0000"), 1, 50.0) == "CONTINUE"
    assert scheduler.judge(job_of("t0001", baseline="paper"), 1, 10.0) == "CONTINUE"
    assert scheduler.judge(job_of("c-best-s0", role="confirm"), 1, 1.0) == "CONTINUE"
    assert scheduler.rungs()[1] == {"t0000": 50.0, "t0001": 10.0}
    assert scheduler.judge(job_of("t0002"), 1, 5.0) == "STOP"


def test_the_scheduler_decides_as_rays_own_does() -> None:
    ours = asha()
    rays = ASHAScheduler(
        time_attr="epoch", metric="official", mode="max", max_t=9, grace_period=1, reduction_factor=3
    )
    stopped = set()
    for job_id, epoch, value in history(7):
        trial = SimpleNamespace(trial_id=job_id, config={"job": job_of(job_id)})
        if job_id in stopped or epoch == 9:
            continue
        if epoch == 1:
            rays.on_trial_add(None, trial)
        result = {"epoch": epoch, "official": value}
        verdict = ours.on_trial_result(None, trial, result)
        assert verdict == rays.on_trial_result(None, trial, result)
        if verdict == "STOP":
            stopped.add(job_id)
    assert len(stopped) > 4


def test_a_value_that_is_no_number_stops_any_job() -> None:
    trial = SimpleNamespace(trial_id="x", config={"job": job_of("c-best-s0", role="confirm")})
    assert asha().on_trial_result(None, trial, {"epoch": 1, "official": float("nan")}) == "STOP"
    assert asha().on_trial_result(None, trial, {"epoch": 1}) == "CONTINUE"
    assert asha(epochs=2, grace_epochs=5).rungs() == {2: {}}


# -- real Ray ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy() -> Any:
    """The module ``toy_study``, its classes sent to Ray's workers by value."""
    from ray import cloudpickle

    spec = importlib.util.spec_from_file_location("toy_study", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_study"] = module
    spec.loader.exec_module(module)
    cloudpickle.register_pickle_by_value(module)
    return module


@pytest.fixture(scope="module")
def ray_toy(toy: Any) -> Iterator[Any]:
    import ray

    toy.start_ray()
    yield toy
    ray.shutdown()


class Diary:
    """A listener that notes events, and at one of them does something."""

    def __init__(self, at: tuple[Any, ...] | None = None, then: Any = None) -> None:
        self.events: list[tuple[Any, ...]] = []
        self._at, self._then = at, then

    def _note(self, *event: Any) -> None:
        self.events.append(event)
        if event == self._at:
            self._then()

    def job_started(self, job: dict[str, Any]) -> None:
        self._note("started", job["id"])

    def job_reported(self, job: dict[str, Any], record: dict[str, Any]) -> None:
        assert record["table"]
        self._note("reported", job["id"], record["epoch"])

    def job_ended(self, job: dict[str, Any], result: dict[str, Any]) -> None:
        self._note("ended", job["id"], result["state"])

    def of(self, kind: str) -> Counter[Any]:
        return Counter(event[1] for event in self.events if event[0] == kind)


class Broken:
    def __getattr__(self, name: str) -> Any:
        raise OSError("tracking server gone")


def computed(home: Path) -> list[tuple[str, int, int]]:
    """Epochs that slots computed, in order: job, epoch, process."""
    lines = [line.split() for line in (home / "epochs.txt").read_text().splitlines()]
    return [(job_id, int(epoch), int(pid)) for job_id, epoch, pid in lines]


def assert_complete(search: Any, trials: int) -> dict[str, dict[str, Any]]:
    """Every job ended once, and Optuna says what the folder says. Results by job."""
    folder = search.folder
    ids = [f"t{n:04d}" for n in range(trials)] + [f"c-best-s{n}" for n in range(3)]
    assert sorted(folder.job_ids()) == sorted(ids)
    results = {job_id: folder.result(job_id) for job_id in ids}
    told = {"finished": "COMPLETE", "stopped": "PRUNED", "failed": "FAIL"}
    for trial in search.study.get_trials():
        result = results[f"t{trial.number:04d}"]
        assert trial.state.name == told[result["state"]]
    for job_id, result in results.items():
        epochs = [r["epoch"] for r in folder.records(job_id)]
        assert epochs == list(range(1, result["epoch"] + 1))
    assert not (folder.path / "tune").exists()
    return results


@pytest.mark.slow
def test_a_study_with_every_kind_of_mishap(
    ray_toy: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    faults = tmp_path / "faults"
    faults.mkdir()
    for fault in ("kill-t0001", "fail-t0002", "nan-t0003", "hold-t0005", "hold-c-best-s0", "fail-c-best-s1"):
        (faults / fault).touch()

    class Release(Diary):
        """Holds a trial until the killed one goes on, and a confirmation until the others are over.

        So the lost slot must have come back, and the confirmation must have both slots.
        """

        def _note(self, *event: Any) -> None:
            super()._note(*event)
            if self.events.count(("started", "t0001")) == 2:
                (faults / "hold-t0005").unlink(missing_ok=True)
            if event[:2] == ("ended", "c-best-s2"):
                (faults / "hold-c-best-s0").unlink()

    diary = Release()
    handler, before = (
        signal.getsignal(signal.SIGINT),
        {name: os.environ.get(name) for name in TUNE_ENVIRONMENT},
    )
    search = ray_toy.run(tmp_path, listeners=(Broken(), diary))
    assert signal.getsignal(signal.SIGINT) is handler
    assert {name: os.environ.get(name) for name in TUNE_ENVIRONMENT} == before

    results = assert_complete(search, trials=7)
    states = {job_id: result["state"] for job_id, result in results.items()}
    assert states["t0000"] == states["t0001"] == "finished"
    assert states["t0002"] == states["t0003"] == states["c-best-s1"] == "failed"
    assert results["t0002"]["reason"] == "RuntimeError: toy failure"
    assert results["t0003"]["reason"] == "official is nan after epoch 1"
    assert "stopped" in (states["t0004"], states["t0005"], states["t0006"])
    stopped = [i for i, state in states.items() if state == "stopped"]
    assert {results[i]["epoch"] for i in stopped} == {2}
    assert states["c-best-s0"] == states["c-best-s2"] == "finished"
    assert (search.folder.job_path("t0002") / "traceback.txt").read_text() == "a\nb\n"
    assert search.study.best_value == results[f"t{search.study.best_trial.number:04d}"]["metrics"]["official"]

    # Each epoch was computed once, also those of the trial that lost its slot.
    epochs = computed(tmp_path)
    assert max(Counter((job_id, epoch) for job_id, epoch, _ in epochs).values()) == 1
    # The other slot was not taken from its trials for the lost one, and none was given up at the confirmation.
    before_kill = {pid for job_id, epoch, pid in epochs if job_id == "t0001" and epoch < 3}
    after_kill = {pid for job_id, epoch, pid in epochs if job_id == "t0001" and epoch >= 3}
    others = {pid for job_id, _, pid in epochs if job_id in ("t0000", "t0004", "t0005")} - before_kill
    assert len(before_kill) == len(after_kill) == 1
    assert len(others | after_kill) == 2
    assert {pid for job_id, _, pid in epochs if job_id.startswith("c-")} == others | after_kill

    assert diary.of("ended") == Counter(dict.fromkeys(results, 1))
    assert diary.of("started") == Counter({**dict.fromkeys(results, 1), "t0001": 2})
    order = [event[1] for event in diary.events]
    assert all(i.startswith("c-") for i in order[min(order.index(f"c-best-s{n}") for n in range(3)) :])
    assert caplog.text.count("the study goes on") == 1
    assert "t0001 lost its slot" in caplog.text
    assert "SYSTEM_ERROR" in caplog.text or "died" in caplog.text  # the reason, in Ray's words


@pytest.mark.slow
def test_a_study_stopped_in_every_way_is_completed_by_the_same_command(
    ray_toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults, folder = tmp_path / "faults", StudyFolder(tmp_path / "toy")
    faults.mkdir()

    # Everything fails: nothing of it is kept.
    for number in range(7):
        (faults / f"fail-t{number:04d}").touch()
    with pytest.raises(StudyFailed, match=r"\(t000.*: RuntimeError: toy failure\)"):
        ray_toy.run(tmp_path)
    assert not any(folder.result(i) for i in folder.job_ids())
    assert not (folder.path / "tune").exists()
    for fault in faults.iterdir():
        fault.unlink()

    # The disk is full: the error of our own bookkeeping comes out as it is.
    def full(self: StudyFolder, job_id: str, result: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(StudyFolder, "write_result", full)
        with pytest.raises(OSError, match="No space left on device"):
            ray_toy.run(tmp_path)

    # Ctrl-C: what has ended stays.
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        ray_toy.run(tmp_path, listeners=(Diary(at=("reported", "t0004", 1), then=interrupt),))
    assert signal.getsignal(signal.SIGINT) is handler
    done = {i: folder.result(i) for i in folder.job_ids() if folder.result(i)}
    assert done
    assert "t0004" not in done

    # The rest.
    diary = Diary()
    assert_complete(ray_toy.run(tmp_path, listeners=(diary,), trials=8), trials=8)
    assert not done.keys() & diary.of("started").keys()
    assert {i: folder.result(i) for i in done} == done

    # One trial more: it is behind those of the earlier runs, so that their values must have been remembered.
    longer = Diary()
    results = assert_complete(ray_toy.run(tmp_path, listeners=(longer,), trials=9), trials=9)
    assert longer.of("started") == Counter(["t0008"])
    assert (results["t0008"]["state"], results["t0008"]["epoch"]) == ("stopped", 2)

    complete = Diary()
    ray_toy.run(tmp_path, listeners=(complete,), trials=9)
    assert complete.events == []
    assert max(Counter(e[:2] for e in computed(tmp_path)).values()) == 1


@pytest.mark.slow
def test_a_killed_driver_loses_nothing(ray_toy: Any, tmp_path: Path) -> None:
    faults, journal = tmp_path / "faults", tmp_path / "toy" / "optuna.journal"
    faults.mkdir()
    for fault in ("hold-t0003", "hold-t0004"):
        (faults / fault).touch()
    with open(tmp_path / "driver.log", "w") as log:
        driver = subprocess.Popen([sys.executable, str(SCRIPT), str(tmp_path)], stdout=log, stderr=log)
    try:
        folder, deadline = StudyFolder(tmp_path / "toy"), time.monotonic() + 180
        while not (folder.records("t0003") and folder.records("t0004")):
            assert driver.poll() is None, (tmp_path / "driver.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    with open(journal, "ab") as file:
        file.write(b'{"op_code"')  # a line that the kill cut short
    first = {i: folder.result(i) for i in folder.job_ids()}
    assert [i for i, result in first.items() if result is None] == ["t0003", "t0004"]
    before = computed(tmp_path)
    for fault in faults.iterdir():
        fault.unlink()

    diary = Diary()
    search = ray_toy.run(tmp_path, listeners=(diary,))
    results = assert_complete(search, trials=7)
    assert {i: results[i] for i, result in first.items() if result} == {i: r for i, r in first.items() if r}
    assert diary.of("ended") == Counter([i for i in results if not first.get(i)])
    assert diary.of("started") == diary.of("ended")
    again = computed(tmp_path)[len(before) :]
    assert not {e[0] for e in again} & {i for i, result in first.items() if result}
    # The old slots may have computed an epoch after their driver was dead; none is kept twice.
    assert [r["epoch"] for r in search.folder.records("t0003")] == list(
        range(1, results["t0003"]["epoch"] + 1)
    )
    assert len({json.dumps(t.params) for t in search.study.get_trials()}) == 7


def test_what_the_watch_raises_ends_the_run() -> None:
    found: list[Exception] = []

    def watch() -> None:
        if found:
            raise found[0]

    callback = StudyCallback(None, watch)
    callback.on_step_end(1, [])
    found.append(OSError("no room for the corpus"))
    with pytest.raises(OSError, match="no room"):
        callback.on_step_end(2, [])
    assert callback.error is found[0]


def test_slots_start_a_few_at_a_time_and_jobs_follow_freely(monkeypatch: pytest.MonkeyPatch) -> None:
    class Jobs:
        over = False

        def __init__(self) -> None:
            self.numbers = iter(range(100))

        def next(self) -> dict[str, str]:
            return {"id": f"t{next(self.numbers)}"}

    up = 0
    searcher = StudySearcher(Jobs(), slots=3, at_once=1, num_up=lambda: up)

    def ask() -> str | None:
        suggested = searcher.suggest("")
        return suggested and suggested["job"]["id"]

    assert (ask(), ask(), ask()) == ("t0", None, None)
    up = 1
    assert (ask(), ask()) == ("t1", None)
    monkeypatch.setattr(tuning, "ALONE_S", 0.0)
    assert (ask(), ask(), ask()) == ("t2", "t3", "t4"), (
        "a slot that does not come up holds up nobody for long"
    )
    monkeypatch.undo()
    for told in (None, lambda: 0):
        all_at_once = StudySearcher(Jobs(), slots=3, at_once=3, num_up=told)
        assert [all_at_once.suggest("") is not None for _ in range(5)] == [True] * 5


def test_the_driver_needs_no_torch() -> None:
    code = "import sys, study.search, study.agenda, study.tuning; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parents[2]).returncode == 0
    code = "import sys, study.search, study.agenda; sys.exit(bool({'ray', 'optuna', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parents[2]).returncode == 0
