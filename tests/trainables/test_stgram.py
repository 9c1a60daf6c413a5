"""STgram-MFN: the published shapes, a spectrum known from theory, and normalisation that ranks share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from trainables.errors import UserError
from trainables.stgram import HOP, NUM_MELS, BatchNorm, MobileFaceNet, Sgram, Stgram, Tgram

ROOT = Path(__file__).resolve().parents[2]
RATE_HZ = 16_000


def stgram(**changes):
    torch.manual_seed(0)
    return Stgram(**{"num_samples": 8000, "sample_rate_hz": RATE_HZ, "channels": 8, **changes})


def test_ten_seconds_have_the_published_shapes():
    with torch.device("meta"):
        network, gram = MobileFaceNet(313, 64, "batch"), torch.empty(2, 2, 128, 313)
        tgram = Tgram(313)
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert (512, 1, 8, 20) in shapes.values()  # the linear, depthwise pooling of the whole map
    assert network(gram).shape == (2, 128)
    assert tgram(torch.empty(2, 160_000, device="meta")).shape == (2, 128, 313)
    assert [tuple(p.shape) for p in tgram.parameters()] == [
        (128, 1, 1024),
        *[(313,), (313,), (128, 128, 3)] * 3,
    ]
    strides = [m.stride[0] for m in network.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert np.prod(strides) * network.layers[0].stride[0] == 16
    assert len(strides) == 1 + (5 + 1 + 6 + 1 + 2) + 1


def test_sgram_is_the_power_of_a_tone_in_decibel_at_its_frequency():
    time_s = torch.arange(16_000) / RATE_HZ
    wave_BT = torch.stack([a * torch.sin(2 * torch.pi * 1000 * time_s) for a in (1.0, 0.1)])
    gram_BMF = Sgram(RATE_HZ)(wave_BT)
    assert gram_BMF.shape == (2, NUM_MELS, 16_000 // HOP + 1)
    # HTK's mel scale, 128 bands between 0 and 8 kHz
    mel = 2595 * np.log10(1 + np.array([1000, 8000]) / 700)
    assert abs(int(gram_BMF[0, :, 16].argmax()) - (mel[0] / mel[1] * 129 - 1)) <= 1
    loud = gram_BMF[0] > gram_BMF[0].max() - 20
    torch.testing.assert_close((gram_BMF[0] - gram_BMF[1])[loud], torch.full_like(gram_BMF[0][loud], 20.0))


def test_it_is_read_like_an_encoder():
    network, wave_BT = stgram().eval(), torch.randn(3, 8000)
    assert network.features(wave_BT) is wave_BT
    token_BPND = network.tokens(wave_BT)
    assert token_BPND.shape == (3, 1, network.num_bands, network.embedding_size)
    assert network.pool(token_BPND).shape == (3, 128)
    assert not any(name.startswith("sgram") for name in network.state_dict())  # nothing there is learned


@pytest.mark.parametrize("branch", ["sgram", "tgram"])
def test_both_branches_are_heard(branch):
    network, wave_BT = stgram().train(), torch.randn(4, 8000)
    network.tokens(wave_BT).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    first = network.network.layers[0].weight.grad
    assert first[:, ["sgram", "tgram"].index(branch)].abs().max() > 0


def test_half_precision_leaves_the_spectrum_alone():
    wave_BT = torch.randn(2, 8000)
    whole = Sgram(RATE_HZ)(wave_BT)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Sgram(RATE_HZ)(wave_BT), whole)
        assert stgram().eval().tokens(wave_BT).isfinite().all()


def test_a_clip_of_half_a_window_is_refused():
    with pytest.raises(UserError, match=r"clip_s = 0\.032: STgram needs more than 0\.032 seconds"):
        stgram(num_samples=512)
    assert stgram(num_samples=513).eval().tokens(torch.randn(2, 513)).isfinite().all()


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 5, 3)])
def test_batch_norm_is_the_usual_one_in_one_process(shape):
    mine, usual = BatchNorm(8), (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(8)
    for _ in range(3):
        x = torch.randn(shape) * 3 + 1
        torch.testing.assert_close(mine(x), usual(x))
    torch.testing.assert_close(mine.running_var, usual.running_var)
    torch.testing.assert_close(mine.eval()(x), usual.eval()(x))


RANK = """
import os, sys, torch
from torch import distributed, nn
from trainables.stgram import MobileFaceNet, Tgram

rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.tgram, self.network = Tgram(5), MobileFaceNet(5, 8, "batch")

    def forward(self, wave):
        gram = self.tgram(wave)
        return self.network(torch.stack([gram, gram.flip(1)], 1))

torch.manual_seed(0)
network = Network().double()
model = nn.parallel.DistributedDataParallel(network) if world > 1 else network
wave, wanted = torch.randn(8, 2048).double()[rank::world], torch.randn(8, 128).double()[rank::world]
for _ in range(2):
    network.zero_grad()
    (model(wave) * wanted).sum(1).square().mean().backward()
if rank == 0:
    found = {k: p.grad for k, p in network.named_parameters()}
    torch.save(found | dict(network.named_buffers()), out)
distributed.barrier()
os._exit(0)
"""


def test_two_ranks_normalise_and_learn_as_one(tmp_path):
    """In double precision, in which nothing hides: gradients and running statistics."""
    found = []
    for world in (1, 2):
        files = (tmp_path / f"store{world}", tmp_path / f"{world}.pt")
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(rank), str(world), *map(str, files)],
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0] * world, errors
        found.append(torch.load(files[1], weights_only=True))
    one, two = found
    assert one.keys() == two.keys()
    assert any(value.abs().max() > 1e-6 for value in one.values())
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
