"""Shared files are made once, found again, and made anew when they are damaged."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trainables import cache
from trainables.data.corpus import open_corpus
from trainables.encoders.encoder import load_encoder
from trainables.encoders.tiny import load_tiny, save_tiny
from trainables.errors import UserError
from trainables.settings import CorpusConfig, EncoderConfig, ScoringConfig, to_dict

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trial(small_trial):
    return small_trial("retain", params={"align_level": "pooled"})


@pytest.fixture(scope="module")
def filled(trial, cache_dir, tmp_path_factory):
    """A cache with the files of this trial and of no other."""
    open_corpus(trial.corpus, cache_dir)
    folder = tmp_path_factory.mktemp("filled")
    for file in cache_dir.glob("corpus-*"):
        shutil.copy(file, folder)
    cache.prepare(trial, folder, CPU).make()
    return folder


@pytest.fixture
def own_cache(filled, tmp_path, monkeypatch):
    """A cache of the test's own, filled, and no memory of an earlier one."""
    shutil.copytree(filled, tmp_path / "cache")
    monkeypatch.setattr(cache, "_kept", {})
    return tmp_path / "cache"


def arrays(folder, name):
    return sorted(folder.glob(f"{name}-*.npy"))


def made(monkeypatch):
    """Which files are computed from now on."""
    names, save = [], cache._save
    monkeypatch.setattr(
        cache, "_save", lambda path, *rest: names.append(path.name.split("-")[0]) or save(path, *rest)
    )
    return names


