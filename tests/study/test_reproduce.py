"""A trial run again from MLflow: its numbers, the words about them, and the refusals before anything is computed."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from study import provenance, reproduce, run
from study.recorded import Recorded, read
from study.reproduce import Comparison, differences
from tests.study.mirrored_study import Study, job, record, result
from trainables.errors import UserError


def ended(study: Study, a_job: dict[str, Any], **facts: Any) -> str:
    """A finished job of a study with these facts; the id of its run."""
    study.tracker.start({**study.json, **facts}, "")
    study.begin(a_job)
    for epoch in (1, 2):
        study.report(a_job, epoch, table=epoch == 2)
    study.end(a_job, {**result(2, "stopped"), "num_workers": 2})
    assert study.tracker.close(60) == 0
    return str(study.runs()[a_job["id"]].info.run_id)


def test_all_it_takes_is_in_mlflow(study: Study) -> None:
    hardware = {"processor": "a chip", "system": "Linux"}
    run_id = ended(study, job(), corpus="c0ffee", files={"corpus.manifest": "d1"}, grid=3, hardware=hardware)
    shutil.rmtree(study.folder.path / "jobs")
    (study.folder.path / "study.json").unlink()
    found = read(run_id, study.uri)
    assert found.job == {k: v for k, v in job().items() if k not in ("entry", "cache_dir")}
    assert (found.facts["corpus"], found.facts["grid"], found.facts["num_workers"]) == ("c0ffee", 3, 2)
    assert (found.facts["files"], found.facts["hardware"]) == ({"corpus.manifest": "d1"}, hardware)
    assert (found.state, found.epoch, found.facts["versions"]) == ("stopped", 2, {"ray": "2.60.0"})
    assert found.curves[2]["official"] == record(2)["metrics"]["official"]
    assert found.table == [{"machine": "fan", "official": 61.0}]
    assert not any(name.endswith("_s") for name in found.curves[1])


def test_a_run_that_is_no_trial_is_refused(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    run_id = ended(study, job(), corpus="another corpus")
    client = study.client
    open_one = client.create_run(study.experiment.experiment_id, tags={"trial_id": "t9", "study": "quick"})
    foreign = client.create_run(study.experiment.experiment_id, run_name="somebody's")

    def refused(asked: str, *more: str) -> str:
        capsys.readouterr()
        code = run.main(
            ["--reproduce", asked, "--storage", str(study.root), "--tracking-uri", study.uri, *more]
        )
        said = capsys.readouterr()
        assert (code, said.out) == (2, "")
        assert said.err.startswith(f"error: --reproduce {asked}: ")
        assert said.err.count("\n") == 1
        return said.err

    assert "has no such run" in refused("0" * 32)
    assert "has no such run" in refused("t0003")
    assert "the study quick, not one of its trials" in refused(study.runs()["quick"].info.run_id)
    assert "somebody's is no trial of this project" in refused(foreign.info.run_id)
    assert "t9 has no job.json" in refused(open_one.info.run_id)
    assert "the built-in factory has changed since" in refused(run_id)
    assert "leave out --trials and --dry-run" in refused(run_id, "--trials", "3", "--dry-run")
    with pytest.raises(UserError, match=r"there is no .*nowhere\.db"):
        read(run_id, f"sqlite:///{study.root}/nowhere.db")
    assert not (study.root / "nowhere.db").exists()


def test_a_file_that_changed_or_went_is_named(tmp_path: Path) -> None:
    from study.config import file_digests
    from trainables.settings import TrialConfig, build

    weights = tmp_path / "weights.pt"
    weights.write_text("one")
    trial = build(TrialConfig, {"encoder": {"name": "beats", "checkpoint": str(weights)}})
    facts = {"job": job(), "files": file_digests(trial)}
    recorded = Recorded(run_id="r", facts=facts, state="finished", reason="", curves={}, table=[])
    weights.write_text("two")
    with pytest.raises(UserError, match=r"encoder.checkpoint = .*weights.pt has changed since"):
        reproduce.check_inputs(recorded, trial, tmp_path / "cache")
    weights.unlink()
    with pytest.raises(UserError, match=r"weights.pt is gone"):
        reproduce.check_inputs(recorded, trial, tmp_path / "cache")


def recorded(state: str = "finished", reason: str = "", **facts: Any) -> Recorded:
    here = reproduce.here()
    facts = {
        "job": job(),
        "versions": here,
        "hardware": {"processor": provenance.processor(), "system": here["system"]},
        "num_workers": 1,
        **facts,
    }
    curves = {1: {"official": 60.0, "loss_total": 2.0}, 2: {"official": 61.0, "loss_total": 1.5}}
    return Recorded(run_id="r", facts=facts, state=state, reason=reason, curves=curves, table=[])


def again(epoch: int, official: float, loss: float) -> dict[str, Any]:
    return {"epoch": epoch, "metrics": {"official": official, "loss_total": loss, "epoch_s": 1.0}}


def test_what_keeps_numbers_from_being_equal() -> None:
    assert list(differences(recorded())) == []
    older = recorded(versions={**reproduce.here(), "torch": "1.0"}, num_workers=2)
    torch, workers = differences(older)
    assert torch.endswith("then 1.0")
    assert workers == "one process, then 2 workers that shared each batch"
    assert any(d.startswith("processor") for d in differences(recorded(hardware={"processor": "a chip"})))


@pytest.mark.parametrize(
    ("exact", "second", "agrees"),
    [
        (True, again(2, 61.0, 1.5), True),
        (True, again(2, 61.0 + 1e-12, 1.5), False),
        (False, again(2, 61.4, 1.51), True),
        (False, again(2, 61.6, 1.5), False),
        (False, again(2, 61.0, 1.6), False),
        (False, again(2, float("nan"), 1.5), False),
        (False, {"epoch": 2, "metrics": {"official": 61.0}}, False),
    ],
)
def test_bits_on_the_same_machine_a_tolerance_elsewhere(
    exact: bool, second: dict[str, Any], agrees: bool
) -> None:
    found = Comparison(recorded(), exact=exact)
    found.epoch(again(1, 60.0, 2.0))
    assert not found.agree(None)  # an epoch is missing
    found.epoch(second)
    assert found.agree(None) == agrees
    last = list(found.verdict(None))[-1]
    assert last.startswith("the numbers agree" if agrees else "the numbers do not agree")


def test_a_failed_trial_has_to_fail_again() -> None:
    found = Comparison(recorded("failed", "loss align is nan"), exact=True)
    for epoch, official, loss in ((1, 60.0, 2.0), (2, 61.0, 1.5)):
        found.epoch(again(epoch, official, loss))
    assert found.agree("loss align is nan")
    assert not found.agree(None)
    assert not found.agree("out of memory")
    assert "it does not fail as it did then: loss align is nan" in list(found.verdict(None))


@pytest.mark.slow
def test_trials_of_a_real_study_come_out_again(tiny_study: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A published recipe, the frozen teacher and a confirmation; then one whose record was tampered with."""
    ids = {tags["trial_id"]: tags["run_id"] for tags in tiny_study.runs() if "trial_id" in tags}

    def ask(name: str) -> tuple[int, str]:
        capsys.readouterr()
        code = run.main(["--reproduce", ids[name], "--storage", str(tiny_study.storage)])
        said = capsys.readouterr()
        assert not said.err
        return code, said.out

    for name in ("t0001", "b-teacher", "c-paper-s0"):
        code, out = ask(name)
        assert code == 0, out
        assert "same machine, same versions" in out
        assert "the numbers agree" in out
    with sqlite3.connect(tiny_study.storage / "mlflow.db") as db:
        where = (ids["b-teacher"], "official")  # the quickest of them
        old = db.execute("SELECT value FROM metrics WHERE run_uuid = ? AND key = ? AND step = 1", where)
        ((value,),) = old.fetchall()
        change = "UPDATE metrics SET value = ? WHERE run_uuid = ? AND key = ? AND step = 1"
        db.execute(change, (value + 1e-9, *where))
    try:
        code, out = ask("b-teacher")
    finally:
        with sqlite3.connect(tiny_study.storage / "mlflow.db") as db:
            db.execute(change, (value, *where))
    assert code == 1
    assert "differs: official in epoch 1" in out
    assert "the numbers do not agree" in out
