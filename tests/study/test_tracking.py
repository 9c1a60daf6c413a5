"""The MLflow mirror: what a study looks like there, also after it was resumed, and what is refused."""

from __future__ import annotations

import json
import sqlite3
import threading
from typing import Any

import pytest

from study import tracking
from study.spool import Spool
from study.tracking import redact
from tests.study.mirrored_study import DELIVERY_S, Study, empty_store, job, record, result, until


def test_contract(study: Study) -> None:
    tracker = study.tracker
    tracker.start(study.json, "Searches lambda.")
    teacher = job("b-teacher", role="baseline", baseline="teacher", label="frozen teacher", params={})
    study.begin(teacher)
    study.report(teacher, 1, table=True)
    study.end(teacher, result(1))
    wide = {f"knob{i}": i for i in range(150)} | {"lambda_kind": "ramp", "essay": "x" * 7000}
    trial, paper = job(params=wide), job("t0000", baseline="paper", label="constant, fixed, fixed")
    study.begin(trial)
    for epoch in (1, 2, 3):
        study.report(trial, epoch, table=epoch == 3)
    study.end(trial, result(3))
    study.begin(paper)
    study.report(paper, 1)
    study.end(paper, result(1, "stopped"))
    broken = job("t0004")
    study.begin(broken)
    study.end(broken, result(1, "failed", "loss is not a number"))
    again = job("c-best-s1", role="confirm", label="best")
    study.begin(again)
    findings = study.folder.path / "findings.md"
    findings.write_text("# Findings\n")
    tracker.log_artifacts([findings])
    tracker.set_parent({"best/official": 63.0, "nan": float("nan")}, {"winner": "t0003"})
    tracker.finish("FINISHED")
    assert tracker.close(DELIVERY_S) == 0

    runs = study.runs()
    parent = runs.pop("quick")
    assert parent.data.tags["role"] == "study"
    assert parent.data.tags["winner"] == "t0003"
    assert parent.data.metrics == {"best/official": 63.0}
    assert parent.data.params["search.trials"] == "12"
    assert parent.info.status == "FINISHED"
    note = parent.data.tags["mlflow.note.content"]
    assert note.startswith("Searches lambda.")
    assert "1 failed, 1 finished, 1 stopped" in note
    assert "**t0003 snr_sigmoid / self_paced / dwa**, official 63.0" in note
    assert study.artifacts("quick") == ["findings.md"]
    assert study.experiment.tags["mlflow.experiment.primaryMetric.name"] == "official"
    assert study.experiment.artifact_location == str(study.root / "mlartifacts" / "quick")

    assert set(runs) == {"b-teacher", "t0003", "t0000", "t0004", "c-best-s1"}
    tags = {name: run.data.tags for name, run in runs.items()}
    for name, run in runs.items():
        assert tags[name]["mlflow.parentRunId"] == parent.info.run_id
        assert tags[name]["trial_id"] == name
        assert tags[name]["system"] == "retain"
        assert run.data.params["training.epochs"] == "6"
        assert "cache" not in str(run.data.params)
    assert [tags[n]["role"] for n in ("b-teacher", "t0003", "c-best-s1")] == ["baseline", "trial", "confirm"]
    assert {n: t["baseline"] for n, t in tags.items() if "baseline" in t} == {
        "b-teacher": "teacher",
        "t0000": "paper",
    }
    states = {name: (tags[name]["state"], run.info.status) for name, run in runs.items()}
    assert states == {
        "b-teacher": ("finished", "FINISHED"),
        "t0003": ("finished", "FINISHED"),
        "t0000": ("stopped", "FINISHED"),
        "t0004": ("failed", "FAILED"),
        "c-best-s1": ("interrupted", "KILLED"),
    }
    assert tags["t0004"]["reason"] == "loss is not a number"
    assert "loss is not a number" in tags["t0004"]["mlflow.note.content"]
    assert "Official score 63.0" in tags["t0003"]["mlflow.note.content"]
    assert runs["t0003"].info.run_name == "t0003 snr_sigmoid / self_paced / dwa"
    assert runs["t0000"].info.run_name == "t0000 paper: constant / fixed / fixed"

    trial_params = runs["t0003"].data.params
    assert trial_params["knob149"] == "149"
    assert trial_params["lambda_kind"] == "ramp"
    assert trial_params["scoring.bands_db.low"] == "[-10.0, 0.0]"
    assert len(trial_params["essay"]) == 6000
    assert "encoder.checkpoint" not in trial_params
    assert study.steps("t0003") == [1, 2, 3]
    assert study.steps("t0003", "mismatched/low/official") == [1, 2, 3]
    assert runs["t0003"].data.metrics["official"] == 63.0
    assert study.artifacts("t0003") == study.artifacts("b-teacher") == ["job.json", "knn.json"]
    assert study.artifacts("t0000") == ["job.json"]
    table = study.root / f"mlartifacts/quick/{runs['t0003'].info.run_id}/artifacts/knn.json"
    assert json.loads(table.read_text())["rows"] == [{"machine": "fan", "official": 61.0}]


