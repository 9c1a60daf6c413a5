"""The report of studies made by program: what is said follows the numbers, and partial studies say what they lack."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

import search_spaces
from study.config import ConfirmConfig, SearchConfig, StudyConfig
from study.confirm import confirm_jobs, read_name
from study.findings import findings
from study.folder import StudyFolder
from study.report import FIGURES, assess, document, markdown, write_report
from study.search import build_job
from study.statistics import Estimate
from study.summary import Summary
from study.terminal import print_comparison
from study.wording import points
from trainables.scoring.grid import summarise
from trainables.settings import TrainingConfig, to_dict

SUBSETS = ("stationary", "nonstationary", "mismatched")
BANDS = ("low", "mid", "high")
EPOCHS = 6
Gain = Callable[[str, str, str], float]


def plain_gain(who: str, subset: str, band: str) -> float:
    """Points above the teacher: the oracle far ahead, the best trial half-way at low SNR, denoising behind."""
    at = {"low": 1.0, "mid": 0.5, "high": 0.0}[band]
    return {"teacher": 0.0, "oracle": 10.0 * at, "best": 6.0 * at - 0.3, "paper": 2.0 * at}.get(
        who, -2.0 * at
    )


@dataclass
class Maker:
    """Writes a study folder the way a study does: Optuna journal, jobs, records, tables, results."""

    path: Path
    config: StudyConfig
    gain: Gain = plain_gain
    machines: tuple[str, ...] = ("vacuum", "winch", "press", "saw", "stepper")
    subsets: tuple[str, ...] = SUBSETS
    metrics: tuple[str, ...] = ("s_auc", "t_auc", "pauc")
    noise: float = 0.4
    num_failed: int = 1
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))

    @property
    def folder(self) -> StudyFolder:
        return StudyFolder(self.path)

    def table(self, who: str, seed: int, machines: Iterable[str], level: float = 0.0) -> list[dict[str, Any]]:
        """A full table; machine and mixture shape it the same for all methods, as the same plan of mixtures does."""
        rows = []
        for m, machine in enumerate(machines):
            for subset in self.subsets:
                for b, band in enumerate(BANDS):
                    shared = np.random.default_rng([seed, m, SUBSETS.index(subset), b])
                    base = 54 + 7 * b - 3 * SUBSETS.index(subset) + 3 * (m % 3) + shared.normal(0, 0.5)
                    score = base + level + self.gain(who, subset, band) + self.rng.normal(0, self.noise)
                    exact = {"s_auc": score + 1.5, "t_auc": score - 1.0, "pauc": score - 4.0}
                    cells = {k: float(v) if k in self.metrics else None for k, v in exact.items()}
                    official = hmean(v for v in cells.values() if v is not None)
                    row = {"machine": machine, "subset": subset, "band": band, "backend": "knn1_domain_z"}
                    rows.append({**row, **cells, "official": official})
                    rows.append({**row, "backend": "another", **dict.fromkeys(cells, 1.0), "official": 1.0})
        return rows

    def run(self, job: Mapping[str, Any], table: list[dict[str, Any]], *, epochs: int, state: str) -> float:
        """Write a job that trained ``epochs`` epochs towards ``table``; returns its last official."""
        self.folder.write_job(job)
        final = metrics_of(table)
        record: dict[str, Any] = {"metrics": {}}
        for epoch in range(1, epochs + 1):
            short = 2.5 * (1 - epoch / EPOCHS)
            metrics = {k: v - short if "gap" not in k else v for k, v in final.items()}
            record = {
                "epoch": epoch,
                "epochs": EPOCHS,
                "done": epoch == EPOCHS,
                "metrics": metrics | {"loss": 0.1},
            }
            self.folder.append_record(job["id"], {**record, "table": table if epoch == epochs else []})
        self.folder.write_result(
            job["id"],
            {
                "state": state,
                "reason": "TrialFailed: loss is NaN at step 12 | lr 0.3" if state == "failed" else None,
                "epoch": epochs,
                "metrics": record["metrics"],
                "started": f"2026-03-01T10:{int(self.rng.integers(10, 59))}:00+00:00",
                "duration_s": 30.0 * max(epochs, 1),
                "num_workers": 2,
            },
        )
        return float(record["metrics"].get("official", 0.0))

    def search(self, score: Callable[[Mapping[str, Any]], float] | None = None) -> Maker:
        """All search trials, with early stopping, and the two baselines."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.path.mkdir(parents=True)
        self.folder.write_study(
            {
                "name": self.config.name,
                "config": to_dict(self.config),
                "identity": "0123456789ab",
                "command": "python study/run.py --preset quick",
                "versions": {"commit": "abc1234", "python": "3.11.9", "torch": "2.11.0"},
                "hardware": {"cpu": "2 cores", "gpu": "none"},
                "created": "2026-03-01T10:00:00+00:00",
                "notes": ["Held-out recordings, not machines: <too few> machines."],
            }
        )
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3), direction="maximize")
        space = search_spaces.load(self.config.system)
        for name in self.config.search.recipes:
            study.enqueue_trial(dict(space.RECIPES[name]), user_attrs={"baseline": name})
        machines = ("blower", "reducer", "spindle", "conveyor")
        for number in range(self.config.search.trials):
            trial = study.ask()
            params, baseline = dict(space.space(trial)), trial.user_attrs.get("baseline")
            job = self.job(f"t{number:04d}", "trial", params, baseline=baseline)
            level = score(params) if score else self.rng.normal(0, 1.5)
            table = self.table(baseline or "best", 0, machines, 0.0 if baseline else min(level, 2.0) - 2.0)
            fails = not baseline and number >= self.config.search.trials - self.num_failed
            epochs = 1 if fails else EPOCHS if baseline or level > -0.5 else 2
            state = "failed" if fails else "finished" if epochs == EPOCHS else "stopped"
            value = self.run(job, table, epochs=epochs, state=state)
            told = {"failed": "FAIL", "finished": "COMPLETE", "stopped": "PRUNED"}[state]
            study.tell(trial, value if state == "finished" else None, state=optuna.trial.TrialState[told])
        journal = optuna.storages.journal.JournalFileBackend(str(self.path / "optuna.journal"))
        storage = optuna.storages.JournalStorage(journal)
        optuna.create_study(study_name="search", storage=storage, direction="maximize").add_trials(
            study.trials
        )
        for who in self.config.evaluation.references:
            job = self.job(f"b-{who}", "baseline", {"reference": who})
            self.run(job, self.table(who, 0, machines), epochs=EPOCHS, state="finished")
        return self

    def job(self, job_id: str, role: str, params: Mapping[str, Any], **rest: Any) -> dict[str, Any]:
        return build_job(
            self.config,
            self.folder,
            job_id=job_id,
            role=role,
            params=params,
            cache_dir=self.path.parent,
            **rest,
        )

    def confirm(self, fail: Iterable[str] = (), skip: Iterable[str] = ()) -> Maker:
        """The confirmation stage; jobs in ``fail`` fail and those in ``skip`` are not run."""
        for job in confirm_jobs(self.config, self.folder):
            if job["id"] in skip:
                continue
            who, seed = read_name(job["id"]) or ("", 0)
            failed = job["id"] in fail
            table = self.table(who.split("-")[0], 1000 + seed, self.machines)
            self.run(job, table, epochs=0 if failed else EPOCHS, state="failed" if failed else "finished")
        return self

    def report(self) -> Summary:
        return write_report(self.folder, self.config)

    def assess(self) -> Summary:
        return assess(self.folder, self.config)


