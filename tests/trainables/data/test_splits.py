"""Drawn splits and roles: nothing leaks from one side to the other, whatever the manifest looks like."""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainables.data.corpus import Clip
from trainables.data.manifest import Row
from trainables.data.splits import draw_sides, machine_roles, require_noise
from trainables.errors import UserError


def row(recording: str, *, name: str = "pump", label: str = "normal", **more: str) -> Row:
    cells = {
        "role": "machine",
        "domain": "source",
        "kind": "",
        "split": "test" if label == "anomaly" else "",
    } | more
    return Row(
        where="row",
        path="a.wav",
        name=name,
        label=label,
        recording=f"{name}/{recording}",
        start_s=0,
        end_s=None,
        **cells,
    )


def noise(recording: str, *, name: str = "hall", kind: str = "stationary", split: str = "") -> Row:
    return row(recording, name=name, role="noise", label="", domain="", kind=kind, split=split)


def clips(rows: Iterable[Row]) -> list[Clip]:
    fields = ("role", "name", "split", "recording", "kind", "label", "domain")
    return [Clip(origin="a.wav", **{f: getattr(r, f) for f in fields}) for r in rows]


def sides(rows: Iterable[Row]) -> dict[str, set[str]]:
    found = defaultdict(set)
    for r in rows:
        found[r.recording].add(r.split)
    return found


machines = st.builds(
    row,
    st.sampled_from("123456"),
    name=st.sampled_from(["pump", "fan"]),
    label=st.sampled_from(["normal", "normal", "anomaly"]),
    domain=st.sampled_from(["source", "target"]),
)
noises = st.builds(noise, st.sampled_from("1234"), name=st.sampled_from(["hall", "road"]))
given_split = st.lists(st.sampled_from(["", "", "train", "test"]), min_size=40, max_size=40)


@settings(deadline=None)  # two cores may be busy
@given(rows=st.lists(machines | noises, max_size=30), seed=st.integers(0, 99))
def test_no_recording_falls_on_both_sides_of_a_drawn_split(rows: list[Row], seed: int) -> None:
    drawn = draw_sides(rows, seed)
    assert all(len(found) == 1 for found in sides(drawn).values())
    assert all(r.split in ("train", "test") for r in drawn)
    assert [dataclasses.replace(r, split=before.split) for r, before in zip(drawn, rows, strict=True)] == rows


@settings(deadline=None)
@given(rows=st.lists(machines | noises, max_size=30), splits=given_split, seed=st.integers(0, 99))
def test_a_given_split_stays_and_the_rest_of_its_recording_joins_it(rows, splits, seed) -> None:
    rows = [
        r if r.label == "anomaly" else dataclasses.replace(r, split=s)
        for r, s in zip(rows, splits, strict=False)
    ]
    before = sides(r for r in rows if r.split)
    for old, new in zip(rows, draw_sides(rows, seed), strict=True):
        assert (
            new.split == old.split
            if old.split
            else not before[old.recording] or new.split in before[old.recording]
        )
    after = sides(draw_sides(rows, seed))
    assert all(len(found) == 1 for recording, found in after.items() if len(before[recording]) < 2)


@settings(deadline=None)
@given(rows=st.lists(machines | noises, max_size=30), seed=st.integers(0, 9), shuffle=st.randoms())
def test_a_draw_depends_on_the_seed_and_not_on_the_order(
    rows: list[Row], seed: int, shuffle: random.Random
) -> None:
    other = list(rows)
    shuffle.shuffle(other)
    assert sides(draw_sides(rows, seed)) == sides(draw_sides(other, seed))


def test_seeds_differ() -> None:
    rows = [row(str(i)) for i in range(9)] + [row("bad", label="anomaly")]
    assert len({tuple(r.split for r in draw_sides(rows, seed)) for seed in range(9)}) > 3


@pytest.mark.parametrize(("count", "tested"), [(1, 0), (2, 1), (3, 1), (6, 2), (9, 3), (10, 3)])
def test_a_third_of_the_normal_recordings_tests_in_each_domain(count: int, tested: int) -> None:
    rows = [row(f"{d}{i}", domain=d) for d in ("source", "target") for i in range(count)]
    drawn = draw_sides([*rows, row("bad", label="anomaly")], 0)
    for domain in ("source", "target"):
        normals = [r for r in drawn if r.label == "normal" and r.domain == domain]
        assert sum(r.split == "test" for r in normals) == tested


