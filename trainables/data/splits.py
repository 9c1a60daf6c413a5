"""Which recordings train and which test where nobody said so, and which machines choose and which confirm.

Pure functions of the rows or clips and a seed; the order of rows does not matter, and one machine's draw does
not depend on another machine's rows. Parts of one recording never fall on both sides of a split that is drawn
here. What a draw costs (a machine that is not scored, one domain only) is returned as sentences that every
table prints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from trainables.data.corpus import Clip, MachineRoles
from trainables.data.manifest import Row
from trainables.errors import UserError
from trainables.settings import digest

TEST_SHARE = 1 / 3  # of a machine's normal recordings, where drawn: a bank needs more than the queries do
CONFIRM_SHARE = 0.4
FEWEST_MACHINES = 4  # with fewer scored machines none is held out
SUBSETS = {"stationary": "stationary and mismatched", "nonstationary": "nonstationary and mismatched"}


def draw_sides(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows with every empty ``split`` filled in; a split that is given stays.

    Empty rows of a recording that has a side already (an anomaly counts as test) join it. Of the rest a third
    of a scored machine's recordings, per domain, goes to test and all of an unscored one's to train; noise is
    halved.
    """
    sides: dict[tuple[str, str], str] = {}
    for row in sorted(rows, key=lambda r: r.split):  # where a recording is on both sides, test comes first
        if row.split:
            sides.setdefault((row.role, row.recording), row.split)
    for name in sorted({r.name for r in rows if r.role == "machine"}):
        mine = [r for r in rows if r.role == "machine" and r.name == name]
        drawn = _draw_machine(mine, sides, _rng(seed, "machine", name))
        sides |= {("machine", recording): side for recording, side in drawn.items()}
    for kind in SUBSETS:
        mine = [r for r in rows if r.role == "noise" and r.kind == kind]
        drawn = _draw_noise(mine, sides, _rng(seed, "noise", kind))
        sides |= {("noise", recording): side for recording, side in drawn.items()}
    return [r if r.split else dataclasses.replace(r, split=sides[r.role, r.recording]) for r in rows]


def _draw_machine(
    rows: list[Row], sides: dict[tuple[str, str], str], rng: np.random.Generator
) -> dict[str, str]:
    domain_of = {r.recording: r.domain for r in sorted(rows, key=lambda r: r.domain, reverse=True)}
    open_ = sorted(r for r in domain_of if ("machine", r) not in sides)
    if all(r.label == "normal" for r in rows):
        return dict.fromkeys(open_, "train")
    drawn: dict[str, str] = {}
    for domain in sorted({domain_of[r] for r in open_}):
        normals = [r for r in rows if r.domain == domain and r.label == "normal"]
        given = {r.split or sides.get(("machine", r.recording), "") for r in normals}
        pool = [r for r in open_ if domain_of[r] == domain]
        num_test = max(round(TEST_SHARE * len(pool)), "test" not in given)
        num_test = min(num_test, len(pool) - ("train" not in given))
        for place, i in enumerate(rng.permutation(len(pool))):
            drawn[pool[i]] = "test" if place < num_test else "train"
    return drawn


def _draw_noise(
    rows: list[Row], sides: dict[tuple[str, str], str], rng: np.random.Generator
) -> dict[str, str]:
    """Alternate, so that an environment is heard on both sides, and if it has one recording its kind is."""
    total = [sum(r.split == side for r in rows) for side in ("test", "train")]
    drawn: dict[str, str] = {}
    for name in sorted({r.name for r in rows}):
        count = [sum(r.split == side for r in rows if r.name == name) for side in ("test", "train")]
        mine = {r.recording for r in rows if r.name == name}
        pool = sorted(r for r in mine if ("noise", r) not in sides and r not in drawn)
        for i in rng.permutation(len(pool)):
            side = int((count[0], total[0]) > (count[1], total[1]))
            drawn[pool[i]] = ("test", "train")[side]
            count[side] += 1
            total[side] += 1
    return drawn


def machine_roles(
    clips: Sequence[Clip], seed: int, type_of: Callable[[str], str] = lambda name: name
) -> tuple[MachineRoles, list[str]]:
    """Who trains, who is scored while searching, who once at the end, and sentences about it.

    Machines without anomalies train. With at least four others, two or 40% of them confirm and the rest
    search and train. With fewer, the test recordings of each are halved, and confirmation alone sees one
    half. Machines of one type (``type_of`` their name) are counted as one and stay together.

    Raises:
        UserError: no machine can be scored or none confirmed; a machine with anomalies but without normal
            clips in train or in test; a machine with test normals only.
    """
    names = sorted({c.name for c in clips if c.role == "machine"})
    scored, notes = [], []
    for name in names:
        mine = [c for c in clips if c.role == "machine" and c.name == name]
        domains = _require_scorable(name, mine)
        if not domains:
            notes.append(f"{name} has no anomalies: it trains and is not scored.")
            continue
        scored.append(name)
        if len(domains) == 1:
            notes.append(
                f"{name} has normal test clips of one domain only ({domains[0]}): "
                "official is the harmonic mean of the scores that exist."
            )
    if not scored:
        raise UserError(
            "no machine can be scored: none has anomalies; add rows of a machine with label anomaly"
        )
    types = sorted({type_of(name) for name in scored})
    if len(types) < FEWEST_MACHINES:
        return _hold_out_recordings(clips, names, scored, seed, notes)
    num_confirm = max(2, round(CONFIRM_SHARE * len(types)))
    order = _rng(seed, "roles").permutation(len(types))
    held = {types[i] for i in order[:num_confirm]}
    confirm = tuple(n for n in scored if type_of(n) in held)
    search = tuple(n for n in scored if type_of(n) not in held)
    train = tuple(n for n in names if type_of(n) not in held)
    return MachineRoles(train=train, search=search, confirm=confirm), notes


