"""Who is told apart, what a batch holds in each stage, and the score that only this system has."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from trainables import cache, loop
from trainables.data.corpus import Clip
from trainables.draws import trained_clips
from trainables.errors import UserError
from trainables.identify import BACKEND, identity
from trainables.loop import train
from trainables.metric_learning import UNLABELLED
from trainables.scoring.metrics import domain_scores

CPU = torch.device("cpu")
ENCODER = {"network_kind": "encoder", "stgram_channels": None, "stgram_norm": None}
NO_CONTRAST = {"contrast_kind": "none", "contrast_temperature": None, "contrast_share": None}


@pytest.fixture
def made(small_trial, cache_dir):
    """``made(params, training={...})``: the parts of a run that has not begun."""

    def make(params=ENCODER, scoring=None, **training):
        trial = small_trial("identify", params=params, **training)
        trial = replace(trial, scoring=replace(trial.scoring, **(scoring or {})))
        return loop._Run(trial, cache.prepare(trial, cache_dir, CPU), CPU, 0, 1)

    return make


def drawn(system, progress, batch_size=8, count=30):
    return system.draws(np.random.default_rng(1), count=count, batch_size=batch_size, progress=progress)


def test_identity_is_machine_and_unit():
    clip = Clip(role="machine", name="fan", split="train", recording="a", origin="a", section="unit_03")
    assert identity(clip, "unit") == "fan unit_03"
    assert identity(clip, "machine") == "fan"
    assert identity(replace(clip, section=""), "unit") == "fan"


def test_units_of_training_machines_are_told_apart(made):
    system = made().system
    corpus, roles = system.materials.corpus, system.materials.corpus.roles
    assert {name.split()[0] for name in system.identities} == set(roles.train)
    assert len(system.identities) > len(roles.train)
    machines = made({**ENCODER, "identity_level": "machine"}).system
    assert machines.identities == sorted(roles.train)
    for i in system.materials.train_machine:
        assert system.identities[system.label_N[i]] == identity(corpus.clips[i], "unit")
    unheard = set(range(len(corpus.clips))) - set(system.materials.train_machine.tolist())
    assert all(system.label_N[i] == UNLABELLED for i in unheard if corpus.clips[i].name not in roles.train)


@pytest.mark.parametrize("split", ["search", "confirm"])
def test_banks_train_only_if_asked_and_queries_never(split, small_trial, cache_dir):
    materials = cache.prepare(small_trial("identify", split=split), cache_dir, CPU)
    plan, clips = materials.plan, materials.corpus.clips
    bank, queries = (set(np.concatenate(list(side.values()))) for side in (plan.bank, plan.queries))
    plain, adapted = (set(trained_clips(materials, adapt_on_bank=on)) for on in (False, True))
    assert plain == set(materials.train_machine)
    assert adapted == plain | bank
    assert not adapted & queries
    assert {(clips[i].split, clips[i].label) for i in adapted} == {("train", "normal")}


def test_a_batch_holds_pairs_and_machines_come_equally_often(made):
    system = made(ENCODER).system
    for progress in (0.0, 1.0):
        draws = drawn(system, progress)
        for draw in draws:
            label = system.label_N[draw.clip_B]
            assert (label[::2] == label[1::2]).all()
        pairs = np.concatenate([d.clip_B for d in draws]).reshape(-1, 2)
        several = [len(system.clips_of[system.label_N[i]]) > 1 for i in pairs[:, 0]]
        assert (pairs[several, 0] != pairs[several, 1]).all()  # a clip alone meets itself in another noise
        often = np.unique([system.materials.corpus.clips[i].name for i in pairs[:, 0]], return_counts=True)[1]
        assert np.ptp(often) <= 1
        noise = np.concatenate([d.noise_B for d in draws])
        assert len(set(noise)) == min(len(noise), len(system.materials.train_noise))


def test_a_sample_is_contrasted_with_itself_in_another_noise(made):
    system = made({**ENCODER, "contrast_kind": "sample"}).system
    draw = drawn(system, 0.0)[0]
    assert (draw.clip_B[::2] == draw.clip_B[1::2]).all()
    assert (draw.noise_B[::2] != draw.noise_B[1::2]).all()
    later = np.concatenate([d.clip_B for d in drawn(system, 1.0)]).reshape(-1, 2)
    assert (later[:, 0] != later[:, 1]).any()


def test_a_batch_may_be_odd(made):
    assert [len(d.clip_B) for d in drawn(made().system, 0.0, batch_size=5)] == [5] * 30


@pytest.mark.parametrize(
    ("params", "training", "stages"),
    [
        ({"contrast_share": 0.25}, {"epochs": 5}, [True, False, False, False, False]),
        ({"contrast_share": 0.5}, {"epochs": 5}, [True, True, False, False, False]),
        ({"contrast_share": 1}, {"epochs": 3}, [True, True, True]),
        ({"contrast_share": 0}, {"epochs": 2}, [False, False]),
        ({"contrast_share": 0.9}, {"epochs": 1}, [False]),
        (NO_CONTRAST, {"epochs": 2}, [False, False]),
    ],
)
def test_the_stages_are_the_first_and_the_last_epochs(params, training, stages, made):
    system, epochs = made({**ENCODER, **params}, **training).system, training["epochs"]
    found = []
    for epoch in range(epochs):
        drawn(system, epoch / max(1, epochs - 1), count=1)
        found.append(system.first_stage)
    assert found == stages


@pytest.mark.parametrize(("joint", "weights"), [(0.0, [(1, 0), (0, 1)]), (0.5, [(1, 0), (0.5, 1)])])
def test_the_stage_weighs_the_losses(joint, weights, made):
    system = made({**ENCODER, "joint_weight": joint}).system.train()
    draws = drawn(system, 0.0, count=1)
    found = []
    for system.first_stage in (True, False):
        losses = system(draws[0], 0, 1)
        assert {name: tuple(v.shape) for name, v in losses.items()} == {"contrast": (8,), "identity": (8,)}
        found.append([losses[name].mean().item() for name in system.losses])
    full = [found[0][0], found[1][1]]
    assert min(full) > 0
    for values, (contrast, named) in zip(found, weights, strict=True):
        assert values == pytest.approx([contrast * full[0], named * full[1]], rel=1e-4)


def test_its_own_score_is_the_surprise_at_the_identity(made):
    run = made(ENCODER, adapt_on_bank=True)
    system, plan = run.system, run.materials.plan
    machines = plan.machines[:2]
    emb = run.embed(plan.rows(machines))
    rows = system.own_rows(emb, machines)
    cells = {(r["machine"], r["subset"], r["band"]) for r in rows}
    assert len(rows) == len(cells) == 2 * 9
    assert {r["backend"] for r in rows} == {BACKEND}
    # by hand, for one cell
    machine, band = machines[1], plan.bands[0]
    queries = plan.cell(machine, "stationary", band)[len(plan.bank[machine]) :]
    with torch.no_grad():
        cosine = system.classifier.cosine(system.project(torch.from_numpy(emb[queries])))
    share = torch.softmax(30 * cosine.double(), 1)[:, system.identities.index(f"{machine} unit_00")]
    clips = [run.materials.corpus.clips[i] for i in plan.queries[machine]]
    by_hand = domain_scores(
        -share.log().numpy(), [c.label == "anomaly" for c in clips], [c.domain == "target" for c in clips]
    )
    found = next(r for r in rows if (r["machine"], r["subset"], r["band"]) == (machine, "stationary", band))
    assert found["pauc"] == pytest.approx(by_hand["pauc"], abs=1e-6)
    assert found["official"] == pytest.approx(by_hand["official"], abs=1e-6)


def test_who_did_not_train_has_no_such_score(made):
    run = made(ENCODER)
    assert (
        run.system.own_rows(np.zeros((len(run.materials.plan.clip_R), 1)), run.materials.plan.machines) == []
    )
    without = made({**ENCODER, "contrast_share": 1}, adapt_on_bank=True)  # no classifier was trained
    assert without.system.own_rows(np.zeros((1, 1)), without.materials.plan.machines) == []


def test_the_margin_at_test_is_a_switch(made):
    off = made(ENCODER, adapt_on_bank=True)
    on = made(ENCODER, scoring={"margin_at_test": True}, adapt_on_bank=True)
    emb = np.random.default_rng(0).normal(size=(4, off.system.encoder.embedding_size)).astype(np.float32)
    label = np.arange(4)
    plain, margin = (run.system._surprise(emb, label) for run in (off, on))
    with torch.no_grad():
        cosine = off.system.classifier.cosine(off.system.project.eval()(torch.from_numpy(emb)))
    own = cosine[range(4), range(4)].double()
    moved = cosine.double().clone()
    moved[range(4), range(4)] = torch.cos(own.acos() + 1)
    assert (own.acos() + 1 < math.pi).all()
    for found, logits in ((plain, cosine.double()), (margin, moved)):
        expected = -torch.log_softmax(30 * logits, 1)[range(4), range(4)]
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4)
    assert (margin > plain).all()


def test_the_anchor_in_the_denominator_is_a_switch(made):
    losses = []
    for on in (False, True):
        system = made(ENCODER, anchor_in_denominator=on).system.train()
        losses.append(system(drawn(system, 0.0, count=1)[0], 0, 1)["contrast"].detach())
    assert (losses[1] > losses[0]).all()  # one more term in each sum


def test_a_record_has_the_score_beside_the_back_ends(small_trial, cache_dir):
    trial = small_trial("identify", params=ENCODER, adapt_on_bank=True, steps_per_epoch=1)
    first, last = train(trial, cache_dir=cache_dir)
    for record in (first, last):
        assert 0 <= record["metrics"]["identity_official"] <= 100
    assert {BACKEND} < {row["backend"] for row in last["table"]}
    assert len({row["machine"] for row in last["table"] if row["backend"] == BACKEND}) == 6


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"stgram_channels": 12}, ["stgram_channels = 12", "multiple of 8"]),
        ({"stgram_norm": "layer"}, ["stgram_norm = 'layer'", "batch, group"]),
        ({"network_kind": "encoder"}, ["stgram_channels", "remove it"]),
        ({"contrast_kind": "clip"}, ["contrast_kind = 'clip'", "identity, sample, none"]),
        ({"contrast_share": 1.5}, ["contrast_share = 1.5", "0 to 1"]),
        ({"arcface_centres": 1.5}, ["arcface_centres = 1.5", "multiple of 1"]),
        ({"identity_level": None}, ["identity_level = None", "unit, machine"]),
    ],
)
def test_refuses_what_makes_no_system(params, words, made):
    with pytest.raises(UserError) as caught:
        made(params)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_one_machine_cannot_be_told_apart(small_trial, cache_dir):
    trial = small_trial("identify", params={**ENCODER, "identity_level": "machine"})
    materials = cache.prepare(trial, cache_dir, CPU)
    one = materials.corpus.clips[materials.train_machine[0]].name
    alone = [i for i in materials.train_machine if materials.corpus.clips[i].name == one]
    with pytest.raises(UserError, match="1 machine to tell apart"):
        loop._Run(trial, replace(materials, train_machine=np.array(alone)), CPU, 0, 1)