def hmean(values: Iterable[float]) -> float:
    numbers = list(values)
    return len(numbers) / sum(1 / v for v in numbers)


def metrics_of(table: list[dict[str, Any]]) -> dict[str, float]:
    gap = {} if "year" in table[0] else {"gap_closed": 0.4}
    return summarise(table, "knn1_domain_z") | gap


def make(path: Path, *, trials: int = 12, seeds: int = 3, finalists: int = 1, **rest: Any) -> Maker:
    config = StudyConfig(
        name="made",
        training=TrainingConfig(epochs=EPOCHS),
        search=SearchConfig(trials=trials),
        confirm=ConfirmConfig(seeds=seeds, finalists=finalists, recipes=("paper", "denoising")),
    )
    return Maker(path / "made", config, **rest)


def with_gain(**at_all: float) -> Gain:
    """A constant difference to the teacher, the same everywhere; the oracle stays where it is."""
    return lambda who, subset, band: at_all.get(who, plain_gain(who, subset, band))


def printed(summary: Summary, width: int = 120) -> str:
    out = io.StringIO()
    print_comparison(summary, file=out, width=width)
    return out.getvalue()


def level_of(summary: Summary, words: str) -> str:
    (level,) = {check.level for check in summary.checks if words in check.text}
    return level


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """A study of 60 trials with everything a report can show; a case for the time it takes, too."""
    made = make(tmp_path_factory.mktemp("complete"), trials=60).search().confirm(fail=["c-denoising-s1"])
    began = time.process_time()
    summary = made.report()
    assert time.process_time() - began < 10
    return summary


