import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from trainables.errors import UserError
from trainables.loss_weighting import NAMES, loss_weighting

EXAMPLES = {
    "fixed": {"w_tag": 1.0, "w_mix": 0.5},
    "uncertainty": {},
    "gradnorm": {"gradnorm_alpha": 1.0},
    "dwa": {"dwa_temperature": 2.0},
}


def make(kind, **changes):
    return loss_weighting({"weighting_kind": kind, **EXAMPLES[kind], **changes})


def two_losses(tag=2.0, mix=0.5):
    """Losses of these values over one shared parameter."""
    shared = nn.Parameter(torch.ones(1))
    return {"tag": tag * shared.sum(), "mix": mix * shared.sum()}, [shared]


@pytest.mark.parametrize("kind", EXAMPLES)
def test_total_is_the_weighted_sum_and_reaches_the_model(kind):
    weighting = make(kind)
    losses, shared = two_losses()
    weights = weighting.weights()
    total = weighting(losses, shared)
    total.backward()
    assert total.item() == pytest.approx(2.0 * weights["tag"] + 0.5 * weights["mix"])
    assert shared[0].grad.item() == pytest.approx(2.0 * weights["tag"] + 0.5 * weights["mix"])


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("name", NAMES)
def test_one_loss_alone_is_enough(kind, name):
    weighting = make(kind)
    for _ in range(3):
        losses, shared = two_losses()
        weighting({name: losses[name]}, shared).backward()
        assert shared[0].grad.item() != 0
        weighting.end_epoch({name: 1.0})
    assert all(math.isfinite(weight) and weight > 0 for weight in weighting.weights().values())


@pytest.mark.parametrize("kind", EXAMPLES)
def test_losses_nobody_asked_for_and_no_losses_are_defects(kind):
    losses, shared = two_losses()
    with pytest.raises(ValueError, match="'other'"):
        make(kind)(losses | {"other": losses["tag"]}, shared)
    with pytest.raises(ValueError, match="at least one of tag, mix"):
        make(kind)({}, shared)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_state_goes_through_safetensors_and_back(kind):
    weighting, restored = make(kind), make(kind)
    optimizer = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1}, *weighting.parameter_groups()]
    )
    for epoch in range(3):
        losses, shared = two_losses(3.0 - epoch, 1.0)
        weighting(losses, shared).backward()
        optimizer.step()
        weighting.end_epoch({"tag": 3.0 - epoch, "mix": 1.0})
    state = weighting.state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    restored.load_state_dict(load(save(state)))
    assert restored.weights() == weighting.weights()
    if kind != "fixed":
        assert restored.weights() != make(kind).weights()


def test_a_weight_of_zero_takes_the_loss_out():
    weighting = make("fixed", w_mix=0.0)
    losses, shared = two_losses(mix=math.nan)
    assert weighting.active == ("tag",)
    assert weighting(losses, shared).item() == 2.0
    assert weighting.weights() == {"tag": 1.0, "mix": 0.0}
    with pytest.raises(ValueError, match="at least one of tag is needed"):
        weighting({"mix": losses["mix"]}, shared)


@pytest.mark.parametrize("kind", ["uncertainty", "gradnorm", "dwa"])
def test_learned_weights_keep_all_losses_active(kind):
    assert make(kind).active == NAMES


def test_uncertainty_settles_where_weights_are_one_over_twice_the_loss():
    weighting = make("uncertainty")
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        losses, shared = two_losses(4.0, 0.25)
        total = weighting(losses, shared)
        total.backward()
        optimizer.step()
    assert weighting.weights() == pytest.approx({"tag": 1 / 8, "mix": 2.0}, rel=1e-4)
    assert total.item() == pytest.approx(0.5 * (1 + math.log(4.0) + 1 + math.log(0.25)), rel=1e-4)


def test_uncertainty_gradient_by_hand():
    weighting = make("uncertainty")
    losses, shared = two_losses(3.0, 1.0)
    weighting(losses, shared).backward()
    assert weighting.log_variance.grad.tolist() == pytest.approx([0.5 * (1 - 3.0), 0.5 * (1 - 1.0)])


