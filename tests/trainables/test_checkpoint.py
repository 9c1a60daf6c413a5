"""Checkpoints survive what happens to files, and hold everything an optimizer knows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainables.checkpoint import load_checkpoint, pack_optimizer, save_checkpoint, unpack_optimizer

ROOT = Path(__file__).resolve().parents[2]


def three(folder):
    for epoch in (1, 2, 3):
        save_checkpoint(
            folder, epoch, {"w": torch.full((40,), float(epoch))}, {"record": {"official": 60.5 + epoch}}
        )


def epoch_of(found):
    tensors, state = found
    assert tensors["w"].tolist() == [state["epoch"]] * 40
    assert state["record"] == {"official": 60.5 + state["epoch"]}
    return state["epoch"]


def test_the_newest_is_loaded_and_two_are_kept(tmp_path):
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "none") is None
    three(tmp_path)
    assert epoch_of(load_checkpoint(tmp_path)) == 3
    names = [f"epoch-000{e}.{kind}" for e in (2, 3) for kind in ("json", "safetensors")]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 2))] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["json", "safetensors"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(b""),
        lambda path: flip(path, 0.9),
        lambda path: flip(path, 0.5),
        lambda path: flip(path, 0.0),
        lambda path: path.write_text("[1]"),
    ],
    ids=["truncated", "empty", "byte near the end", "byte in the middle", "first byte", "something else"],
)
def test_a_damaged_one_is_passed_over(tmp_path, kind, damage):
    three(tmp_path)
    damage(tmp_path / f"epoch-0003.{kind}")
    with pytest.warns(UserWarning, match=r"epoch-0003.json: damaged checkpoint passed over"):
        assert epoch_of(load_checkpoint(tmp_path)) == 2


def test_tensors_alone_are_no_checkpoint(tmp_path):
    three(tmp_path)
    (tmp_path / "epoch-0003.json").unlink()
    assert epoch_of(load_checkpoint(tmp_path)) == 2
    (tmp_path / "epoch-0002.safetensors").unlink()
    with pytest.warns(UserWarning, match="passed over"):
        assert load_checkpoint(tmp_path) is None


def test_leftovers_of_a_killed_process_go(tmp_path):
    for name in ("epoch-0001.safetensors.123.partial", "epoch-0001.json.9.partial"):
        (tmp_path / name).write_text("half")
    three(tmp_path)
    assert not list(tmp_path.glob("*.partial"))


def test_nan_in_the_state_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(tmp_path, 1, {}, {"record": float("nan")})
    assert list(tmp_path.iterdir()) == []


FULL = """
import resource, sys
from pathlib import Path
import torch
from trainables.checkpoint import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    save_checkpoint(Path(sys.argv[1]), 4, {"w": torch.ones(1 << 16)}, {})
except OSError as error:
    print(error)
"""


def test_no_space_leaves_the_earlier_ones(tmp_path):
    three(tmp_path)
    before = sorted(tmp_path.iterdir())
    said = subprocess.run([sys.executable, "-c", FULL, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert "cannot hold epoch-0004" in said.stdout, said.stderr
    assert sorted(tmp_path.iterdir()) == before
    assert epoch_of(load_checkpoint(tmp_path)) == 3


def test_writing_takes_no_copy_of_the_tensors(tmp_path):
    """90 M parameters with moments and mean are 1.4 GB."""
    code = f"""if True:
        import resource, torch
        from pathlib import Path
        from trainables.checkpoint import save_checkpoint
        save_checkpoint(Path({str(tmp_path)!r}), 1, {{"w": torch.ones(10)}}, {{}})  # what the first call imports
        tensors = {{str(i): torch.ones(5_000_000) for i in range(10)}}
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        save_checkpoint(Path({str(tmp_path)!r}), 2, tensors, {{}})
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)
    """
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert float(said.stdout) < 100, said.stderr  # MB; the tensors are 200


def test_state_is_plain_json(tmp_path):
    three(tmp_path)
    assert json.loads((tmp_path / "epoch-0003.json").read_text())["record"]["official"] == 63.5


def test_an_optimizer_goes_on_from_its_tensors(tmp_path):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.01}]
        return model, torch.optim.AdamW(groups)

    def step(model, optimizer, seed):
        optimizer.zero_grad()
        model(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    step(model, optimizer, 1)
    save_checkpoint(tmp_path, 1, {**model.state_dict(), **pack_optimizer(optimizer)}, {})
    tensors, _ = load_checkpoint(tmp_path)
    other, fresh = make()
    other.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("optimizer.")})
    unpack_optimizer(fresh, tensors)
    assert [g["lr"] for g in fresh.param_groups] == [0.1, 0.01]
    for both in ((model, optimizer), (other, fresh)):
        step(*both, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