def text(summary: Summary, name: str = "findings.md") -> str:
    if not summary.files:
        return markdown(document(summary, {}))
    (path,) = (path for path in summary.files if path.name == name)
    return path.read_text()


# -- a complete study -----------------------------------------------------------------------------------------


def test_every_figure_is_drawn_and_every_file_is_named(complete: Summary) -> None:
    assert {path.name for path in complete.files} == {"findings.md", "findings.html", *FIGURES}
    for path in complete.files[2:]:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_headline_holds_the_numbers_of_the_table(complete: Summary) -> None:
    best, teacher = complete.methods["best"], complete.methods["teacher"]
    gain = best.versus_teacher["low"]
    assert points(best.scores["low"]) in complete.findings[0]
    assert (
        f"the frozen teacher's {teacher.scores['low'].mean:.1f} ({points(gain, signed=True)}"
        in complete.findings[0]
    )
    assert "3 seeds, 5 machines): a gain; it is ahead on 5 of 5 machines" in complete.findings[0]
    assert 4.0 < gain.mean < 7.0
    assert best.gap is not None
    assert f"closes {best.gap.mean:.0%} of the gap to the oracle" in complete.findings[1]
    assert 0.4 < best.gap.mean < 0.7


def test_the_report_holds_what_a_reader_asks_for(complete: Summary) -> None:
    report = text(complete)
    for wanted in (
        "python study/run.py --preset quick",
        "abc1234",
        "torch 2.11.0",
        "cpu 2 cores",
        "1000, 1001, 1002",
        "worker-hours",
        "TrialFailed: loss is NaN at step 12",
        "For selection only",
        "lambda_kind",
        '"batch_size": 32',
        "Denoising: seed 1 of the confirmation is missing or failed.",
    ):
        assert wanted in report, wanted
    assert report.index("Key findings") < report.index("Comparison") < report.index("How it was made")


def test_cost_adds_up(complete: Summary) -> None:
    expected = sum(60.0 * max(run.epoch, 1) for run in complete.runs)
    assert sum(run.worker_s for run in complete.runs) == expected
    assert f"All jobs took {expected / 3600:.2f} worker-hours" in text(complete)


def test_notes_stand_under_every_table_of_scores_and_once_on_a_terminal(complete: Summary) -> None:
    assert text(complete).count("*Held-out recordings, not machines: <too few> machines.*") == 3
    assert printed(complete).count("Held-out recordings, not machines") == 1


def test_the_html_is_well_formed_escaped_and_needs_nothing_else(complete: Summary) -> None:
    page = text(complete, "findings.html")
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    pictures = list(root.iter("img"))
    assert len(pictures) == len(FIGURES)
    assert all(picture.attrib["src"].startswith("data:image/png;base64,") for picture in pictures)
    assert not [e for e in root.iter() if e.tag in ("script", "link", "iframe")]
    assert not re.search(r"(href|src)=.(?!data:)|url\(|@import|https?://", page)
    assert "Held-out recordings, not machines: <too few> machines." in "".join(root.itertext())
    intervals = [cell.findtext("small") or "" for cell in root.iter("td")]
    assert any(re.fullmatch(r"\[-?[\d.]+, -?[\d.]+\]", interval) for interval in intervals), "below the score"


def test_the_terminal_shows_all_methods_and_fits_its_width(complete: Summary) -> None:
    shown = printed(complete, width=80)
    assert max(map(len, shown.splitlines())) <= 80
    for title in (
        "Frozen teacher",
        "Oracle",
        "Denoising",
        "Tagging",
        "Alignment",
        "Paper's setting",
        "Best found",
    ):
        assert title in shown.split("Search machines")[0]
        assert title in shown.split("Search machines")[1]
    for header in (
        "official",
        "low",
        "mid",
        "high",
        "stationary",
        "non-stat.",
        "mismatched",
        "gap closed",
        "seeds",
    ):
        assert header in shown
    best = complete.methods["best"].scores[""]
    assert f"{best.mean:.1f}" in shown
    assert f"{best.low:.1f}..{best.high:.1f}" in shown
    assert "for selection only" in shown