def test_only_uncertainty_asks_for_the_optimizer_and_is_not_decayed():
    for kind in EXAMPLES:
        groups = make(kind).parameter_groups()
        assert len(groups) == (kind == "uncertainty")
        assert all(group["weight_decay"] == 0 and group["lr"] > 0 for group in groups)
        assert sum(len(group["params"]) for group in groups) == len(list(make(kind).parameters()))


def gradnorm_toy(weighting, scale, steps):
    """Two regressions on one shared layer whose losses differ by ``scale``; gradient norms at the end."""
    generator = torch.Generator().manual_seed(0)
    x, targets = torch.randn(32, 4, generator=generator), torch.randn(2, 32, 4, generator=generator)
    layer = nn.Linear(4, 4, bias=False)
    nn.init.eye_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4 / scale)
    for _ in range(steps):
        y = layer(x)
        losses = {"tag": scale * (y - targets[0]).square().mean(), "mix": (y - targets[1]).square().mean()}
        optimizer.zero_grad()
        weighting(losses, [layer.weight]).backward()
        optimizer.step()
    y = layer(x)
    losses = [scale * (y - targets[0]).square().mean(), (y - targets[1]).square().mean()]
    return [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm().item() for loss in losses]


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_gradnorm_balances_gradients_of_very_different_scale(scale):
    weighting = make("gradnorm", gradnorm_alpha=0.0)
    raw = gradnorm_toy(weighting, scale, steps=300)
    weights = weighting.weights()
    ratio = weights["tag"] * raw[0] / (weights["mix"] * raw[1])
    assert not 0.2 < raw[0] / raw[1] < 5
    assert ratio == pytest.approx(1.0, abs=0.15)
    assert sum(weights.values()) == pytest.approx(2.0, rel=1e-5)


def test_gradnorm_favours_the_loss_that_falls_more_slowly():
    def balance(alpha):
        weighting = make("gradnorm", gradnorm_alpha=alpha)
        for step in range(200):
            # Equal gradients at every step; tag keeps its value while mix falls to a tenth of it.
            shared = nn.Parameter(torch.ones(1))
            mix = shared.sum() + (0.0 if step == 0 else -0.9)
            weighting({"tag": shared.sum(), "mix": mix}, [shared]).backward()
        return weighting.weights()

    assert balance(0.0) == pytest.approx({"tag": 1.0, "mix": 1.0}, abs=0.05)
    paced = balance(0.5)
    assert paced["tag"] / paced["mix"] == pytest.approx(math.sqrt(10), rel=0.1)


def test_gradnorm_first_step_by_hand():
    weighting = make("gradnorm", gradnorm_alpha=1.5)
    losses, shared = two_losses(3.0, 1.0)
    weighting(losses, shared)
    # At the first step both losses are at their first value, so the target is the mean norm 2: down by
    # 0.025 * 3/2 and up by 0.025 * 1/2 in the logarithm, then brought back to a sum of 2.
    moved = [math.exp(-0.025 * 1.5), math.exp(0.025 * 0.5)]
    expected = [2 * value / sum(moved) for value in moved]
    assert list(weighting.weights().values()) == pytest.approx(expected, rel=1e-5)
    assert weighting.first_loss.tolist() == [3.0, 1.0]


def test_gradnorm_leaves_model_gradients_alone_and_learns_nothing_while_judging():
    weighting = make("gradnorm")
    losses, shared = two_losses()
    weighting(losses, shared)
    assert shared[0].grad is None
    before = weighting.weights()
    weighting.eval()
    weighting(losses, shared)
    weighting.train()
    with torch.no_grad():
        weighting(losses, shared)
    assert weighting.weights() == before


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_gradnorm_is_not_moved_by_a_loss_it_cannot_judge(value):
    weighting = make("gradnorm")
    for _ in range(3):
        losses, shared = two_losses(tag=value)
        weighting(losses, shared)
    assert weighting.weights() == {"tag": 1.0, "mix": 1.0}


def test_gradnorm_is_not_moved_by_a_loss_that_does_not_reach_the_shared_parameters():
    weighting = make("gradnorm")
    elsewhere = nn.Parameter(torch.ones(1))
    for _ in range(3):
        losses, shared = two_losses()
        weighting({"tag": elsewhere.sum(), "mix": losses["mix"]}, shared)
        weighting({"tag": torch.tensor(3.0), "mix": losses["mix"]}, shared)
    assert weighting.weights() == {"tag": 1.0, "mix": 1.0}
    with pytest.raises(ValueError, match="shared"):
        weighting(two_losses()[0], [])