def test_resume_continues_the_same_runs(study: Study) -> None:
    done, cut = job("t0001"), job("t0002")
    study.tracker.start(study.json, "")
    study.begin(done)
    study.report(done, 1)
    study.end(done, result(1))
    study.begin(cut)
    study.report(cut, 1)
    study.tracker.finish("KILLED")
    assert study.tracker.close(DELIVERY_S) == 0
    before = study.runs()
    assert (before["quick"].info.status, before["t0002"].info.status) == ("KILLED", "KILLED")

    tracker = study.open()
    tracker.start({**study.json, "config": {"search": {"trials": 20}}}, "")
    until(lambda: study.runs()["quick"].info.status == "RUNNING")
    tracker.job_started(done)  # says nothing new
    tracker.job_started(cut)
    for epoch in (1, 2):  # a restarted trial repeats what its checkpoint holds
        tracker.job_reported(cut, record(epoch))
    until(lambda: study.runs()["t0002"].info.status == "RUNNING")
    tracker.job_ended(cut, result(2))
    tracker.finish("FINISHED")
    assert tracker.close(DELIVERY_S) == 0
    after = study.runs()
    assert {n: r.info.run_id for n, r in after.items()} == {n: r.info.run_id for n, r in before.items()}
    assert {r.info.status for r in after.values()} == {"FINISHED"}
    assert study.steps("t0001") == [1]
    assert study.steps("t0002") == [1, 2]
    assert after["quick"].data.params["search.trials"] == "12"

    # Everything once more, as after the loss of the cursor.
    (study.folder.path / "spool" / "cursors.json").unlink()
    tracker = study.open()
    tracker.start(study.json, "")
    tracker.finish("FINISHED")
    assert tracker.close(DELIVERY_S) == 0
    assert study.runs(deleted=True).keys() == before.keys()
    assert study.steps("t0001") == [1]
    assert study.steps("t0002") == [1, 2]
    assert {r.info.status for r in study.runs().values()} == {"FINISHED"}