def test_the_search_table_is_of_the_search_machines(complete: Summary) -> None:
    run = next(run for run in complete.runs if run.id == "b-teacher")
    rows = [line for line in text(complete).splitlines() if line.startswith("| Frozen teacher")]
    assert f"{run.metrics['official']:.1f}" in rows[1]
    assert "b-teacher" in rows[1]
    assert "b-teacher" not in rows[0]


def test_a_report_is_the_same_when_written_again(complete: Summary) -> None:
    before = {path.name: path.read_bytes() for path in complete.files}
    again = write_report(StudyFolder(complete.files[0].parent), complete.config)
    assert {path.name: path.read_bytes() for path in again.files} == before


# -- sentences follow numbers ---------------------------------------------------------------------------------


def test_sentences_flip_when_numbers_flip(tmp_path: Path) -> None:
    gain = make(tmp_path / "a", gain=with_gain(best=4.0)).search().confirm().assess()
    loss = make(tmp_path / "b", gain=with_gain(best=-4.0)).search(lambda _: 2.0).confirm().assess()
    assert "): a gain;" in gain.findings[0]
    assert "ahead on 5 of 5 machines" in gain.findings[0]
    assert gain.methods["best"].versus_teacher["low"].above_zero
    (paper,) = (s for s in gain.findings if s.startswith("Against the paper's setting"))
    assert "(a gain)" in paper

    assert loss.best_who == "paper"
    assert "No sampled setting beat the published recipes" in loss.findings[0]
    assert "paper's setting scores" in loss.findings[1]
    assert level_of(loss, "did not beat its baselines") == "look"
    assert "Paper's setting (= best)" in text(loss)


def test_a_best_setting_that_is_worse_on_held_out_machines_is_called_worse(tmp_path: Path) -> None:
    made = make(tmp_path, gain=with_gain(best=4.0)).search()
    made.gain = with_gain(best=-4.0)
    summary = made.confirm().assess()
    assert "): a loss; it is ahead on 0 of 5 machines" in summary.findings[0]
    assert "widens the gap to the oracle" in summary.findings[1]
    assert level_of(summary, "selection flattered the winner") == "look"
    assert level_of(summary, "scores less than the paper's setting") == "look"


def test_an_interval_that_includes_zero_is_said_to(tmp_path: Path) -> None:
    made = make(tmp_path, gain=with_gain(best=4.0)).search()
    made.gain, made.noise = with_gain(best=0.0, paper=0.0), 4.0
    summary = made.confirm().assess()
    gain = summary.methods["best"].versus_teacher["low"]
    assert gain.low < 0 < gain.high  # type: ignore[operator]
    assert "the interval includes zero, so no difference is shown" in summary.findings[0]
    assert "a gain" not in summary.findings[0]
    assert level_of(summary, "cannot be told apart") == "look"


def test_without_a_gap_none_is_closed(tmp_path: Path) -> None:
    summary = make(tmp_path, gain=with_gain(oracle=-3.0, best=4.0)).search().confirm().assess()
    assert "there is no gap to close" in summary.findings[1]
    assert "no gap" in text(summary)


@pytest.mark.parametrize(
    ("machines", "word"),
    [(("vacuum", "press"), "held-out machines"), (("blower", "reducer"), "held-out recordings")],
)
def test_machines_that_were_searched_on_confirm_on_recordings_only(
    tmp_path: Path, machines: tuple[str, ...], word: str
) -> None:
    summary = make(tmp_path, machines=machines).search().confirm().assess()
    other = {"held-out machines", "held-out recordings"} - {word}
    assert summary.held_out == word
    said = printed(summary) + " ".join(summary.findings) + " ".join(check.text for check in summary.checks)
    assert word in said.lower()
    assert not any(f"on {wrong}" in said.lower() for wrong in other)


def test_estimates_read_as_text() -> None:
    shown = Estimate(mean=4.24, low=2.9, high=5.51, num_seeds=5, num_machines=4)
    assert points(shown, signed=True) == "+4.2 [2.9, 5.5]"
    assert points(replace(shown, low=-0.04), signed=True) == "+4.2 [0.0, 5.5]"
    assert points(replace(shown, low=None)) == "4.2 [no interval]"


# -- partial studies ------------------------------------------------------------------------------------------


def test_without_a_confirmation_the_report_says_so_and_claims_nothing(tmp_path: Path) -> None:
    summary = make(tmp_path, seeds=0).search().report()
    assert "Nothing was confirmed on held-out machines" in summary.findings[0]
    assert "No confirmation stage (confirm.seeds = 0)" in summary.missing[0]
    assert "no table of results" in text(summary)
    assert "bands.png" not in {path.name for path in summary.files}
    assert printed(summary).startswith("Nothing was scored on held-out machines")
    assert "Best found" in printed(summary)


