"""Studies on recordings that are mixed already: what they say, what they refuse, and one that runs to its end."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from study import run as command
from study.confirm import confirm_jobs
from study.progress import Progress
from study.report import document, markdown
from study.search import build_job
from study.terminal import print_comparison
from tests.study.conftest import TinyStudy, cleaned_up
from tests.study.test_report import Maker, make
from tests.trainables.data.dcase_layouts import Layout
from trainables.scoring.grid import summarise
from trainables.settings import CorpusConfig

BACKEND = "knn1_domain_z"
SECTIONS = {2020: ("/id_00", "/id_02"), 2021: ("/section_00", "/section_01")}


# -- the report ---------------------------------------------------------------------------------------------------


@dataclass
class Recorded(Maker):
    """A study folder of a year's recordings: the best trial 4 points above the teacher, the paper's setting 1."""

    def table(self, who: str, seed: int, machines: Iterable[str], level: float = 0.0) -> list[dict[str, Any]]:
        year, rows = self.config.corpus.year, []
        assert year is not None
        gain = {"teacher": 0.0, "paper": 1.0, "best": 4.0}.get(who, -2.0)
        for m, machine in enumerate(machines):
            for n, section in enumerate(SECTIONS.get(year, ("",))):
                base = 60 + 3 * (m % 3) + 2 * n + gain + level + self.rng.normal(0, 0.3)
                cells = {name: float(base - 2 * i) for i, name in enumerate(self.config.evaluation.metrics)}
                row = {"machine": f"{machine}{section}", "subset": "recorded", "band": "", "year": year}
                rows.append({**row, "backend": BACKEND, **cells, "official": base})
                rows.append({**row, "backend": "another", **dict.fromkeys(cells, 1.0), "official": 1.0})
        return rows


def made(path: Path, year: int) -> Recorded:
    maker = make(path)
    corpus = CorpusConfig(kind="dcase", year=year, root=str(path))
    return Recorded(maker.path, replace(maker.config, corpus=corpus)).search().confirm()


@pytest.mark.parametrize(
    ("year", "columns"),
    [
        (2020, ("official", "AUC", "pAUC")),
        (2021, ("official", "source AUC", "target AUC", "source pAUC", "target pAUC")),
        (2023, ("official", "source AUC", "target AUC", "pAUC")),
    ],
)
def test_a_report_speaks_of_the_years_score_and_of_no_snr(
    tmp_path: Path, year: int, columns: tuple[str, ...]
) -> None:
    study = made(tmp_path, year)
    summary = study.report()
    assert summary.missing == ()
    assert summary.held_out == "held-out machines"
    assert summary.machines == study.machines  # not their ids or sections
    text = " ".join(summary.findings)
    assert summary.findings[0].startswith("On held-out machines, the best found setting scores ")
    assert "a gain" in summary.findings[0]
    assert "parts of the score" in text
    for word in ("low SNR", "all SNRs", "oracle", "None", "nan", "  "):
        assert word not in text
    blocks = markdown(document(summary, {path.name: path for path in summary.files}))
    assert f"| held-out | {' | '.join(columns)} | seeds |" in blocks
    assert f"| search | {' | '.join(columns)} | run |" in blocks
    assert f"the rule of DCASE {year}" in blocks
    assert f"the {'arithmetic' if year == 2020 else 'harmonic'} mean of" in blocks
    assert "gap closed" not in blocks.lower()
    assert "Oracle" not in blocks
    drawn = {path.name for path in summary.files}
    assert {"machines.png", "history.png", "best_setting.png"} <= drawn
    assert not drawn & {"bands.png", "heat_map.png"}
    assert ("pareto.png" in drawn) is (year != 2020)
    out = io.StringIO()
    print_comparison(summary, file=out, width=100)
    assert "gap closed" not in out.getvalue()


@pytest.mark.parametrize("year", [2020, 2021, 2023])
def test_an_estimate_is_the_official_score_of_all_cells(tmp_path: Path, year: int) -> None:
    study = made(tmp_path, year)
    summary = study.assess()
    for who in ("teacher", "best"):
        tables = [study.folder.table(f"c-{who}-s{seed}") for seed in range(3)]
        by_seed = [summarise(table, BACKEND) for table in tables]
        for key in ("", *study.config.evaluation.metrics):
            expected = np.mean([metrics[key or "official"] for metrics in by_seed])
            assert summary.methods[who].scores[key].mean == pytest.approx(expected)
    cells = summary.methods["best"].cells
    assert cells is not None
    assert cells.harmonic is (year != 2020)
    assert len(cells.keys) == len(study.config.evaluation.metrics) * len(SECTIONS.get(year, ("",)))
    assert summary.methods["best"].versus_teacher[""].mean == pytest.approx(4, abs=0.6)


def test_references_and_confirmations_are_without_an_oracle(tmp_path: Path) -> None:
    study = made(tmp_path, 2023)
    ids = [job["id"] for job in confirm_jobs(study.config, study.folder)]
    assert ids[:4] == ["c-teacher-s0", "c-paper-s0", "c-denoising-s0", "c-best-s0"]
    assert command.expected_jobs(study.config) == {
        "frozen baseline": 1,
        "trial": 12,
        "frozen confirm": 3,
        "confirm": 9,
    }


@pytest.mark.parametrize(
    "metrics", [{"official": 61.0, "s_auc": 65.0, "t_auc": 57.5}, {"official": 61.0, "s_auc": 65.0}]
)
def test_progress_shows_domains_in_place_of_snrs(tmp_path: Path, metrics: dict[str, float]) -> None:
    study, out = made(tmp_path, 2023), io.StringIO()
    job = build_job(
        study.config, study.folder, job_id="t0000", role="trial", params={"a_kind": "x"}, cache_dir=tmp_path
    )
    told = Progress(command.expected_jobs(study.config), num_slots=1, begun=0.0, out=out)
    told.job_started(job)
    told.job_ended(job, {"state": "finished", "metrics": metrics, "duration_s": 1.0, "epoch": 1})
    said = out.getvalue()
    assert "no SNR and no oracle" in said
    assert "gap" not in said
    line = said.splitlines()[-1]
    assert ("source  65.0  target  57.5" if "t_auc" in metrics else "auc  65.0") in line


# -- the command ----------------------------------------------------------------------------------------------------


def given(root: Path, *settings: str) -> list[str]:
    small = ("corpus.clip_s=0.5", "slots.count=1", "slots.cpus_per_worker=0.5", "slots.gpus_per_worker=0")
    words = (f"corpus.root={root}", "corpus.year=2023", *small, *settings)
    return ["--preset", "dcase", *(part for word in words for part in ("--set", word))]


def test_a_dry_run_tells_machines_clips_roles_and_noise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = Layout(tmp_path / "data", 2023).write().write("eval")
    layout.write_tables(tmp_path / "evaluator")
    truth = f"corpus.ground_truth={tmp_path / 'evaluator'}"
    storage = ["--storage", str(tmp_path / "runs"), "--dry-run"]
    assert command.main([*given(layout.root, truth), *storage]) == 0
    out = capsys.readouterr().out
    assert "7 machines train, 7 are scored while searching, 7 confirm" in out
    assert "1 frozen reference" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("  ")}
    assert " ".join(rows["fan"]) == "train, search 4 2 2 2 2 2"
    assert " ".join(rows["Vacuum"]) == "confirm 4 2 2 2 2 2"
    assert "mixed already" in out
    assert "noise to train with: 400 clips of 8 environments" in out
    assert not (tmp_path / "runs").exists()


def test_what_cannot_be_read_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Layout(tmp_path / "data", 2023).write("dev", ("fan", "valve")).root
    for arguments, words in (
        (given(tmp_path / "nowhere"), "corpus.root = "),
        (given(root), "no ToyCar/train of DCASE 2023; it is in zenodo.org/records/7882613"),
        (given(root, "corpus.year=2019"), "corpus.year = 2019: allowed are 2020 to 2026"),
        (given(root, "corpus.machines=fan,pump"), "corpus.machines: DCASE 2023 has no 'pump'"),
        (given(root, "corpus.machines=fan,valve", "corpus.ground_truth=nowhere"), "corpus.ground_truth = "),
    ):
        assert command.main([*arguments, "--storage", str(tmp_path / "runs")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert words in line
    assert not (tmp_path / "runs" / "cache").exists()


@pytest.mark.slow
def test_a_study_on_recordings_runs_to_its_end(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "data", 2023, seconds=1.0)
    layout.write("dev", ("fan", "valve")).write("eval", ("shaker", "Vacuum"))
    layout.write_list(tmp_path / "eval_data_list_2023.csv")
    settings = (
        "corpus.machines=fan,valve,shaker,Vacuum",
        f"corpus.ground_truth={tmp_path / 'eval_data_list_2023.csv'}",
        "corpus.clip_s=1.0",
    )
    ray_folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    with cleaned_up(TinyStudy(tmp_path / "runs", ray_folder, name="recorded")) as study:
        done = study.run("--trials", "2", *given(layout.root, *settings))
        assert done.returncode == 0, done.stdout + done.stderr
        folder = study.folder
        jobs = {job_id: folder.result(job_id) for job_id in folder.job_ids()}
        assert {"b-teacher", "t0000", "t0001", "c-teacher-s0", "c-paper-s0"} <= jobs.keys()
        assert not any("oracle" in job_id for job_id in jobs)
        for job_id, result in jobs.items():
            assert result is not None
            assert result["state"] == "finished", (job_id, result["reason"])
            assert {"official", "recorded/official", "s_auc", "t_auc", "pauc"} <= result["metrics"].keys()
            assert not any("low" in name or "gap" in name for name in result["metrics"])
            scored = {"Vacuum", "shaker"} if job_id.startswith("c-") else {"fan", "valve"}
            assert {row["machine"] for row in folder.table(job_id)} == scored
        text = (folder.path / "findings.md").read_text()
        assert "by the rule of their year" in text
        assert "Held-out machines (" in text
        assert "no SNR and no oracle" in done.stdout
        assert {run["status"] for run in study.runs()} == {"FINISHED"}