def test_mlflow_may_wait_for_the_first_epoch_of_a_training(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = tracking.Tracker(study.uri, study.name, study.folder, patience_s=600)
    connected = threading.Event()
    connect = tracker._mirror.connect
    monkeypatch.setattr(tracker._mirror, "connect", lambda told: (connected.set(), connect(told)))
    study.tracker = tracker
    teacher, trial = job("b-teacher", role="baseline", baseline="teacher"), job("t0001")
    tracker.start(study.json, "")
    study.begin(teacher)
    study.report(teacher, 1)
    study.end(teacher, result(1))
    study.begin(trial)
    assert not connected.wait(0.3)
    study.report(trial, 1)
    assert connected.wait(60)
    assert tracker.close(DELIVERY_S) == 0
    assert study.steps("t0001") == [1]


def test_closing_does_not_wait_for_an_epoch(study: Study) -> None:
    tracker = tracking.Tracker(study.uri, study.name, study.folder, patience_s=600)
    tracker.start(study.json, "")
    tracker.finish("KILLED")
    assert tracker.close(DELIVERY_S) == 0
    assert study.runs()["quick"].info.status == "KILLED"


@pytest.fixture(params=[tracking.COMPACT_BYTES, 0], ids=["events", "summed up"])
def compacted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether trackers sum up at their end what they have delivered."""
    monkeypatch.setattr(tracking, "COMPACT_BYTES", request.param)
    return request.param == 0


def test_delivered_events_are_summed_up_and_not_told_again(study: Study, compacted: bool) -> None:
    first, second = job("t0001"), job("t0002")
    for trial in (first, second):
        study.open().start(study.json, "Searches lambda.")
        study.begin(trial)
        for epoch in (1, 2, 3):
            study.report(trial, epoch, table=True)
        study.end(trial, result(3))
        study.tracker.finish("FINISHED")
        assert study.tracker.close(DELIVERY_S) == 0
    events = (study.folder.path / "spool" / "events.jsonl").read_text().splitlines()
    kinds = [json.loads(event)["kind"] for event in events]
    assert (kinds == ["told"]) is compacted
    assert study.steps("t0001") == study.steps("t0002") == [1, 2, 3]  # each value once
    note = study.runs()["quick"].data.tags["mlflow.note.content"]
    assert "2 finished" in note
    assert "**t0001 snr_sigmoid / self_paced / dwa**, official 63.0" in note


@pytest.mark.usefixtures("compacted")
def test_what_the_driver_could_not_say_is_found_in_the_folder(study: Study) -> None:
    """Killed between writing the study's files and telling the tracker."""
    trial, teacher = job("t0001"), job("b-oracle", role="baseline", baseline="oracle")
    study.tracker.start(study.json, "")
    study.begin(trial)
    study.report(trial, 1)
    assert study.tracker.close(DELIVERY_S) == 0
    study.folder.append_record("t0001", {**record(2), "table": [{"machine": "fan"}]})
    study.folder.write_result("t0001", result(2))
    study.folder.write_job(teacher)
    study.folder.append_record("b-oracle", record(1))
    study.folder.write_result("b-oracle", {**result(1), "started": "2025-01-01T12:00:00+00:00"})
    tracker = study.open()
    tracker.start(study.json, "")
    assert tracker.close(DELIVERY_S) == 0
    runs = study.runs()
    assert runs["t0001"].info.status == runs["b-oracle"].info.status == "FINISHED"
    assert runs["b-oracle"].info.end_time - runs["b-oracle"].info.start_time == 41_200  # as long as it took
    assert study.steps("t0001") == [1, 2]
    assert study.artifacts("t0001") == ["job.json", "knn.json"]


@pytest.mark.usefixtures("compacted")
def test_another_or_an_emptied_store_gets_the_whole_study(study: Study) -> None:
    def run_through() -> None:
        tracker = study.open()
        tracker.start(study.json, "")
        tracker.finish("FINISHED")
        assert tracker.close(DELIVERY_S) == 0
        assert study.steps("t0001") == [1, 2]

    trial = job("t0001")
    study.tracker.start(study.json, "")
    study.begin(trial)
    study.report(trial, 1)
    study.report(trial, 2)
    study.end(trial, result(2))
    assert study.tracker.close(DELIVERY_S) == 0
    first = study.uri
    study.uri = f"sqlite:///{study.root}/other.db"
    (study.root / "other.db").write_bytes(empty_store())
    run_through()
    client = study.client
    client.delete_experiment(study.experiment.experiment_id)
    run_through()
    study.uri = first
    run_through()
    with sqlite3.connect(study.root / "mlflow.db") as db:
        for table in ("latest_metrics", "metrics", "tags", "params", "runs"):
            db.execute(f"DELETE FROM {table}")
    db.close()
    run_through()


def test_a_run_created_twice_by_a_slow_server_is_deleted(study: Study) -> None:
    trial = job("t0001")
    study.tracker.start(study.json, "")
    study.begin(trial)
    study.report(trial, 1)
    run = until(lambda: study.experiment and study.runs().get("t0001"))
    study.client.create_run(study.experiment.experiment_id, tags=run.data.tags, start_time=0)
    study.tracker.finish("FINISHED")
    assert study.tracker.close(DELIVERY_S) == 0
    assert study.runs()["t0001"].info.run_id == run.info.run_id


def test_a_refused_event_does_not_hold_up_the_others(study: Study, caplog: pytest.LogCaptureFixture) -> None:
    plot = study.root / "plot.png"
    study.tracker.start(study.json, "")
    study.tracker.log_artifacts([plot])
    study.tracker.set_parent({"official": 61.0}, {})
    assert study.tracker.close(DELIVERY_S) == 0
    assert study.runs()["quick"].data.metrics == {"official": 61.0}
    assert [m for m in caplog.messages if "plot.png is not there any more" in m]
    assert "1 refused" in caplog.messages[-1]
    plot.write_bytes(b"png")
    tracker = study.open()
    tracker.start(study.json, "")
    assert tracker.close(DELIVERY_S) == 0
    assert study.artifacts("quick") == ["plot.png"]


def test_refused_events_are_offered_again(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import INVALID_PARAMETER_VALUE, MlflowException

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise MlflowException("no", INVALID_PARAMETER_VALUE)

    study.tracker.start(study.json, "")
    study.begin(job())
    until(lambda: study.experiment and "t0003" in study.runs())
    until(lambda: Spool(study.folder.path / "spool", redact(study.uri)).num_waiting() == 0)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", refuse)
        study.report(job(), 1)
        study.end(job(), result(1))
        assert study.tracker.close(DELIVERY_S) == 0
    assert study.runs()["t0003"].info.status == "RUNNING"
    study.open().start(study.json, "")
    assert study.tracker.close(DELIVERY_S) == 0
    assert study.runs()["t0003"].info.status == "FINISHED"
    assert study.steps("t0003") == [1]


def test_a_place_for_artifacts_that_fails_does_not_hold_up_the_rest(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(tracking, "PATIENCE_S", 0.03)
    spool = study.folder.path / "spool"
    (study.root / "mlartifacts").write_text("a file where a folder should be")
    trial = job("t0001")
    study.tracker.start(study.json, "")
    study.begin(trial)
    study.report(trial, 1, table=True)
    study.end(trial, result(1))
    until(lambda: Spool(spool, "").num_refused() == 1)
    study.tracker.log_artifacts([study.folder.path / "study.json"])
    study.tracker.finish("FINISHED")
    assert study.tracker.close(DELIVERY_S) == 0  # and when closing, patience is shorter
    assert Spool(spool, "").num_refused() == 2
    assert {run.info.status for run in study.runs().values()} == {"FINISHED"}


def test_runs_hold_their_data_set(study: Study) -> None:
    data = {"name": "factory", "digest": "0123456789ab", "source": {"path": "/recordings/list.csv"}}
    data |= {"counts": {"search": {"clips": 40}, "confirm": {"clips": 20}}}
    trial, confirmation = job("t0001"), job("c-best-s0", role="confirm")
    confirmation["trial"] = {**confirmation["trial"], "split": "confirm"}
    config = {**study.json["config"], "confirm": {"seeds": 1}}
    for _ in range(2):  # told again, nothing changes
        study.open().start({**study.json, "data": data, "config": config}, "")
        for a_job in (trial, confirmation):
            study.begin(a_job)
        assert study.tracker.close(DELIVERY_S) == 0
        (study.folder.path / "spool" / "cursors.json").unlink()
    found = {
        name: [(i.dataset.name, i.dataset.digest, i.tags[0].value) for i in run.inputs.dataset_inputs]
        for name, run in study.runs().items()
    }
    search, confirm = (
        ("factory-search", "0123456789ab", "search"),
        ("factory-confirm", "0123456789ab", "confirm"),
    )
    assert sorted(found.pop("quick")) == [confirm, search]
    assert found == {"t0001": [search], "c-best-s0": [confirm]}
    dataset = study.runs()["t0001"].inputs.dataset_inputs[0].dataset
    assert json.loads(dataset.profile) == {"clips": 40}
    assert "/recordings/list.csv" in dataset.source


def test_a_job_found_in_the_folder_keeps_its_duration(study: Study) -> None:
    trial = job("t0001")
    study.folder.write_job(trial)
    study.folder.append_record("t0001", record(1))
    ended = {**result(1), "started": "2025-01-01T12:00:00+00:00", "duration_s": 41.5}
    study.folder.write_result("t0001", ended)
    study.tracker.start(study.json, "")
    assert study.tracker.close(DELIVERY_S) == 0
    info = study.runs()["t0001"].info
    assert (info.start_time, info.end_time - info.start_time) == (1_735_732_800_000, 41_500)
