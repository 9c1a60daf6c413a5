"""``study/run.py`` as a person meets it: a whole small study, given again, extended, stopped, killed, refused."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import soundfile

from search_spaces import load
from study import presets
from study import run as command
from study.agenda import StudyFailed
from study.command import parse
from study.config import resolve
from study.dryrun import sampled_branches
from study.folder import StudyFolder
from study.outlet import Outlet
from study.preflight import preflight
from study.provenance import command_line, describe

# -- a whole study, one after the other: each test goes on where the one before has left it --------------------

slow = pytest.mark.slow


def records(study: Any) -> dict[str, list[int]]:
    """Epochs by job, as they stand in the files: an epoch written twice shows."""
    return {
        job_id: [json.loads(line)["epoch"] for line in (path / "records.jsonl").read_text().splitlines()]
        for job_id in study.folder.job_ids()
        if (path := study.folder.job_path(job_id)).joinpath("records.jsonl").exists()
    }


@slow
def test_a_study_runs_to_its_end(tiny_study: Any) -> None:
    said = tiny_study.said.splitlines()
    assert said[0] == f"study tiny; results in {tiny_study.folder.path}"
    assert any(line.startswith("first training step ") for line in said)
    assert any(line.startswith("Held-out machines") for line in said)
    assert any(line.startswith("findings ") for line in said)
    folder = tiny_study.folder
    jobs = folder.job_ids()
    assert {"b-teacher", "b-oracle", "t0000", "t0001", "c-teacher-s0", "c-oracle-s0", "c-paper-s0"} <= set(
        jobs
    )
    for job_id in jobs:
        result = folder.result(job_id)
        assert result is not None, job_id
        assert result["state"] == "finished", (job_id, result["reason"])
        assert folder.table(job_id), job_id
        student = not any(name in job_id for name in ("teacher", "oracle", "autoencoder"))
        assert records(tiny_study)[job_id] == ([1, 2] if student else [1])
    assert folder.job("t0000")["baseline"] == "paper"
    study = folder.study()
    assert study["hardware"]["cores"] >= 1
    assert study["hardware"]["memory_gb"] >= 1
    assert study["command"].startswith("python study/run.py --storage ") or "study/run.py" in study["command"]
    assert study["notes"] == []
    assert "held-out machines" in (folder.path / "findings.md").read_text()
    assert tiny_study.processes() == {}


@slow
def test_mlflow_mirrors_the_study(tiny_study: Any) -> None:
    runs = tiny_study.runs()
    (parent,) = (run for run in runs if run.get("role") == "study")
    children = {run["trial_id"]: run for run in runs if run is not parent}
    assert children.keys() == set(tiny_study.folder.job_ids())
    assert {run["mlflow.parentRunId"] for run in children.values()} == {parent["run_id"]}
    assert {run["status"] for run in runs} == {"FINISHED"}
    roles = {job_id: run["role"] for job_id, run in children.items()}
    assert roles["t0000"] == "trial"
    assert roles["b-teacher"] == "baseline"
    assert roles["c-paper-s0"] == "confirm"


@slow
def test_the_same_command_again_trains_nothing(tiny_study: Any) -> None:
    before = records(tiny_study)
    done = tiny_study.run("--trials", "2")
    assert done.returncode == 0, done.stderr
    assert "nothing is left to train" in done.stdout
    assert "starting Ray" not in done.stdout
    assert records(tiny_study) == before
    assert {run["status"] for run in tiny_study.runs()} == {"FINISHED"}


@slow
def test_ctrl_c_twice_ends_it_cleanly_and_a_second_driver_is_refused(
    tiny_study: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    process = tiny_study.start("--trials", "4")
    holder = tiny_study.folder.path / "driver.json"
    tiny_study.wait_for(lambda: json.loads(holder.read_text() or "{}").get("pid") == process.pid, "the lock")
    assert command.main(tiny_study.arguments("--trials", "4")) == 2
    assert f"is being run by process {process.pid} on " in capsys.readouterr().err

    lines = tiny_study.folder.job_path("t0002") / "records.jsonl"
    tiny_study.wait_for(lambda: lines.exists() or process.poll() is not None, "an epoch of the third trial")
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    while process.poll() is None and time.monotonic() - start < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "to go on, give the same command again" in err
    assert "--trials 4" in err
    tiny_study.wait_for(lambda: not tiny_study.processes(), "the end of Ray", 20)
    assert list((tiny_study.ray_folder / "ray").glob("session_2*")) == [], (
        "Ray's logs of an interrupted study"
    )
    assert {run["status"] for run in tiny_study.runs()} <= {"FINISHED", "KILLED"}


@slow
def test_a_killed_driver_loses_nothing_and_repeats_nothing(tiny_study: Any) -> None:
    process = tiny_study.start("--trials", "4")
    lines = tiny_study.folder.job_path("t0003") / "records.jsonl"
    tiny_study.wait_for(lambda: lines.exists() or process.poll() is not None, "an epoch of the fourth trial")
    process.kill()
    process.communicate()
    killed = tiny_study.processes()
    earlier = records(tiny_study)
    assert "t0003" in earlier

    done = tiny_study.run("--trials", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    after = records(tiny_study)
    trials = {job_id: epochs for job_id, epochs in after.items() if job_id.startswith("t")}
    assert trials.keys() == {"t0000", "t0001", "t0002", "t0003"}
    assert all(epochs == list(range(1, len(epochs) + 1)) for epochs in after.values())
    assert all(after[job_id][: len(epochs)] == epochs for job_id, epochs in earlier.items())
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tiny_study.folder.path / "optuna.journal"))
    )
    states = [t.state.name for t in optuna.load_study(study_name="search", storage=storage).trials]
    assert states.count("RUNNING") == 0
    assert states.count("COMPLETE") + states.count("PRUNED") == 4
    runs = tiny_study.runs()
    names = [run["trial_id"] for run in runs if "trial_id" in run and run.get("role") != "study"]
    assert len(names) == len(set(names))
    assert set(names) == set(tiny_study.folder.job_ids())
    assert "RUNNING" not in {run["status"] for run in runs}
    # A worker that was only starting looks for its dead node for a minute before it gives up.
    tiny_study.wait_for(
        lambda: not killed.keys() & tiny_study.processes().keys(), "the end of the killed Ray", 100
    )


# -- refused: one line, nothing started -------------------------------------------------------------------------


def write_stems(folder: Path, *, silent: bool = False, leave_out: str = "") -> Path:
    """A manifest of one machine and two places, and its recordings of half a second."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(4):
        rows += [
            f"bank{i},machine,pump,,normal,source,train,bank{i}",
            f"good{i},machine,pump,,normal,source,test,good{i}",
        ]
        rows += [f"bad{i},machine,pump,,anomaly,source,test,bad{i}"]
    for name, kind in (("hall", "stationary"), ("yard", "nonstationary")):
        for part, split in (("a", "train"), ("b", "test"), ("c", "test")):
            rows.append(f"{name}-{part},noise,{name},{kind},,,{split},{part}")
    folder.mkdir()
    for row in rows:
        wave = 0.1 * rng.standard_normal(8000)
        if silent and row.startswith("good2,"):
            wave *= 0
        soundfile.write(folder / f"{row.split(',')[0]}.wav", wave, 16_000)
    kept = [row.replace(",", ".wav,", 1) for row in rows if not (leave_out and f",{leave_out}," in row)]
    manifest = folder / "manifest.csv"
    manifest.write_text("path,role,name,kind,label,domain,split,recording\n" + "\n".join(kept) + "\n")
    return manifest


