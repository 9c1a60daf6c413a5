"""Studies side by side: what is ranked, what is not and why, and the command that does it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from study import report
from study.compare import against, comparison_table, grouped, sentences
from study.config import StudyConfig
from study.summary import Summary, summarise
from tests.study.test_report import Maker, make, with_gain
from trainables.settings import EncoderConfig, ScoringConfig, TrainingConfig


def a_study(root: Path, name: str, gain: float) -> Maker:
    """A confirmed study whose best setting is ``gain`` points above the teacher."""
    made = make(root, trials=6, seeds=2, gain=with_gain(best=gain))
    made.path, made.config = root / name, replace(made.config, name=name)
    made.search(lambda _: 2.0).confirm()
    made.folder.write_study({**(made.folder.study() or {}), "corpus": "c0ffee", "grid": 3})
    return made


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Maker, Maker]:
    root = tmp_path_factory.mktemp("pair")
    return a_study(root, "modest", 3.0), a_study(root, "better", 7.0)


@pytest.fixture(scope="module")
def modest(pair: tuple[Maker, Maker]) -> Summary:
    return summarise(pair[0].folder, pair[0].config)


@pytest.fixture(scope="module")
def better(pair: tuple[Maker, Maker]) -> Summary:
    return summarise(pair[1].folder, pair[1].config)


def changed(summary: Summary, name: str, facts: Any = None, **config: Any) -> Summary:
    """The same numbers under another name, measured on something else."""
    study = {k: v for k, v in {**summary.study, **(facts or {})}.items() if v is not None}
    return replace(summary, name=name, study=study, config=replace(summary.config, **config))


def test_what_was_measured_alike_is_ranked_by_paired_differences(modest: Summary, better: Summary) -> None:
    (group,) = grouped([modest, better])
    assert [member.name for member in group.ranked] == ["better", "modest"]
    paired = against(*group.ranked)
    assert paired is not None
    assert paired.above_zero
    assert (paired.num_seeds, paired.num_machines) == (2, 5)
    (sentence,) = sentences([group])
    assert sentence.startswith("better (")
    assert sentence.endswith(": a gain.")


def test_what_cannot_be_told_apart_shares_its_rank(modest: Summary, better: Summary) -> None:
    (group,) = grouped([modest, better, changed(better, "twin")])
    ranks = {row[1]: row[0] for row in comparison_table(group).rows if row[0]}
    assert ranks == {"better (retain)": "1", "twin (retain)": "1=", "modest (retain)": "3"}
    assert any("against twin" in s and "cannot be told apart" in s for s in sentences([group]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"facts": {"corpus": "beef"}}, "corpus (factory beef, 2 s at 16000 Hz; group 1: factory c0ffee"),
        ({"facts": {"grid": 4}}, "evaluation grid (revision 4: "),
        ({"facts": {"grid": None}}, "evaluation grid (not recorded by other; group 1: revision 3"),
        (
            {"encoder": EncoderConfig(pooling="mean")},
            "frozen teacher (tiny, weights that come along, layer 0, mean",
        ),
        ({"scoring": ScoringConfig(backend="knn1")}, "back end (knn1; group 1: knn1_domain_z)"),
        ({"training": TrainingConfig(adapt_on_bank=True)}, "training on the scored machines' banks (yes;"),
    ],
)
def test_what_was_not_measured_alike_is_not_ranked(
    modest: Summary, better: Summary, changes: dict[str, Any], words: str
) -> None:
    groups = grouped([modest, better, changed(better, "other", **changes)])
    assert [[m.name for m in group.members] for group in groups] == [["better", "modest"], ["other"]]
    first, *rest = sentences(groups)
    assert "not ranked as a whole" in first
    assert f"Group 2 (other) differs from group 1 in {words}" in first
    assert not any("other" in sentence and "better" in sentence for sentence in rest)


def test_other_machines_keep_apart_too(modest: Summary, better: Summary) -> None:
    fewer = {
        who: replace(m, cells=m.cells.only("press")) if m.cells else m for who, m in better.methods.items()
    }
    first, *_ = sentences(grouped([modest, replace(better, methods=fewer)]))
    assert "split (held-out machines: press; group 1: held-out machines: press, saw" in first


def test_an_unconfirmed_study_is_shown_and_not_ranked(modest: Summary, better: Summary) -> None:
    methods = {who: replace(m, cells=None, scores={}) for who, m in better.methods.items()}
    said = list(sentences(grouped([modest, replace(better, methods=methods)])))
    assert any(
        "better is not ranked: its best setting was not scored on held-out machines" in s for s in said
    )


def test_the_command_writes_text_page_and_figure(
    pair: tuple[Maker, Maker], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = str(pair[0].path.parent)
    code = report.main(["modest", str(pair[1].path), "--storage", storage, "--output", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert code == 0
    assert "1 better (retain)" in shown
    assert "2 modest (retain)" in shown
    written = (tmp_path / "out" / "comparison.md").read_text()
    for wanted in (
        "| 1 | better (retain) |",
        "factory c0ffee",
        "worker-hours",
        "python study/run.py --preset",
    ):
        assert wanted in written, wanted
    page = (tmp_path / "out" / "comparison.html").read_text()
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    assert len(list(root.iter("img"))) == 1
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert not (pair[0].path / "findings.md").exists()


def test_one_study_gets_its_findings_again(
    pair: tuple[Maker, Maker], capsys: pytest.CaptureFixture[str]
) -> None:
    made = pair[0]
    assert report.main([str(made.path)]) == 0
    assert "Best found" in capsys.readouterr().out
    assert (made.path / "findings.html").exists()


def test_studies_that_cannot_be_read_are_refused(
    pair: tuple[Maker, Maker], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main(["modest", "nothing", "--storage", str(pair[0].path.parent)]) == 2
    assert "error: nothing: no such study in" in capsys.readouterr().err
    probe = Maker(tmp_path / "probe", StudyConfig(name="probe", system="frozen"))
    probe.path.mkdir()
    from trainables.settings import to_dict

    probe.folder.write_study({"name": "probe", "config": to_dict(probe.config)})
    assert report.main([str(pair[0].path), str(probe.path)]) == 2
    assert "probe: a probe trains nothing" in capsys.readouterr().err