def test_dwa_by_hand():
    weighting = make("dwa")
    weighting.end_epoch({"tag": 2.0, "mix": 1.0})
    assert weighting.weights() == pytest.approx({"tag": 1.0, "mix": 1.0})
    weighting.end_epoch({"tag": 1.0, "mix": 1.0})
    tag, mix = math.exp(0.5 / 2), math.exp(1.0 / 2)
    assert weighting.weights() == pytest.approx({"tag": 2 * tag / (tag + mix), "mix": 2 * mix / (tag + mix)})
    weighting.end_epoch({"tag": 1.0, "mix": 0.5})
    assert weighting.weights() == pytest.approx({"tag": 2 * mix / (tag + mix), "mix": 2 * tag / (tag + mix)})


def test_dwa_is_not_moved_by_means_it_cannot_use():
    weighting = make("dwa")
    for tag in (math.nan, 1.0, math.inf, 2.0):
        weighting.end_epoch({"tag": tag, "mix": 1.0})
        assert weighting.weights() == pytest.approx({"tag": 1.0, "mix": 1.0})


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, "weighting_kind: missing"),
        (
            {"weighting_kind": "pcgrad"},
            "weighting_kind = 'pcgrad': allowed are fixed, uncertainty, gradnorm, dwa",
        ),
        ({"weighting_kind": "fixed", "w_tag": 1.0}, "w_mix: missing"),
        ({"weighting_kind": "fixed", "w_tag": -1, "w_mix": 1}, "w_tag = -1"),
        ({"weighting_kind": "fixed", "w_tag": 0, "w_mix": 0}, "w_tag = w_mix = 0: .*at least one is above 0"),
        ({"weighting_kind": "dwa", "dwa_temperature": 0}, "dwa_temperature = 0: allowed is a number above 0"),
        ({"weighting_kind": "gradnorm", "gradnorm_alpha": 11}, "gradnorm_alpha = 11"),
        ({"weighting_kind": "uncertainty", "w_tag": 1.0}, "w_tag = 1.0: .* takes no further value"),
    ],
)
def test_refuses_by_name(params, words):
    with pytest.raises(UserError, match=words) as caught:
        loss_weighting(params)
    assert "\n" not in str(caught.value)


RANK = """
import json, sys
import torch
from torch import distributed, nn
from trainables.loss_weighting import loss_weighting

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.tag, self.mix = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x):
        hidden = self.body(x).tanh()
        return self.tag(hidden), self.mix(hidden)


results = {}
for kind, values in {"gradnorm": {"gradnorm_alpha": 1.0}, "uncertainty": {}}.items():
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Model())
    weighting = loss_weighting({"weighting_kind": kind, **values})
    groups = [{"params": list(model.parameters()), "lr": 0.01}, *weighting.parameter_groups()]
    optimizer = torch.optim.SGD(groups)
    generator = torch.Generator().manual_seed(rank)  # each rank trains on examples of its own
    trace, raw = [], []
    for _ in range(8):
        tag, mix = model(torch.randn(8, 4, generator=generator))
        losses = {"tag": (10 * tag - rank).square().mean(), "mix": (mix + rank).square().mean()}
        optimizer.zero_grad()
        weighting(losses, [model.module.body.weight]).backward()
        optimizer.step()
        trace.append(weighting.weights())
        raw.append(losses["tag"].item())
    results[kind] = {"weights": trace, "model": model.module.body.weight.flatten().tolist(), "losses": raw}
distributed.destroy_process_group()
with open(out, "w") as file:
    json.dump(results, file)
"""


def test_two_ranks_beside_ddp_keep_the_same_weights(tmp_path):
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    files = [tmp_path / f"rank{rank}.json" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store"), str(file)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], errors
    first, second = (json.loads(file.read_text()) for file in files)
    for kind in ("gradnorm", "uncertainty"):
        assert first[kind]["losses"] != second[kind]["losses"]  # or agreement would prove nothing
        assert first[kind]["weights"] == second[kind]["weights"]
        assert first[kind]["model"] == second[kind]["model"]
        assert first[kind]["weights"][0] != first[kind]["weights"][-1]