def test_an_interrupted_confirmation_uses_the_seeds_it_has(tmp_path: Path) -> None:
    summary = make(tmp_path).search().confirm(fail=["c-best-s1"], skip=["c-best-s2", "c-oracle-s2"]).assess()
    assert "Best found: seed 1, 2 of the confirmation is missing or failed." in summary.missing
    assert "1 seed, 5 machines" in summary.findings[0]
    assert "the difference is over the seeds both have" in summary.findings[0]
    assert summary.methods["best"].seeds == (0,)
    assert "1/3" in printed(summary)


def test_a_confirmation_without_teacher_compares_nothing_to_it(tmp_path: Path) -> None:
    skip = [f"c-{who}-s{seed}" for seed in range(3) for who in ("teacher", "oracle")]
    summary = make(tmp_path).search().confirm(skip=skip).assess()
    assert "cannot be compared with the frozen teacher" in summary.findings[0]
    assert any(line.startswith("Frozen teacher: seed 0, 1, 2") for line in summary.missing)
    assert "| Best found |" in text(summary)


def test_one_domain_and_one_subset_only(tmp_path: Path) -> None:
    made = make(tmp_path, metrics=("s_auc", "pauc"), subsets=("stationary",))
    summary = made.search().confirm().assess()
    assert "The subset nonstationary was not scored." in summary.missing
    assert "No machine has normal test clips of the target domain: one AUC is left out." in summary.missing
    assert "best" in summary.methods
    assert "stationary" in summary.methods["best"].scores
    assert "mismatched" not in summary.methods["best"].scores
    assert "): a gain" in summary.findings[0]


def test_one_machine_and_one_seed_give_no_interval_and_no_claim(tmp_path: Path) -> None:
    summary = make(tmp_path, seeds=1, machines=("saw",)).search().confirm().report()
    assert "one machine and one seed give no interval" in summary.findings[0]
    assert "[no interval]" in text(summary)
    assert level_of(summary, "One held-out machine") == "look"


def test_a_study_in_which_nothing_finished_is_reported(tmp_path: Path) -> None:
    made = make(tmp_path, trials=5, num_failed=1)
    made.config = replace(made.config, search=replace(made.config.search, recipes=()))
    summary = made.search(lambda _: -2.0).confirm().report()
    assert summary.best is None
    assert summary.findings[0] == "No search trial ran to its last epoch: there is no best setting to report."
    assert "No search trial ran to its last epoch, so there is no best setting." in summary.missing
    assert "findings.html" in {path.name for path in summary.files}


def test_an_empty_folder_gives_a_report_that_says_so(tmp_path: Path) -> None:
    made = make(tmp_path)
    made.path.mkdir(parents=True)
    summary = made.report()
    assert "No search trial has been started." in summary.missing
    assert "not recorded" in text(summary)
    printed(summary)


def test_a_trial_that_is_not_over_and_an_unreadable_journal_are_named(tmp_path: Path) -> None:
    made = make(tmp_path).search()
    (made.folder.job_path("t0005") / "result.json").unlink()
    (made.path / "optuna.journal").write_text("{not json\n" * 3)
    summary = made.assess()
    assert "1 search trial not over yet: t0005." in summary.missing
    assert "optuna.journal holds no trials that could be read" in summary.importance.reason
    assert level_of(summary, "ranges searched could not be read") == "unknown"


def test_figures_of_an_earlier_report_do_not_outlive_their_data(tmp_path: Path) -> None:
    made = make(tmp_path, seeds=0).search()
    (made.path / "heat_map.png").write_bytes(b"old")
    made.report()
    assert not (made.path / "heat_map.png").exists()


def test_a_figure_that_cannot_be_drawn_is_named_and_the_rest_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(summary: Summary) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setitem(FIGURES, "pareto.png", broken)
    summary = make(tmp_path, seeds=0).search().report()
    assert "The figure pareto.png could not be drawn; the log says why." in summary.missing
    assert "history.png" in {path.name for path in summary.files}


# -- health checks --------------------------------------------------------------------------------------------


def test_an_optimum_on_the_boundary_is_noticed(tmp_path: Path) -> None:
    inside = make(tmp_path / "a").search(lambda p: 2.0 - abs(p["spec_time_fraction"] - 0.15)).assess()
    assert level_of(inside, "inside the ranges") == "fine"
    made = make(tmp_path / "b").search()
    best = made.assess().best
    assert best is not None
    job = made.folder.job(best.trial_id) or {}
    made.folder.write_job({**job, "params": {**job["params"], "spec_time_fraction": 0.299}})
    summary = made.assess()
    assert level_of(summary, "spec_time_fraction = 0.299 at the upper end of 0..0.3") == "look"