def test_a_draw_completes_what_is_given() -> None:
    bad = row("bad", label="anomaly")
    drawn = draw_sides([row("1"), row("2", split="train"), bad], 0)
    assert drawn[0].split == "test"
    drawn = draw_sides([row("1"), row("2", split="test"), bad], 0)
    assert drawn[0].split == "train"
    drawn = draw_sides([row("1"), row("1", label="anomaly"), row("2")], 0)  # 1 is on the test side already
    assert [r.split for r in drawn] == ["test", "test", "train"]


def test_a_machine_that_is_not_scored_trains_with_all_it_has() -> None:
    assert {r.split for r in draw_sides([row(str(i)) for i in range(5)], 0)} == {"train"}


def test_noise_is_halved_and_single_recordings_serve_both_sides() -> None:
    drawn = draw_sides([noise(str(i)) for i in range(7)], 0)
    assert sorted(r.split for r in drawn) == ["test"] * 4 + ["train"] * 3
    drawn = draw_sides([noise("1", name=name) for name in ("hall", "road", "shop", "yard")], 0)
    assert sorted(r.split for r in drawn) == ["test", "test", "train", "train"]
    assert [r.split for r in draw_sides([noise("1"), noise("2", split="test")], 0)] == ["train", "test"]


def scored(name: str, *, normals: int = 2, anomalies: int = 2) -> list[Row]:
    bank = [row(f"bank{i}", name=name, split="train") for i in range(2)]
    good = [row(f"good{i}", name=name, split="test") for i in range(normals)]
    return [*bank, *good, *(row(f"bad{i}", name=name, label="anomaly") for i in range(anomalies))]


@pytest.mark.parametrize(("count", "held"), [(4, 2), (5, 2), (6, 2), (7, 3), (10, 4)])
def test_machines_confirm_where_there_are_enough(count: int, held: int) -> None:
    rows = [r for i in range(count) for r in scored(f"m{i}")] + [row("1", name="idle", split="train")]
    roles, notes = machine_roles(clips(rows), 0)
    assert len(roles.confirm) == held
    assert sorted((*roles.search, *roles.confirm)) == [f"m{i}" for i in range(count)]
    assert sorted(roles.train) == sorted(("idle", *roles.search))
    assert roles.confirm_recordings == frozenset()
    assert notes[0] == "idle has no anomalies: it trains and is not scored."
    assert len({machine_roles(clips(rows), seed)[0].confirm for seed in range(20)}) > 1
    assert not any(roles.sees(c, "search") for c in clips(rows) if c.name in roles.confirm)
    assert all(roles.sees(c, "confirm") == (c.name in roles.confirm) for c in clips(rows))


plants = st.integers(1, 6).flatmap(
    lambda count: st.tuples(
        *(
            st.lists(machines, min_size=5, max_size=12).map(lambda rows, i=i: rename(rows, f"m{i}"))
            for i in range(count)
        )
    )
)


def rename(rows: list[Row], name: str) -> list[Row]:
    return [dataclasses.replace(r, name=name, recording=f"{name}/{r.recording}") for r in rows]


@settings(max_examples=150, deadline=None)
@given(parts=plants, splits=given_split, seed=st.integers(0, 9))
def test_what_confirms_was_never_seen_before(parts, splits, seed) -> None:
    rows = [r for part in parts for r in part]
    explicit = {i: s for i, s in enumerate(splits) if s and i < len(rows) and rows[i].label == "normal"}
    rows = [dataclasses.replace(r, split=explicit.get(i, r.split)) for i, r in enumerate(rows)]
    found = clips(draw_sides(rows, seed))
    try:
        roles, _ = machine_roles(found, seed)
    except UserError:
        return
    assert roles.search
    assert roles.confirm
    for name in roles.confirm:
        mine = [c for c in found if c.name == name]
        queries = [c for c in mine if c.split == "test" and roles.sees(c, "confirm")]
        seen = {c.recording for c in mine if roles.sees(c, "search")}
        assert not seen & {c.recording for c in queries}
        assert {c.label for c in queries} == {"normal", "anomaly"}
        assert any(c.split == "train" for c in mine)
    for name in roles.search:
        mine = [c for c in found if c.name == name and roles.sees(c, "search")]
        assert {c.label for c in mine if c.split == "test"} == {"normal", "anomaly"}
        assert any(c.split == "train" for c in mine)