def stems(manifest: Path) -> list[str]:
    return ["--preset", "stems", "--set", f"corpus.manifest={manifest}", "--set", "corpus.clip_s=0.5"]


def silent(folder: Path) -> list[str]:
    return stems(write_stems(folder / "own", silent=True))


def without_noise(folder: Path) -> list[str]:
    return stems(write_stems(folder / "own", leave_out="nonstationary"))


def bad_row(folder: Path) -> list[str]:
    manifest = write_stems(folder / "own")
    manifest.write_text(manifest.read_text().replace("anomaly", "odd", 1))
    return stems(manifest)


def bad_column(folder: Path) -> list[str]:
    manifest = write_stems(folder / "own")
    manifest.write_text(manifest.read_text().replace("label", "lable", 1))
    return stems(manifest)


def file_in_the_way(folder: Path) -> list[str]:
    (folder / "taken").write_text("")
    return ["--storage", str(folder / "taken" / "runs")]


def words(*arguments: str) -> Callable[[Path], list[str]]:
    return lambda folder: list(arguments)


REFUSALS: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "unknown key": (words("--set", "training.epoch=3"), ["training.epoch", "did you mean training.epochs"]),
    "unknown option": (words("--trails", "3"), ["--trails", "did you mean --trials"]),
    "unknown preset": (words("--preset", "quik"), ["quik", "did you mean quick", "stems"]),
    "wrong type": (words("--set", "training.epochs=many"), ["training.epochs", "'many'", "a whole number"]),
    "no such precision": (words("--set", "training.precision=float8"), ["'float8'", "bfloat16"]),
    "no such back end": (words("--set", "scoring.backend=foo"), ["'foo'", "knn1_domain_z"]),
    "clips too short": (words("--set", "corpus.clip_s=0.2"), ["corpus.clip_s = 0.2", "0.5"]),
    "no manifest": (words("--preset", "stems"), ["corpus.manifest"]),
    "missing manifest": (lambda folder: stems(folder / "none.csv"), ["none.csv"]),
    "malformed row": (bad_row, ["manifest.csv", "label", "'odd'", "anomaly"]),
    "malformed column": (bad_column, ["manifest.csv", "lable", "label"]),
    "silent recording": (silent, ["good2.wav", "silent"]),
    "no nonstationary noise": (without_noise, ["nonstationary"]),
    "more workers than there are": (
        words("--set", "slots.count=4096"),
        ["this machine has", "for example"],
    ),
    "a file in the way": (file_in_the_way, ["--storage", "taken is a file"]),
    "no tracking server": (
        words("--tracking-uri", "http://127.0.0.1:9"),
        ["127.0.0.1:9", "connection refused"],
    ),
}