def test_early_stopping_that_would_have_ended_the_winner_is_noticed(tmp_path: Path) -> None:
    made = make(tmp_path, trials=15)
    made.search()
    steady = made.assess()
    assert level_of(steady, "among the leaders whenever early stopping decided") == "fine"
    best = steady.best
    assert best is not None
    path = made.folder.job_path(best.trial_id) / "records.jsonl"
    records = made.folder.records(best.trial_id)
    path.unlink()
    for record in records:
        official = 40.0 if record["epoch"] == 2 else record["metrics"]["official"]
        made.folder.append_record(best.trial_id, {**record, "metrics": {"official": official}})
    assert level_of(made.assess(), "would have ended the winner") == "look"


def test_parameters_that_matter_are_told_from_those_that_do_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    made = make(tmp_path, trials=60, seeds=0, noise=0.1, num_failed=0)
    summary = made.search(lambda p: float(np.log10(p["learning_rate"] / 1e-3)) + 0.1 * rng.normal()).assess()
    bars = {bar.name: bar for bar in summary.importance.bars}
    assert summary.importance.bars[0].name == "learning_rate"
    assert bars["learning_rate"].matters
    assert bars["learning_rate"].share > 0.3
    assert any("What mattered most" in s and "learning_rate (" in s for s in summary.findings)
    assert bars["w_mix"].branch == "weighting_kind = fixed"
    assert not bars["learning_rate"].branch
    idle = next(check for check in summary.checks if check.text.startswith("No effect beyond chance"))
    assert "learning_rate" not in idle.text
    assert "spec_" in idle.text


def test_importance_is_not_measured_on_a_few_trials(tmp_path: Path) -> None:
    summary = make(tmp_path, trials=12, seeds=0).search().assess()
    assert summary.importance.bars == ()
    assert "needs 20 trials scored at one epoch" in summary.importance.reason
    assert any("Which parameters mattered cannot be said" in s for s in summary.findings)


def test_a_winner_confirmed_before_the_search_was_extended_is_mentioned(tmp_path: Path) -> None:
    made = make(tmp_path).search(lambda _: 2.0).confirm()
    first = made.assess()
    assert first.best is not None
    worse = [f.trial_id for f in first.finalists]
    for job_id in worse:
        (made.folder.job_path(job_id) / "result.json").unlink()
    second = made.confirm().assess()
    assert second.best is not None
    assert second.best.trial_id not in worse
    assert second.best_who == f"best-{second.best.trial_id}"
    assert level_of(second, "looked at before: best was confirmed") == "look"


def test_two_finalists_have_rows_of_their_own(tmp_path: Path) -> None:
    summary = make(tmp_path, finalists=2).search(lambda _: 2.0).confirm().assess()
    assert "Finalist 2" in printed(summary)
    assert any("finalist 2" in check.text for check in summary.checks)


def test_the_report_module_starts_without_heavy_imports() -> None:
    heavy = ("torch", "ray", "mlflow", "optuna", "matplotlib", "sklearn")
    code = f"import sys, study.report; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("system", [name for name in search_spaces.SYSTEMS if name != "retain"])
def test_a_study_of_another_system_has_a_report_of_its_own_words(system, tmp_path):
    space, made = search_spaces.load(system), make(tmp_path)
    search = replace(made.config.search, recipes=tuple(space.RECIPES))
    confirm = replace(made.config.confirm, recipes=(space.PAPER,))
    made.config = replace(made.config, system=system, search=search, confirm=confirm)
    summary = made.search().confirm().report()
    assert summary.best is not None
    text = markdown(document(summary, {}))
    assert space.explain(summary.best.params) in text
    assert "lambda_kind" not in text
    drawn = {path.name for path in made.path.glob("*.png")}
    assert drawn >= {"bands.png", "heat_map.png", "machines.png", "parallel.png", "history.png"}
    assert drawn >= {
        "best_setting.png",
        "auc.png",
    }  # without lambda, what was searched and the SNRs trained on
    assert "Students also learned" not in text
    bank = replace(made.config, training=replace(made.config.training, adapt_on_bank=True))
    assert "Students also learned from the banks" in " ".join(findings(assess(made.folder, bank)))
