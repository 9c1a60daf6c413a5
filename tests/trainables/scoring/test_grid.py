"""Which noise meets which clip at which SNR, whose bank meets whose queries, and what it all adds up to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from trainables.data.corpus import Clip, Corpus, MachineRoles
from trainables.errors import UserError
from trainables.scoring import grid
from trainables.scoring.backends import backends, score_all
from trainables.scoring.challenge import challenge_metrics
from trainables.scoring.evaluation import SUBSETS, evaluation
from trainables.scoring.grid import KINDS, make_plan, score_plan, summarise
from trainables.scoring.metrics import domain_scores, harmonic_mean

BANDS = {"low": (-10.0, 0.0), "mid": (0.0, 15.0), "high": (15.0, 30.0)}
NAMES = ("knn1", "knn1_domain_z")


def corpus(*, machines=("a", "b", "c"), domains=("source", "target"), segments=40, places=2, roles=None):
    """Without waves: a plan reads none."""
    clips = []

    def add(count, **fields):
        for i in range(count):
            origin = f"{fields}{i}"
            clips.append(Clip(recording=origin, origin=origin, **fields))

    for name in machines:
        for domain in domains:
            bank = 8 if domain == "source" else 3
            add(bank, role="machine", name=name, split="train", label="normal", domain=domain)
            for label in ("normal", "anomaly"):
                add(4, role="machine", name=name, split="test", label=label, domain=domain)
    for kind in KINDS:
        for place in range(places):
            add(segments, role="noise", name=f"{kind}{place}", split="test", kind=kind)
            add(2, role="noise", name=f"{kind}{place}", split="train", kind=kind)
    roles = roles or MachineRoles(train=(), search=machines[:-1], confirm=machines[-1:])
    return Corpus(
        clips=tuple(clips), waves_NT=np.zeros((len(clips), 1)), roles=roles, sample_rate_hz=1, digest="d"
    )


def plan_of(made, split="search", seed=0):
    return make_plan(made, split=split, seed=seed, bands_db=BANDS)


def embeddings(plan, seed=0, width=8):
    return np.random.default_rng(seed).normal(size=(len(plan.clip_R), width)).astype(np.float32)


def test_cells_hold_every_bank_and_query_clip_in_order():
    made = corpus()
    plan = plan_of(made)
    assert plan.machines == ("a", "b")
    assert set(plan.cells) == {(m, k, b) for m in plan.machines for k in KINDS for b in BANDS}
    for (machine, _, _), rows in plan.cells.items():
        both = np.concatenate([plan.bank[machine], plan.queries[machine]])
        assert np.array_equal(plan.clip_R[rows], both)
        assert {made.clips[i].name for i in both} == {machine}
    for machine in plan.machines:
        assert {made.clips[i].split for i in plan.bank[machine]} == {"train"}
        assert {made.clips[i].label for i in plan.bank[machine]} == {"normal"}
        assert {made.clips[i].label for i in plan.queries[machine]} == {"normal", "anomaly"}
    taken = np.concatenate([np.arange(s.start, s.stop) for s in plan.cells.values()])
    assert sorted(taken) == list(range(len(plan.clip_R)))
    assert np.array_equal(plan.rows(["b"]), np.arange(len(plan.clip_R) // 2, len(plan.clip_R)))


def test_a_machine_stays_in_its_place():
    made = corpus(machines=tuple("abcdefgh"), places=3)
    plan, places = plan_of(made), {}
    for (machine, kind, _), rows in plan.cells.items():
        places.setdefault(machine, set()).add(made.clips[plan.noise_R[rows.start]].name.removeprefix(kind))
    assert all(len(of_both_kinds) == 1 for of_both_kinds in places.values())
    assert len(set.union(*places.values())) > 1


@pytest.mark.parametrize("segments", [40, 27, 26, 10, 3, 2])
def test_bank_and_queries_share_no_segment(segments):
    plan = plan_of(corpus(segments=segments))
    for (machine, _, _), rows in plan.cells.items():
        size = len(plan.bank[machine])
        parts = plan.noise_R[rows][:size], plan.noise_R[rows][size:]
        assert not set(parts[0]) & set(parts[1])
        for part in parts:
            used = Counter(part).values()
            assert max(used) - min(used) <= 1
    enough = plan_of(corpus(segments=27)).digest
    assert (plan.digest == enough) is (segments >= 27)  # what is drawn from enough has the identity it had


def test_a_single_segment_is_shared():
    plan = plan_of(corpus(segments=1))
    assert all(len(set(plan.noise_R[rows])) == 1 for rows in plan.cells.values())


@pytest.mark.parametrize("segments", [40, 27, 10])
def test_a_segment_comes_again_only_when_all_were_used(segments):
    made = corpus(segments=segments)
    plan = plan_of(made)
    for (_, kind, _), rows in plan.cells.items():
        noise = [made.clips[i] for i in plan.noise_R[rows]]
        assert {c.kind for c in noise} == {kind}
        assert {c.split for c in noise} == {"test"}
        assert len({c.name for c in noise}) == 1  # one environment
        used = Counter(c.origin for c in noise)
        most = -(-len(noise) // segments)
        assert len(used) == min(segments, len(noise))
        assert set(used.values()) <= {most, most - 1}


def test_snr_stays_in_its_band_around_a_level_of_its_machine():
    made = corpus(machines=tuple("abcdefg"))
    plan = plan_of(made)
    levels = {}
    for (machine, _, band), rows in plan.cells.items():
        low, high = BANDS[band]
        snr = plan.snr_db_R[rows]
        assert low <= snr.min() <= snr.max() <= high
        assert 0.1 < snr.std() < 2
        levels.setdefault(band, {}).setdefault(machine, snr.mean())
    for band, by_machine in levels.items():
        low, high = BANDS[band]
        steps = np.diff(sorted(by_machine.values()))
        assert np.allclose(steps, (high - low) / 6, atol=1.5)  # six machines, spread over the band
    assert plan.snr_db_R.dtype == np.float32


def test_a_plan_follows_from_its_seed():
    made = corpus()
    one, same, other = (plan_of(made, seed=s) for s in (0, 0, 1))
    assert one.digest == same.digest != other.digest
    assert np.array_equal(one.noise_R, same.noise_R)
    assert np.array_equal(one.snr_db_R, same.snr_db_R)
    assert not np.array_equal(one.snr_db_R, other.snr_db_R)
    assert plan_of(made, split="confirm").digest != one.digest
    assert plan_of(made, split="confirm").machines == ("c",)


@dataclass
class Spied:
    """What a bank was made of, and what it was asked."""

    bank_NE: np.ndarray


def test_banks_and_queries_are_paired_as_the_subsets_say(monkeypatch):
    made = corpus()
    plan = plan_of(made)
    emb = np.arange(len(plan.clip_R), dtype=np.float32)[:, None]  # an embedding is its row
    pairs, banks = [], []

    def prepare(bank_NE, is_target_N, num_bands, names):
        banks.append(Spied(bank_NE))
        assert is_target_N.tolist() == [False] * 8 + [True] * 3
        return banks[-1]

    def score(bank, query_QE, names):
        pairs.append((int(bank.bank_NE[0, 0]), int(query_QE[0, 0])))
        return {"knn1": np.arange(len(query_QE), dtype=float)}

    monkeypatch.setattr(grid, "prepare", prepare)
    monkeypatch.setattr(grid, "score", score)
    table = score_plan(plan, made, emb, num_bands=1, machines=["b"])
    expected = {
        (plan.cells["b", bank, band].start, plan.cells["b", queries, band].start + 11)
        for bank, queries in SUBSETS.values()
        for band in BANDS
    }
    assert len(expected) == 9
    assert sorted(pairs) == sorted(expected)
    assert len(banks) == 6  # one for each kind of noise and band, also where two subsets read it
    assert [(r["subset"], r["band"]) for r in table] == [(s, b) for s in SUBSETS for b in BANDS]
    assert SUBSETS["mismatched"] == ("nonstationary", "stationary")


def test_a_table_holds_what_each_cell_alone_would_give():
    made = corpus()
    plan = plan_of(made)
    emb = embeddings(plan)
    table = score_plan(plan, made, emb, num_bands=2)
    assert len(table) == 2 * 9 * len(backends())
    for row in table[:: len(backends()) + 1]:
        machine, (of_bank, of_queries) = row["machine"], SUBSETS[row["subset"]]
        bank, queries = plan.bank[machine], plan.queries[machine]
        bank_NE = emb[plan.cells[machine, of_bank, row["band"]]][:11]
        query_QE = emb[plan.cells[machine, of_queries, row["band"]]][11:]
        is_target = [np.array([made.clips[i].domain == "target" for i in part]) for part in (bank, queries)]
        is_anomaly = np.array([made.clips[i].label == "anomaly" for i in queries])
        scores = score_all(bank_NE, is_target[0], query_QE, 2, names=(row["backend"],))[row["backend"]]
        assert row == row | domain_scores(scores, is_anomaly, is_target[1])


def test_summarise_by_hand():
    table = [
        {
            "machine": m,
            "subset": s,
            "band": b,
            "backend": "knn1",
            "s_auc": x,
            "t_auc": t,
            "pauc": p,
            "official": 0.0,
        }
        for m, s, b, x, t, p in [
            ("a", "stationary", "low", 50.0, 60.0, 55.0),
            ("a", "stationary", "high", 90.0, None, 70.0),
            ("b", "mismatched", "low", 40.0, 45.0, 50.0),
        ]
    ]
    table.append(table[0] | {"backend": "other", "s_auc": 1.0})
    found = summarise(table, "knn1")

    def over(*values):
        return pytest.approx(len(values) / sum(1 / v for v in values))

    assert found == {
        "official": over(50, 60, 55, 90, 70, 40, 45, 50),
        "stationary/official": over(50, 60, 55, 90, 70),
        "mismatched/official": over(40, 45, 50),
        "low/official": over(50, 60, 55, 40, 45, 50),
        "high/official": over(90, 70),
        "stationary/low/official": over(50, 60, 55),
        "stationary/high/official": over(90, 70),
        "mismatched/low/official": over(40, 45, 50),
    }
    assert harmonic_mean([50, 60, 55]) == found["stationary/low/official"]


def test_a_corpus_of_one_domain_has_no_target_metric():
    made = corpus(domains=("source",))
    plan = plan_of(made)
    table = score_plan(plan, made, embeddings(plan), num_bands=1, backends=NAMES)
    assert {row["backend"] for row in table} == set(NAMES)
    assert {row["t_auc"] for row in table} == {None}
    assert all(row["s_auc"] is not None for row in table)
    assert np.isfinite(list(summarise(table, "knn1").values())).all()


def test_what_cannot_be_scored_is_refused_by_name():
    made = corpus()
    no_anomalies = tuple(c for c in made.clips if (c.name, c.label) != ("b", "anomaly"))
    no_wind = tuple(c for c in made.clips if c.kind != "nonstationary")
    nobody = MachineRoles(train=("a",), search=(), confirm=("c",))

    def with_clips(clips):
        return Corpus(
            clips=clips, waves_NT=np.zeros((len(clips), 1)), roles=made.roles, sample_rate_hz=1, digest="d"
        )

    for broken, words in (
        (
            with_clips(no_anomalies),
            r"machine 'b': 11 bank clips and queries of \['normal'\] label in the search split",
        ),
        (with_clips(no_wind), "no nonstationary noise in the test split"),
        (corpus(roles=nobody), "no machine is scored in the search split"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            plan_of(broken)
        assert "\n" not in str(caught.value)
    plan = plan_of(made)
    with pytest.raises(UserError, match="knn0"):
        score_plan(plan, made, embeddings(plan), num_bands=1, backends=("knn0",))


# -- recordings that are mixed already --------------------------------------------------------------------------------


def recorded(year, *, machines=("fan/id_00", "fan/id_02", "saw/id_00")):
    made = corpus(machines=machines, domains=("source",) if year == 2020 else ("source", "target"))
    return Corpus(
        clips=tuple(c for c in made.clips if c.role == "machine"),
        waves_NT=made.waves_NT,
        roles=made.roles,
        sample_rate_hz=1,
        digest="d",
        year=year,
    )


@pytest.mark.parametrize("year", [2020, 2021, 2022, 2026])
def test_recordings_are_scored_once_as_they_are_by_the_rule_of_their_year(year):
    made = recorded(year)
    plan = plan_of(made)
    assert plan.digest == plan_of(made, seed=5).digest != plan_of(made, split="confirm").digest
    assert len(plan.clip_R) == sum(len(plan.bank[m]) + len(plan.queries[m]) for m in plan.machines)
    assert np.array_equal(plan.clip_R, plan.noise_R)
    assert np.isposinf(plan.snr_db_R).all()
    emb = embeddings(plan)
    table = score_plan(plan, made, emb, num_bands=1, backends=NAMES)
    assert [(r["machine"], r["subset"], r["band"], r["year"]) for r in table[::2]] == [
        (machine, "recorded", "", year) for machine in plan.machines
    ]
    # by way of the toolkit's names, whose parity is golden
    found = []
    for section, machine in enumerate(plan.machines):
        rows = emb[plan.cells[machine, "recorded", ""]]
        bank, queries = plan.bank[machine], plan.queries[machine]
        is_target = [np.array([made.clips[i].domain == "target" for i in part]) for part in (bank, queries)]
        is_anomaly = np.array([made.clips[i].label == "anomaly" for i in queries])
        scores = score_all(rows[: len(bank)], is_target[0], rows[len(bank) :], names=("knn1",))["knn1"]
        found.append((scores, is_anomaly, is_target[1], np.full(len(queries), 2 * section)))
    scores, is_anomaly, is_target, sections = (np.concatenate(part) for part in zip(*found, strict=True))
    rule = min(year, 2022)  # under the names of 2022 sections are joined as machines are since
    known = challenge_metrics(scores, is_anomaly, is_target, sections, year=rule, machine="fan")
    summary = summarise(table, "knn1")
    assert summary.keys() == {"official", "recorded/official", *evaluation(year, BANDS).metrics}
    assert summary["official"] == summary["recorded/official"]
    assert summary["official"] == pytest.approx(100 * known[f"dev_official{rule % 100}"], abs=1e-9)
    names = {
        2020: {"s_auc": "s_auc", "pauc": "s_pauc"},
        2021: {k: k for k in ("s_auc", "t_auc", "s_pauc", "t_pauc")},
    }
    pairs = names.get(year, {"s_auc": "smix_auc", "t_auc": "tmix_auc", "pauc": "mix_pauc"})
    row = table[0]
    assert set(evaluation(year, BANDS).metrics) == set(pairs)
    for ours, theirs in pairs.items():
        assert row[ours] == pytest.approx(100 * known[f"0_{theirs}"], abs=1e-9)
    assert {key for key in row if key.endswith("auc")} == set(pairs)


def test_what_is_evaluated_follows_the_year():
    mixed, old, new = evaluation(None, BANDS), evaluation(2020, BANDS), evaluation(2024, BANDS)
    assert (mixed.mixed, mixed.focus, mixed.bands) == (True, "low", ("low", "mid", "high"))
    assert (new.mixed, new.focus, new.bands, new.references) == (False, "", (), ("teacher",))
    assert mixed.references == ("teacher", "oracle")
    assert (old.harmonic, new.harmonic) == (False, True)