def test_a_recording_that_has_changed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write_stems(tmp_path / "own")
    arguments = ["--storage", str(tmp_path / "storage"), "--name", "mine", *stems(manifest)]
    given = parse(arguments)
    folder, found = StudyFolder(given.folder), preflight(given.config, given.storage, given.tracking_uri)
    folder.write_study(describe(given.config, folder, found))
    folder.write_corpus_files(found.files)
    for name in ("good1", "bad3"):
        wave, rate_hz = soundfile.read(manifest.parent / f"{name}.wav")
        soundfile.write(manifest.parent / f"{name}.wav", 0.5 * wave[::-1], rate_hz)
    assert command.main(arguments) == 2
    said = capsys.readouterr()
    assert "bad3.wav, good1.wav have changed since this study began; put the recordings back" in said.err
    assert said.err.count("\n") == 1
    assert "starting Ray" not in said.out


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_work_is_refused_in_one_line_before_anything_starts(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ray_folder, storage = tmp_path / "ray", tmp_path / "storage"
    ray_folder.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(ray_folder))
    make, expected = REFUSALS[what]
    start = time.process_time()
    assert command.main(["--storage", str(storage), "--name", "mine", *make(tmp_path)]) == 2
    assert time.process_time() - start < 15
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1, said.err
    for part in expected:
        assert part in said.err, said.err
    assert "starting Ray" not in said.out
    assert list(ray_folder.iterdir()) == []
    assert not (storage / "mine").exists()


def test_a_refusal_as_the_shell_sees_it(root: Path, tmp_path: Path) -> None:
    words = [sys.executable, "study/run.py", "--storage", str(tmp_path), "--set", "search.trials=0"]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: search.trials = 0")


# -- looked at, and not started ---------------------------------------------------------------------------------


def test_a_dry_run_shows_every_branch_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--storage", str(tmp_path / "runs"), "--name", "dry", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("study dry (dry run: nothing is started)")
    for key, kinds in load("retain").BRANCHES.items():
        for kind in kinds:
            assert f"\n  {key}={kind}: {{" in said
    for part in (
        "2 slots x 1 worker",
        "12 trials",
        '"batch_size": 32',
        "paper (tried first)",
        "tracking   sqlite:",
    ):
        assert part in said, part
    assert not (tmp_path / "runs").exists()


def test_a_sampled_trial_is_of_its_branch() -> None:
    config, system = presets.load("quick"), load("retain")
    found = list(sampled_branches(config, system))
    assert len(found) == sum(len(kinds) for kinds in system.BRANCHES.values())
    for label, params in found:
        key, _, kind = label.partition("=")
        assert params[key] == kind