def test_recordings_are_halved_by_label_where_machines_are_few() -> None:
    rows = scored("pump", normals=5, anomalies=4) + scored("fan", normals=2, anomalies=3)
    roles, notes = machine_roles(clips(rows), 0)
    assert roles.train == roles.search == roles.confirm == ("fan", "pump")
    held = sorted(r.split("/")[0] + r.split("/")[1][:3] for r in roles.confirm_recordings)
    assert held == ["fanbad", "fangoo", "pumpbad", "pumpbad", "pumpgoo", "pumpgoo"]
    assert "pump is confirmed on 4 held-out of its 9 test recordings" in notes[-1]
    assert len({machine_roles(clips(rows), seed)[0].confirm_recordings for seed in range(20)}) > 5


def test_both_domains_are_confirmed() -> None:
    rows = scored("pump", normals=2) + [row(f"far{i}", domain="target", split="test") for i in range(2)]
    roles, _ = machine_roles(clips(rows), 0)
    assert len({r for r in roles.confirm_recordings if "far" in r}) == 1


def test_training_parts_of_held_out_recordings_are_hidden_from_the_search_only() -> None:
    rows = scored("pump", normals=4)
    rows += [dataclasses.replace(r, split="train") for r in rows if "good" in r.recording]
    found = clips(rows)
    roles, _ = machine_roles(found, 0)
    train = [c for c in found if c.split == "train"]
    assert sum(roles.sees(c, "search") for c in train) == 4
    assert sum(roles.sees(c, "confirm") for c in train) == 6


def test_the_search_keeps_a_bank() -> None:
    both = [row("a", split=s) for s in ("train", "test")]  # the only bank; it may not be held out
    rows = [*both, row("b", split="test"), row("bad1", label="anomaly"), row("bad2", label="anomaly")]
    for seed in range(8):
        roles, _ = machine_roles(clips(rows), seed)
        assert "pump/a" not in roles.confirm_recordings


def test_a_machine_with_few_recordings_is_searched_and_not_confirmed() -> None:
    roles, notes = machine_roles(clips(scored("pump", anomalies=1) + scored("fan")), 0)
    assert (roles.search, roles.confirm) == (("fan", "pump"), ("fan",))
    assert not any("pump" in r for r in roles.confirm_recordings)
    assert "pump has too few test recordings to hold any out: it is scored in the search only." in notes


def test_nothing_to_confirm_on(refusal) -> None:
    with refusal("pump: too few recordings to confirm on", "two normal and two anomalous test recordings"):
        machine_roles(clips(scored("pump", anomalies=1)), 0)


def test_nothing_to_score(refusal) -> None:
    with refusal("no machine can be scored", "label anomaly"):
        machine_roles(clips([row("1", split="train")]), 0)


def test_a_machine_that_lacks_a_side(refusal) -> None:
    bad = [row("bad1", label="anomaly"), row("bad2", label="anomaly")]
    with refusal("machine 'pump': has anomalies but no normal clips in test"):
        machine_roles(clips([row("1", split="train"), *bad]), 0)
    with refusal("machine 'pump': has no normal clips in train"):
        machine_roles(clips([row("1", split="test"), *bad]), 0)
    with refusal("machine 'pump': has no normal clips in train"):
        machine_roles(clips([row("1", split="test")]), 0)


def test_one_domain_is_said() -> None:
    _, notes = machine_roles(clips(scored("pump")), 0)
    assert "pump has normal test clips of one domain only (source)" in notes[0]
    _, notes = machine_roles(clips([*scored("pump"), row("t", domain="target", split="test")]), 0)
    assert not any("domain" in note for note in notes)


def test_a_split_that_does_not_exist() -> None:
    roles, _ = machine_roles(clips(scored("pump")), 0)
    with pytest.raises(ValueError, match="search or confirm"):
        roles.sees(clips([row("1")])[0], "train")


@pytest.mark.parametrize("kind", ["stationary", "nonstationary"])
def test_noise_that_a_subset_lacks(refusal, kind: str) -> None:
    other = {"stationary": "nonstationary", "nonstationary": "stationary"}[kind]
    rows = [noise("1", kind=other, split="test"), noise("2", kind=kind, split="train")]
    with refusal(f"no {kind} noise in test", f"subsets {kind} and mismatched"):
        require_noise(clips(rows))
    require_noise(clips([*rows, noise("3", kind=kind, split="test")]))


def test_training_without_noise(refusal) -> None:
    with refusal("no noise in train", "stationary or nonstationary"):
        require_noise(clips(noise("1", kind=kind, split="test") for kind in ("stationary", "nonstationary")))