def _require_scorable(name: str, clips: list[Clip]) -> list[str]:
    """Domains of the normal test clips of a machine that is scored; none if it only trains."""
    bank = any(c.split == "train" for c in clips)
    queries = {c.domain for c in clips if c.split == "test" and c.label == "normal"}
    anomalies = any(c.label == "anomaly" for c in clips)
    if anomalies and not queries:
        raise UserError(
            f"machine {name!r}: has anomalies but no normal clips in test; give some normal recordings split "
            "test, or leave the split of at least two empty"
        )
    if not bank:
        raise UserError(
            f"machine {name!r}: has no normal clips in train; give some normal recordings split train"
        )
    return sorted(queries) if anomalies else []


def _hold_out_recordings(
    clips: Sequence[Clip], names: list[str], scored: list[str], seed: int, notes: list[str]
) -> tuple[MachineRoles, list[str]]:
    held: set[str] = set()
    confirm = []
    for name in scored:
        mine = [c for c in clips if c.role == "machine" and c.name == name]
        half = _half(mine, _rng(seed, "confirm", name))
        if half is None:
            notes.append(
                f"{name} has too few test recordings to hold any out: it is scored in the search only."
            )
            continue
        held |= half
        confirm.append(name)
        tested = {c.recording for c in mine if c.split == "test"}
        notes.append(
            f"{name} is confirmed on {len(half)} held-out of its {len(tested)} test recordings, not on a "
            f"held-out machine: the corpus has fewer than {FEWEST_MACHINES} scored machines."
        )
    if not confirm:
        raise UserError(
            f"{', '.join(scored)}: too few recordings to confirm on; with fewer than {FEWEST_MACHINES} "
            "scored machines one of them needs two normal and two anomalous test recordings and other "
            "normals in train; add recordings, or name pieces recorded apart as recordings of their own"
        )
    roles = MachineRoles(
        train=tuple(names), search=tuple(scored), confirm=tuple(confirm), confirm_recordings=frozenset(held)
    )
    return roles, notes


def _half(clips: list[Clip], rng: np.random.Generator) -> set[str] | None:
    """Half of a machine's test recordings, both labels on both sides and a bank left for the other half."""
    strata: dict[tuple[tuple[str, ...], str], list[str]] = {}
    parts: dict[str, list[Clip]] = {}
    for clip in clips:
        if clip.split == "test":
            parts.setdefault(clip.recording, []).append(clip)
    for recording in sorted(parts):
        labels, domains = ({getattr(c, what) for c in parts[recording]} for what in ("label", "domain"))
        strata.setdefault((tuple(sorted(labels)), min(domains)), []).append(recording)
    halves: tuple[set[str], set[str]] = (set(), set())
    turn: dict[tuple[str, ...], int] = {}
    for (kind, _), pool in sorted(strata.items()):
        for i in rng.permutation(len(pool)):
            halves[turn.get(kind, 0)].add(pool[i])
            turn[kind] = 1 - turn.get(kind, 0)  # goes on over domains, so that labels stay balanced
    for search, confirm in (halves, halves[::-1]):
        both = all(
            {c.label for r in side for c in parts[r]} == {"normal", "anomaly"} for side in (search, confirm)
        )
        if both and any(c.split == "train" and c.recording not in confirm for c in clips):
            return confirm
    return None


def require_noise(clips: Iterable[Clip]) -> None:
    """Raises UserError unless every subset has noise to score with and training has noise at all."""
    noise = [c for c in clips if c.role == "noise"]
    for kind, subsets in SUBSETS.items():
        if not any(c.kind == kind and c.split == "test" for c in noise):
            raise UserError(
                f"no {kind} noise in test, which the subsets {subsets} need; add rows with role noise, kind "
                f"{kind} and split test or empty"
            )
    if not any(c.split == "train" for c in noise):
        raise UserError(
            "no noise in train, which the training mixtures of all subsets need (stationary or "
            "nonstationary); add rows with role noise and split train, or leave the split of two recordings "
            "empty"
        )


def _rng(*name: object) -> np.random.Generator:
    return np.random.default_rng(int(digest([str(part) for part in name]), 16))