@pytest.mark.parametrize("systems", ["identify", "[retain,identify]"])
def test_a_sampled_trial_has_what_is_fixed(systems: str) -> None:
    fixed = ["search.fixed.network_kind=encoder", "search.fixed.learning_rate=0.002"]
    config = resolve(presets.load("quick"), [f"system={systems}", *fixed])
    found = dict(sampled_branches(config, load(config.system)))
    assert "network_kind=encoder" in found
    assert "network_kind=stgram" not in found
    for params in found.values():
        assert params["learning_rate"] == 0.002
        assert params.get("network_kind", "encoder") == "encoder"


def test_a_reader_that_leaves_ends_nothing(root: Path, tmp_path: Path) -> None:
    asked = f"{sys.executable} study/run.py --dry-run --storage {tmp_path / 'runs'}"
    script = f"{asked} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    first, code = done.stdout.splitlines()
    assert first.startswith("study quick-")
    assert code == "0"
    assert done.stderr == ""


def test_output_after_a_closed_pipe_goes_nowhere() -> None:
    reader, writer = os.pipe()
    stream = io.TextIOWrapper(os.fdopen(writer, "wb"), write_through=True)
    outlet = Outlet(stream)
    os.close(reader)
    for _ in range(3):
        print("x" * 100_000, file=outlet, flush=True)
    stream.close()  # what was buffered has found a place


def test_the_command_is_kept_without_its_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "http://me:geheim@host:5000/?token=geheim"
    monkeypatch.setattr(
        sys, "argv", ["study/run.py", "--tracking-uri", uri, f"--tracking-uri={uri}", "--set", "a=b c"]
    )
    line = command_line()
    assert "geheim" not in line
    assert line.endswith("--set 'a=b c'")


# -- how a study ends -------------------------------------------------------------------------------------------


class Recorder:
    """A tracker that remembers how it was ended."""

    ended: list[str]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        type(self).ended = []

    def start(self, *arguments: Any) -> None: ...

    def finish(self, status: str) -> None:
        self.ended.append(status)

    def close(self, timeout_s: float) -> None:
        self.ended.append(f"{timeout_s:g} s")


@pytest.mark.parametrize(
    ("error", "code", "status", "flush"),
    [
        (StudyFailed("every trial failed"), 1, "FAILED", "60 s"),
        (KeyboardInterrupt(), None, "KILLED", "5 s"),
        (RuntimeError("a defect"), None, "FAILED", "60 s"),
    ],
)
def test_the_tracker_hears_of_every_end(
    error: BaseException,
    code: int | None,
    status: str,
    flush: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr("study.tracking.Tracker", Recorder)
    monkeypatch.setattr(command, "run_all_jobs", fail)
    asked = parse(["--storage", str(tmp_path)])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    folder, made = StudyFolder(asked.folder), object()
    try:
        if code is None:
            with pytest.raises(type(error)):
                command.search_and_report(asked, folder, {}, search=None, rendering=made)  # type: ignore[arg-type]
        else:
            assert command.search_and_report(asked, folder, {}, search=None, rendering=made) == code  # type: ignore[arg-type]
            assert "error: the study failed: every trial failed" in capsys.readouterr().err
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert ignored == isinstance(error, KeyboardInterrupt)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert Recorder.ended == [status, flush]


def test_a_defect_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any) -> None:
        raise KeyError("odd")

    monkeypatch.setattr(command, "run", broken)
    assert command.main(["--storage", str(tmp_path), "--name", "mine"]) == 1
    assert "error: unexpected KeyError: 'odd'; the traceback is kept in" in capsys.readouterr().err
    kept = (tmp_path / "mine" / "traceback.txt").read_text()
    assert kept.startswith("Traceback")
    assert "in broken" in kept


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN])  # the second: started with &
def test_sigterm_ends_a_study_as_ctrl_c_does(
    ctrl_c: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, before_ctrl_c = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, ctrl_c)
    monkeypatch.setattr(command, "run", lambda asked: signal.raise_signal(signal.SIGTERM))
    try:
        assert command.main([]) == 130
    finally:
        signal.signal(signal.SIGINT, before_ctrl_c)
    assert "to go on, give the same command again" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
