"""A probe: its jobs, its ranking from the study's folder, its report, and a whole one on a real Ray."""

from __future__ import annotations

import csv
import io
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from study import presets, probe, probe_report
from study.agenda import Agenda, StudyFailed
from study.command import parse
from study.config import StudyConfig, identity, resolve
from study.dryrun import dry_run
from study.folder import StudyFolder
from study.probe import Probe, rank, readings_of, shares
from study.progress import Progress
from trainables.errors import UserError
from trainables.scoring.backends import backends

BACKENDS = ("knn1", "knn1_domain_z", "knn1_domain_z_test")
SUBSETS = ("stationary", "nonstationary", "mismatched")


@pytest.fixture
def config() -> StudyConfig:
    return resolve(presets.load("probe"), ["encoder.layer=4"], name="mine")


@pytest.fixture
def opened(config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Probe:
    """A probe of an encoder with two layers and bands."""
    monkeypatch.setattr(probe, "encoder_layout", lambda *_: (2, 8))
    return Probe(config, StudyFolder(tmp_path / "mine"), cache_dir=tmp_path / "cache")


def points(layer: int, pooling: str, backend: str) -> float:
    """Additive: the layer moves most, the pooling least."""
    return 60.0 + 10 * layer + (pooling == "bands") + 4 * BACKENDS.index(backend)


def table(layer: int, pooling: str, low: float = 5.0) -> list[dict[str, Any]]:
    rows = []
    for backend, subset, band in itertools.product(BACKENDS, SUBSETS, ("low", "mid", "high")):
        value = points(layer, pooling, backend) - (low if band == "low" else 0.0)
        cell = {"machine": "m", "subset": subset, "band": band, "backend": backend}
        rows.append({**cell, **dict.fromkeys(("s_auc", "t_auc", "pauc", "official"), value)})
    return rows


def run(opened: Probe, *, last: bool = True) -> None:
    """Every job to its end; without ``last``, the last one fails."""
    agenda = Agenda(opened, after_search=list)
    while (job := agenda.next()) is not None:
        agenda.started(job["id"])
        encoder = job["trial"]["encoder"]
        if not last and job["id"] == opened.jobs[-1]["id"]:
            agenda.reported(job["id"], {"done": True, "failed": "no memory", "epoch": 0})
        else:
            rows = table(encoder["layer"], encoder["pooling"])
            record = {"epoch": 1, "epochs": 1, "done": True, "metrics": {"official": 50.0}, "table": rows}
            agenda.reported(job["id"], {"epoch": 1, "failed": None, "record": record})
        agenda.ended(job["id"])
    assert agenda.over


# -- jobs -------------------------------------------------------------------------------------------------------


def test_every_layer_with_every_pooling_it_has() -> None:
    assert readings_of(2, 8) == [(1, "bands"), (1, "mean"), (2, "bands"), (2, "mean")]
    assert readings_of(3, 1) == [(1, "mean"), (2, "mean"), (3, "mean")]


def test_a_job_reads_one_layer_and_trains_nothing(opened: Probe, tmp_path: Path) -> None:
    job = opened.ask()
    assert job is not None
    assert (job["id"], job["role"], job["label"]) == ("t0000", "trial", "layer 1, bands")
    assert job["entry"] == "trainables.layers:probe"
    assert (job["trial"]["system"], job["trial"]["split"], job["trial"]["params"]) == ("frozen", "search", {})
    assert (job["trial"]["encoder"]["layer"], job["trial"]["encoder"]["pooling"]) == (1, "bands")
    assert job["cache_dir"] == str(tmp_path / "cache")
    assert StudyFolder(tmp_path / "mine").job("t0000") == job


def test_what_has_ended_is_not_asked_for_again(opened: Probe, config: StudyConfig, tmp_path: Path) -> None:
    assert not opened.over
    first = opened.ask()
    assert first is not None
    opened.folder.append_record(first["id"], {"epoch": 1, "metrics": {}})
    opened.folder.write_result(first["id"], {"state": "finished", "reason": None, "metrics": {}})
    again = Probe(config, opened.folder, cache_dir=tmp_path / "cache")
    assert [job["id"] for job in iter(again.ask, None)] == ["t0001", "t0002", "t0003"]
    run(Probe(config, opened.folder, cache_dir=tmp_path / "cache"))
    assert again.over


def test_a_probe_whose_jobs_all_fail_says_why(opened: Probe) -> None:
    agenda = Agenda(opened, after_search=list)

    def fail_all() -> None:
        while (job := agenda.next()) is not None:
            agenda.started(job["id"])
            agenda.reported(job["id"], {"done": True, "failed": "no memory", "epoch": 0})
            agenda.ended(job["id"])

    with pytest.raises(StudyFailed, match=r"every trial failed.*no memory"):
        fail_all()
    assert not opened.over


def test_an_encoder_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    config = resolve(presets.load("probe"), ["encoder.layer=7"])
    with pytest.raises(UserError, match=r"encoder.layer = 7: tiny has layers 1 to 4"):
        Probe(config, StudyFolder(tmp_path), cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("confirm.seeds=2", r"confirm.seeds = 2: system = 'frozen' trains nothing .* --set confirm.seeds=0"),
        (
            'search.recipes=["paper"]',
            r"search.recipes = .* so it has no recipes; .* --set search.recipes=\[\]",
        ),
    ],
)
def test_what_a_probe_cannot_do_is_refused(setting: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve(presets.load("probe"), [setting])


def test_a_dry_run_lists_the_readings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert dry_run(parse(["--preset", "probe", "--dry-run", "--storage", str(tmp_path / "runs")])) == 0
    said = capsys.readouterr().out
    assert "jobs       8, which train nothing" in said
    for layer in range(1, 5):
        assert f"\n  layer {layer}, bands\n  layer {layer}, mean\n" in said + "\n"
    assert not (tmp_path / "runs").exists()


def test_what_it_says_while_it_runs_has_no_gap_to_close(opened: Probe) -> None:
    out = io.StringIO()
    progress = Progress({"frozen trial": 4}, num_slots=1, begun=0.0, out=out)
    metrics = {"official": 80.0, "low/official": 70.0}
    for job in opened.jobs[:2]:
        progress.job_started(job)
        progress.job_ended(job, {"state": "finished", "metrics": metrics, "duration_s": 1.0, "epoch": 1})
    legend, first, second = out.getvalue().splitlines()
    assert legend.startswith("official: how well anomalies are found")
    assert first.startswith("[1/4] t0000")
    assert "official  80.0  low  70.0" in first
    assert second.endswith("layer 1, mean")
    assert "gap" not in out.getvalue()


# -- ranking ----------------------------------------------------------------------------------------------------


def test_the_ranking_is_by_the_official_score_of_each_back_end(opened: Probe) -> None:
    run(opened)
    ranking = rank(opened.folder)
    order = [(r.layer, r.pooling, r.backend) for r in ranking.readings]
    expected = itertools.product((1, 2), ("bands", "mean"), BACKENDS)
    assert order == sorted(expected, key=lambda settings: -points(*settings))
    assert [r.transductive for r in ranking.readings[:2]] == [True, False] or ranking.readings[0].transductive
    best = ranking.best
    assert best is not None
    assert (best.layer, best.pooling, best.backend) == (2, "bands", "knn1_domain_z")
    assert (
        best.settings
        == "--set encoder.layer=2 --set encoder.pooling=bands --set scoring.backend=knn1_domain_z"
    )
    assert best.metrics["mid/official"] == pytest.approx(85.0)
    assert best.metrics["low/official"] == pytest.approx(80.0)
    assert ranking.place(1, "mean", "knn1") == (12, ranking.readings[-1])
    assert ranking.place(3, "mean", "knn1") is None
    assert ranking.missing == ()


def test_shares_of_the_variance_are_those_of_an_analysis_of_variance(opened: Probe) -> None:
    """Additive scores leave nothing to interactions; levels a and -a add a squared each."""
    run(opened)
    readings = [
        replace(r, metrics={"official": points(r.layer, r.pooling, r.backend)})
        for r in rank(opened.folder).readings
    ]
    found = shares(readings)
    squares = {"layer": 5.0**2, "pooling": 0.5**2, "backend": 2.0**2}  # knn1_domain_z_test is left out
    assert found == pytest.approx({axis: value / sum(squares.values()) for axis, value in squares.items()})
    assert shares(readings[:-1]) == shares([]) == {}
    assert shares([replace(r, metrics={"official": 50.0}) for r in readings]) == {}


def test_what_is_missing_is_said(opened: Probe) -> None:
    run(opened, last=False)
    ranking = rank(opened.folder)
    assert ranking.missing == ("layer 2, mean (t0003) no memory.",)
    assert len(ranking.readings) == 3 * len(BACKENDS)
    assert ranking.shares == {}
    opened.folder.job_path("t0001").joinpath("result.json").unlink()
    assert rank(opened.folder).missing[0] == "layer 1, mean (t0001) has not ended."


# -- report -----------------------------------------------------------------------------------------------------


def test_the_report_says_which_settings_to_use(opened: Probe, config: StudyConfig) -> None:
    run(opened)
    config = replace(config, encoder=replace(config.encoder, layer=1, pooling="mean"))
    report = probe_report.write_report(opened.folder, config)
    text = "\n".join(probe_report.sentences(report))
    assert "Best of 12 readings of the frozen encoder tiny: layer 2, pooling bands, knn1_domain_z" in text
    assert "The settings in use (layer 1, pooling mean, knn1_domain_z) are number 10" in text
    assert "To use the best: --set encoder.layer=2 --set encoder.pooling=bands" in text
    assert "What moves the official score: the layer 8" in text
    assert {path.name for path in report.files} == {"findings.md", "findings.html", "ranking.csv"}
    written = report.files[0].read_text()
    for sentence in probe_report.sentences(report):
        assert sentence.split(":")[0] in written
    assert "flatter" in written
    rows = list(csv.DictReader(io.StringIO(report.files[2].read_text())))
    assert [int(row["rank"]) for row in rows] == list(range(1, 13))
    assert rows[0]["transductive"] == "true"
    assert float(rows[2]["low/official"]) == pytest.approx(80.0)
    metrics, tags = probe_report.headline(report)
    assert metrics["best/low/official"] == pytest.approx(80.0)
    assert tags == {"best.layer": "2", "best.pooling": "bands", "best.backend": "knn1_domain_z"}


def test_the_terminal_shows_the_first_rows_and_the_one_in_use(opened: Probe, config: StudyConfig) -> None:
    run(opened)
    config = replace(config, encoder=replace(config.encoder, layer=1, pooling="mean"))
    config = replace(config, scoring=replace(config.scoring, backend="knn1"))
    out = io.StringIO()
    probe_report.print_ranking(probe_report.write_report(opened.folder, config), file=out, width=120)
    lines = out.getvalue().splitlines()
    assert lines[0].split() == [
        "#",
        "layer",
        "pooling",
        "back",
        "end",
        "official",
        "low",
        "mid",
        "high",
        *SUBSETS,
    ]
    assert lines[2].split()[:4] == ["1", "2", "bands", "knn1_domain_z_test*"]
    assert [line.split()[0] for line in lines[2:13]] == [*map(str, range(1, 11)), "12"]
    assert any(line.startswith("A starred back end looks at all queries") for line in lines)
    out = io.StringIO()
    probe_report.print_ranking(probe_report.write_report(opened.folder, config), file=out, width=60)
    narrow = out.getvalue().splitlines()
    assert max(map(len, narrow[:13])) <= 60
    assert narrow[0].split()[-3:] == ["end", "official", "low"]


def test_a_probe_of_nothing_has_a_report_too(opened: Probe, config: StudyConfig) -> None:
    report = probe_report.write_report(opened.folder, config)
    assert "there is nothing to rank" in report.files[0].read_text()
    assert probe_report.headline(report) == ({}, {})
    probe_report.print_ranking(report, file=io.StringIO())


def test_every_preset_setting_of_a_probe_makes_another_study() -> None:
    one = resolve(presets.load("probe"))
    assert identity(one) != identity(resolve(presets.load("quick")))
    assert identity(one) == identity(resolve(presets.load("probe"), ["slots.count=1"]))


# -- a whole one ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_whole_probe(small_probe: Any) -> None:
    done = small_probe.run(timeout_s=300)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = small_probe.folder
    assert folder.job_ids() == [f"t{i:04d}" for i in range(8)]
    for job_id in folder.job_ids():
        assert folder.result(job_id)["state"] == "finished"
        assert {row["backend"] for row in folder.table(job_id)} == set(backends())
    said = done.stdout
    assert "gap" not in said, "there is no oracle to close a gap to"
    assert "To use the best: --set encoder.layer=" in said
    assert f"Best of {8 * len(backends())} readings of the frozen encoder tiny" in said
    assert "findings " in said
    assert len(list((small_probe.storage / "cache").glob("layers-*.npy"))) == 1
    runs = small_probe.runs()
    (parent,) = (run for run in runs if run.get("role") == "study")
    assert parent["best.layer"] in "1234"
    assert {run["status"] for run in runs} == {"FINISHED"}
    assert len(runs) == 9
    artifacts = {path.name for path in (small_probe.storage / "mlartifacts").rglob("*.*")}
    assert {"ranking.csv", "findings.md", "knn.json"} <= artifacts

    again = small_probe.run(timeout_s=100)
    assert again.returncode == 0, again.stderr
    assert "nothing is left to train" in again.stdout
    assert "starting Ray" not in again.stdout
    assert json.loads((folder.path / "study.json").read_text())["config"]["system"] == "frozen"