def test_what_materials_hold(trial, cache_dir):
    materials = cache.prepare(trial, cache_dir, CPU)
    corpus, plan, encoder = materials.corpus, materials.plan, load_encoder(trial.encoder)
    train = np.concatenate([materials.train_machine, materials.train_noise])
    assert {corpus.clips[i].label for i in materials.train_machine} == {"normal"}
    assert {corpus.clips[i].split for i in train} == {"train"}
    assert sorted(materials.target_row[train]) == list(range(len(materials.target_NE)))
    assert (materials.target_row >= 0).sum() == len(train)
    clip = int(materials.train_noise[3])
    with torch.no_grad():
        tokens = encoder.tokens(encoder.features(torch.from_numpy(corpus.waves_NT[[clip]])))
    row, emb_E = materials.target_row[clip], encoder.pool(tokens)[0]
    np.testing.assert_allclose(materials.target_NE[row], emb_E, rtol=1e-4, atol=1e-5)
    assert materials.target_std_E.shape == (encoder.embedding_size,)
    assert materials.target_NPBD is None
    assert materials.target_std_D is None
    aligned = cache.prepare(replace(trial, params={**trial.params, "align_level": "tokens"}), cache_dir, CPU)
    np.testing.assert_allclose(aligned.target_NPBD[row], tokens[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(aligned.target_NE, materials.target_NE)
    assert aligned.target_std_D.shape == (encoder.width,)
    assert materials.feature_RFM.shape[0] == len(plan.clip_R)
    rows = np.array([0, 17])
    features = cache.mixture_features(corpus, plan, rows, encoder, CPU)
    np.testing.assert_allclose(materials.feature_RFM[rows], features, rtol=1e-4, atol=1e-5)
    assert set(materials.reference) == {"teacher", "oracle"}


def test_a_process_keeps_few_and_finds_them_again(trial, cache_dir, monkeypatch):
    monkeypatch.setattr(cache, "_kept", {})
    first = cache.prepare(trial, cache_dir, CPU)
    assert cache.prepare(replace(trial, seed=8, params={}), cache_dir, CPU) is first
    monkeypatch.setattr(cache, "_prepare", lambda *_: object())
    for size in range(10):
        cache.prepare(replace(trial, scoring=ScoringConfig(batch_size=10 + size)), cache_dir, CPU)
    assert len(cache._kept) == cache.NUM_KEPT
    assert cache.prepare(trial, cache_dir, CPU) is not first


def test_seeds_of_confirm_have_mixtures_of_their_own(trial):
    search = {cache.scoring_seed(replace(trial, seed=s)) for s in range(3)}
    confirm = [cache.scoring_seed(replace(trial, seed=s, split="confirm")) for s in range(3)]
    assert search == {trial.corpus.seed}
    assert confirm == [0, 1, 2]


def test_nothing_is_computed_twice(trial, own_cache, monkeypatch):
    names = made(monkeypatch)
    cache.prepare(trial, own_cache, CPU).make()
    assert names == []


def test_nothing_is_computed_before_it_is_wanted(trial, own_cache, monkeypatch):
    for name in ("targets", "features", "scores"):
        arrays(own_cache, name)[0].unlink()
    names = made(monkeypatch)
    materials = cache.prepare(trial, own_cache, CPU)
    assert names == []
    materials.make("tokens", "targets")  # what a trial trains on
    assert names == ["targets"]
    assert set(materials.reference) == {"teacher", "oracle"}
    assert names == ["targets", "features", "scores"]  # each once, and one from the other
    materials.make()
    assert len(names) == 3


def test_targets_are_the_same_from_tokens_that_are_kept(trial, own_cache, monkeypatch):
    (path,) = arrays(own_cache, "targets")
    before = path.read_bytes()
    path.unlink()
    aligned = cache.prepare(replace(trial, params={**trial.params, "align_level": "tokens"}), own_cache, CPU)
    monkeypatch.setattr(cache._Maker, "_embedded", pytest.fail)
    aligned.make("targets")
    assert path.read_bytes() == before


def test_a_search_trial_cannot_read_a_machine_that_confirms(trial, own_cache):
    corpus = cache.prepare(trial, own_cache, CPU).corpus
    held = corpus.select(role="machine", name=corpus.roles.confirm)
    with pytest.raises(PermissionError):
        corpus.waves_NT[held[:1]]
    confirm = cache.prepare(replace(trial, split="confirm"), own_cache, CPU).corpus
    assert len(confirm.waves_NT[held[:1]]) == 1


def flip(path, at):
    """One bit of a byte: ``at`` is its place as a share of the file."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def test_what_trials_share_is_mapped_and_not_read(trial, own_cache):
    materials = cache.prepare(trial, own_cache, CPU)
    materials.make()
    assert set(materials._made) == {"targets", "features", "scores"}
    for array in (*materials._made.values(), materials.target_NE, materials.feature_RFM):
        assert isinstance(array, np.memmap)
    for name in ("targets", "features", "scores"):
        assert arrays(own_cache, name)[0].with_suffix(".crc").is_file()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path, 0.5),
        lambda path: flip(path, 0.0),
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x55"),
        lambda path: path.write_bytes(b""),
        lambda path: path.with_suffix(".crc").unlink(),
        lambda path: path.with_suffix(".crc").write_bytes(b"\xff\xfe"),
    ],
    ids=[
        "a bit in the middle",
        "a bit of the header",
        "missing",
        "truncated",
        "last byte",
        "empty",
        "no checksum",
        "damaged checksum",
    ],
)
def test_damaged_files_are_made_again(trial, own_cache, monkeypatch, damage):
    (path,) = arrays(own_cache, "targets")
    before = path.read_bytes()
    path.with_name(f"{path.name}.1.partial").write_text("left by a process that died")
    damage(path)
    names = made(monkeypatch)
    cache.prepare(trial, own_cache, CPU).make()
    assert names == ["targets"]
    assert path.read_bytes() == before
    assert not list(own_cache.glob("*.partial"))


def test_a_full_disk_is_one_line(trial, own_cache, monkeypatch):
    arrays(own_cache, "features")[0].unlink()
    replace_file = cache.os.replace

    def full(source, target):
        if Path(target).name.startswith("features") and Path(target).suffix == ".npy":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace_file(source, target)

    monkeypatch.setattr(cache.os, "replace", full)
    with pytest.raises(
        UserError, match=r"cannot hold features-\w+.npy \(No space left on device\); free space"
    ) as caught:
        cache.prepare(trial, own_cache, CPU).make()
    assert "\n" not in str(caught.value)
    assert not list(own_cache.glob("*.partial"))
    assert not arrays(own_cache, "features")


PREPARE = """
import json, sys
from pathlib import Path
import torch
from trainables import cache
from trainables.settings import TrialConfig, build
names, save = [], cache._save
cache._save = lambda path, *rest: names.append(path.name.split("-")[0]) or save(path, *rest)
print("ready", flush=True)
sys.stdin.readline()
materials = cache.prepare(build(TrialConfig, json.loads(sys.argv[1])), Path(sys.argv[2]), torch.device("cpu"))
materials.make()
print(json.dumps([names, float(materials.target_NE.sum(dtype="float64"))]), flush=True)
"""


def test_two_processes_share_the_work(trial, own_cache):
    for name in ("targets", "features", "scores"):
        arrays(own_cache, name)[0].unlink()
    command = [sys.executable, "-c", PREPARE, json.dumps(to_dict(trial)), str(own_cache)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        assert [p.stdout.readline() for p in processes] == ["ready\n"] * 2
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        (one, sum_one), (two, sum_two) = (json.loads(p.communicate(timeout=120)[0]) for p in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert sorted(one + two) == ["features", "scores", "targets"]
    assert sum_one == sum_two


WRITE = """
import sys, time
from pathlib import Path
import numpy as np
from trainables import cache
path, pace_s = Path(sys.argv[1]), float(sys.argv[2])
def pieces():
    for number in range(20):
        print(f"piece {number}", flush=True)
        time.sleep(pace_s)
        yield np.full((500, 8), number, np.float32)
print("ready", flush=True)
sys.stdin.readline()
made = cache.make_all({path: lambda: (10_000, pieces())})[path]
print(f"{type(made).__name__} {made.shape} {made.sum():.0f}", flush=True)
"""


@pytest.fixture
def writer(tmp_path):
    """Starts processes that ask for one entry of 10,000 rows; ``start(pace_s)`` gives one that is ready."""
    started = []

    def start(pace_s):
        command = [sys.executable, "-c", WRITE, str(tmp_path / "shared.npy"), str(pace_s)]
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def go(process):
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()


WHOLE = f"memmap (10000, 8) {500 * 8 * sum(range(20))}"


def test_of_two_writers_at_once_one_computes_and_both_map_the_whole(writer, tmp_path):
    both = [writer(0.01) for _ in range(2)]
    for process in both:
        go(process)
    said = [process.communicate(timeout=60)[0].splitlines() for process in both]
    assert [lines[-1] for lines in said] == [WHOLE] * 2
    assert sorted(len(lines) for lines in said) == [1, 21], "one process made every piece, the other none"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shared.crc", "shared.npy", "shared.npy.lock"]


def test_what_a_killed_writer_leaves_is_not_served(writer, tmp_path):
    first, second = writer(0.2), writer(0.0)
    go(first)
    while first.stdout.readline() != "piece 3\n":
        pass
    go(second)  # waits for the first one
    assert not (tmp_path / "shared.npy").exists()
    first.kill()
    said = second.communicate(timeout=60)[0].splitlines()
    assert len(said) == 21
    assert said[-1] == WHOLE
    assert not list(tmp_path.glob("*.partial"))


def test_features_beyond_the_limit_are_not_kept(trial, own_cache):
    arrays(own_cache, "features")[0].unlink()
    few = replace(trial, scoring=ScoringConfig(feature_cache_gb=0.0))
    assert cache.prepare(few, own_cache, CPU).feature_RFM is None
    assert not arrays(own_cache, "features")
    assert cache.prepare(trial, own_cache, CPU).feature_RFM is not None  # a raised limit takes effect


def test_another_checkpoint_has_features_and_targets_of_its_own(trial, own_cache, tmp_path, monkeypatch):
    """Two sets of weights of one encoder differ in how they standardise their features."""
    other = load_tiny(None)
    other.shape = replace(other.shape, feature_mean=other.shape.feature_mean + 1)
    save_tiny(other, tmp_path / "other.safetensors", {})
    own = replace(trial, encoder=EncoderConfig(checkpoint=str(tmp_path / "other.safetensors")))
    names = made(monkeypatch)
    theirs = cache.prepare(own, own_cache, CPU)
    theirs.make()
    assert sorted(names) == ["features", "scores", "targets"]
    ours = cache.prepare(trial, own_cache, CPU)
    shift = 1 / other.shape.feature_std
    np.testing.assert_allclose(theirs.feature_RFM[0], ours.feature_RFM[0] - shift, atol=1e-4)


@pytest.mark.parametrize(
    ("corpus", "words"),
    [
        (
            {"sample_rate_hz": 8000},
            "corpus.sample_rate_hz = 8000: the encoder tiny hears 16000 Hz only; set it to 16000",
        ),
        ({"clip_s": 0.36}, "corpus.clip_s = 0.36: the encoder tiny needs at least 0.364 seconds"),
    ],
)
def test_clips_the_encoder_cannot_hear_are_refused_before_rendering(trial, tmp_path, corpus, words):
    other = replace(trial, corpus=replace(CorpusConfig(clips_per_machine=8), **corpus))
    with pytest.raises(UserError) as caught:
        cache.prepare(other, tmp_path, CPU)
    assert str(caught.value).startswith(words)
    assert list(tmp_path.iterdir()) == []


def test_large_arrays_stay_in_their_files(trial, cache_dir):
    """Of BEATs and ten seconds, the tokens of a few thousand clips are more than a machine's memory."""
    tokens = replace(trial, params={**trial.params, "align_level": "tokens"})
    materials = cache.prepare(tokens, cache_dir, CPU)
    for array in (materials.target_NE, materials.target_NPBD, materials.feature_RFM):
        assert isinstance(array, np.memmap)
        assert array.mode == "c"  # what is written goes nowhere
    assert materials.target_NPBD.nbytes == materials.target_NE.nbytes * materials.target_NPBD.shape[1]


def test_long_clips_are_embedded_few_at_a_time(trial):
    def at_once(clip_s, batch_size):
        scoring, corpus = ScoringConfig(batch_size=batch_size), CorpusConfig(clip_s=clip_s)
        return cache.clips_at_once(replace(trial, scoring=scoring, corpus=corpus))

    assert at_once(2.0, 256) == 256
    assert at_once(10.0, 256) == 60
    assert at_once(10.0, 7) == 7
    assert at_once(1000.0, 7) == 1
