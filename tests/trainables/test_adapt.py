"""Labels of clips with and without attributes, the group adapter's routes, and what is saved of an adapted encoder."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from search_spaces.adapt import RECIPES
from trainables import loop, lora
from trainables.adapt import Adapted, Labels
from trainables.checkpoint import load_checkpoint
from trainables.data.corpus import Clip, Corpus, MachineRoles
from trainables.draws import trained_clips
from trainables.encoders.encoder import load_encoder
from trainables.errors import UserError
from trainables.group_adapter import GroupAdapter, checksums
from trainables.loop import train

CPU = torch.device("cpu")
NAMES = ("fan", "pump", "valve", "saw")


def corpus(stated=()):
    """Two clips of each machine and domain; ``stated`` machines state an attribute."""
    clips = [
        Clip(
            role="machine",
            name=name,
            split="train",
            recording=f"{name}{n}",
            origin="",
            label="normal",
            domain=("source", "target")[n % 2],
            attributes=f"vel_{n % 2}" if name in stated else "",
        )
        for name in NAMES
        for n in range(4)
    ]
    roles = MachineRoles(train=NAMES, search=(), confirm=())
    return Corpus(
        clips=tuple(clips), waves_NT=np.zeros((16, 4)), roles=roles, sample_rate_hz=16_000, digest=""
    )


def run_of(trial, cache_dir):
    return loop._Run(trial, loop.prepare(trial, cache_dir, CPU), CPU, 0, 1)


def test_stated_attributes_are_classes_and_the_rest_is_clustered():
    labels = Labels(corpus(stated=("pump", "valve")), np.arange(16), known=1.0, num_codes=3)
    assert labels.machines == sorted(NAMES)
    assert labels.unattributed == ["fan", "saw"]
    assert labels.num_classes == 2 * 2 + 2 * 3
    fan, pump, valve, saw = (labels.class_N[4 * n : 4 * n + 4].tolist() for n in range(4))
    assert pump == [0, 1, 0, 1]
    assert valve == [2, 3, 2, 3]
    assert fan == [4] * 4  # and the two after it
    assert saw == [7] * 4
    assert labels.book_N.tolist() == [0] * 4 + [-1] * 8 + [1] * 4
    assert labels.names(np.array([0, 15])) == ["fan", "saw"]


@pytest.mark.parametrize(("known", "num"), [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_without_any_stated_attribute_domains_of_a_share_of_machines_stand_in(known, num):
    labels = Labels(corpus(), np.arange(16), known=known, num_codes=2)
    assert len(labels.unattributed) == 4 - num
    assert labels.num_classes == 2 * num + 2 * (4 - num)
    assert (labels.book_N == -1).sum() == 4 * num
    more = Labels(corpus(), np.arange(16), known=min(1.0, known + 0.25), num_codes=2)
    assert set(more.unattributed) <= set(labels.unattributed)


def test_a_machine_has_its_group_and_a_new_one_the_mean_of_all():
    torch.manual_seed(0)
    adapter = GroupAdapter(6, checksums(NAMES), num_groups=2, bottleneck=3)
    shares = adapter.shares(["fan", "pump", "saw", "valve", "winch"])  # in the order of names: groups 0 1 0 1
    assert shares.tolist() == [[1, 0], [0, 1], [1, 0], [0, 1], [0.5, 0.5]]
    token = torch.randn(5, 2, 4, 6)
    assert torch.equal(adapter(token, list("abcde")), token)  # training starts at the shared encoder
    adapter.up_GHD.data.normal_()

    def through(group):
        return (token @ adapter.down_DGH[:, group]).relu() @ adapter.up_GHD[group]

    torch.testing.assert_close(adapter(token, ["fan"] * 5), token + through(0))
    torch.testing.assert_close(adapter(token, ["valve"] * 5), token + through(1))
    torch.testing.assert_close(adapter(token, []), token + (through(0) + through(1)) / 2)


@pytest.mark.parametrize("recipe", ["paper", "lora", "full"])
@pytest.mark.parametrize("ema_decay", [0.0, 0.99])
def test_what_is_saved_is_what_was_trained_and_scores_alike(
    recipe, ema_decay, small_trial, cache_dir, tmp_path
):
    trial = small_trial("adapt", ema_decay=ema_decay)
    trial = replace(trial, params=dict(RECIPES[recipe]))
    record = list(train(trial, cache_dir=cache_dir, checkpoint_dir=tmp_path))[-1]
    saved = load_file(tmp_path / "epoch-0002.safetensors")
    student = {k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")}
    frozen = load_encoder(trial.encoder)
    own = set(frozen.state_dict())
    kept = {k.removeprefix("encoder.") for k in student if k.startswith("encoder.")}
    assert (kept == own) if recipe == "full" else not kept & own
    assert any(k.startswith("moving.") for k in saved) is (ema_decay > 0)
    assert record["metrics"]["student_bytes"] == sum(v.nbytes for v in student.values())
    run = run_of(trial, cache_dir)
    run.restore(tmp_path)
    assert record["metrics"]["trained_weights"] == sum(p.numel() for p in run.learned)

    features, names = run._features(np.arange(6)), ["fan", "fan", "blower", "pump", "winch", "valve"]
    adapted = Adapted(frozen, trial.params, student).eval()
    assert not any(isinstance(module, lora.LowRank) for module in adapted.modules())
    with torch.no_grad():
        wanted = run.judged.eval().embed(features, names)
        got = adapted.embed(features, names)
        plain = load_encoder(trial.encoder)
        before = plain.pool(plain.tokens(features))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, before, atol=1e-2)


def test_weights_of_another_adapter_are_refused(small_trial, cache_dir, tmp_path):
    trial = small_trial("adapt", epochs=1, steps_per_epoch=1)
    next(train(trial, cache_dir=cache_dir, checkpoint_dir=tmp_path))
    weights = {k.removeprefix("model."): v for k, v in load_checkpoint(tmp_path)[0].items()}
    other = RECIPES["paper"] | {"lora_rank": 4, "lora_alpha": 4.0}
    with pytest.raises(ValueError, match="down_NRI"):
        Adapted(load_encoder(trial.encoder), other, weights)


def test_learns_from_banks_only_when_told_to(small_trial, cache_dir):
    trial = small_trial("adapt", split="confirm")
    materials = loop.prepare(trial, cache_dir, CPU)
    clips = materials.corpus.clips
    usual = trained_clips(materials, adapt_on_bank=False)
    assert {clips[i].name for i in usual} == set(materials.corpus.roles.train)
    both = trained_clips(materials, adapt_on_bank=True)
    added = sorted(set(both) - set(usual))
    assert {clips[i].name for i in added} == set(materials.plan.machines)
    assert {(clips[i].split, clips[i].label) for i in added} == {("train", "normal")}
    bank = replace(trial, training=replace(trial.training, adapt_on_bank=True))
    run = run_of(bank, cache_dir)
    assert set(run.system.labels.machines) == {clips[i].name for i in both}
    losses = run.train_epoch(1)
    assert np.isfinite(list(losses.values())).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapter_kind": "prefix"}, ["adapter_kind = 'prefix'", "fc_lora, lora, full"]),
        ({"lora_rank": 0}, ["lora_rank = 0", "1"]),
        ({"lora_where": "mlp"}, ["lora_where = 'mlp'", "attention, all"]),
        ({"subcentres": 4}, ["subcentres = 4", "not a value of cluster_kind = 'vq'"]),
        ({"attributes_known": 1.5}, ["attributes_known = 1.5", "0 to 1"]),
        ({"contrast_temperature": 0}, ["contrast_temperature = 0", "above 0"]),
        ({"group_count": None}, ["group_count", "missing"]),
    ],
)
def test_refuses_before_training(change, words, small_trial, cache_dir):
    with pytest.raises(UserError) as caught:
        next(train(small_trial("adapt", params=change), cache_dir=cache_dir))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
