"""The shared array of clips: rendered once, whole or not at all, and seen only by who may see it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from trainables.data import audio
from trainables.data.corpus import MachineRoles, normalise, open_corpus, open_source
from trainables.files import exclusive
from trainables.settings import CorpusConfig, to_dict

ROOT = Path(__file__).resolve().parents[3]
# opens the corpus of argv[1] in the folder argv[2], says "ready" first, and counts the clips it rendered itself
OPEN = """
import json, os, signal, sys
from pathlib import Path
from trainables.data.corpus import open_corpus, open_source
from trainables.settings import CorpusConfig, build
config, cache, die_at = build(CorpusConfig, json.loads(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])
open_source(config)
print("ready", flush=True)
sys.stdin.readline()
rendered = []
def progress(done, total):
    rendered.append(done)
    if done == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
corpus = open_corpus(config, cache, progress)
print(json.dumps([len(rendered), corpus.digest, float(abs(corpus.waves_NT).sum())]), flush=True)
"""


def start(config: CorpusConfig, cache: Path, die_at: int = -1) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OPEN, json.dumps(to_dict(config)), str(cache), str(die_at)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def arrays(cache: Path) -> list[Path]:
    return sorted(cache.glob("corpus-*.npy"))


def test_clips_have_unit_level_and_no_offset(plant, tmp_path: Path) -> None:
    corpus = open_corpus(plant.config(), tmp_path)
    assert corpus.waves_NT.shape == (18, 4000)
    assert corpus.waves_NT.dtype == np.float32
    np.testing.assert_allclose(np.square(corpus.waves_NT).mean(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(corpus.waves_NT.mean(axis=1), 0, atol=1e-6)
    with pytest.raises(ValueError, match="read-only"):
        corpus.waves_NT[0, 0] = 0
    described = json.loads(arrays(tmp_path)[0].with_suffix(".json").read_text())
    assert [d["origin"] for d in described] == [c.origin for c in corpus.clips]


def test_select_and_visible_keep_the_order(plant, tmp_path: Path) -> None:
    corpus = open_corpus(plant.config(), tmp_path)
    bank = corpus.select(role="machine", split="train")
    assert [corpus.clips[i].recording for i in bank] == [f"pump/bank{i}" for i in range(4)]
    both = corpus.select(role="machine", label=("normal", "anomaly"), split="test")
    assert len(both) == 8
    halves = [corpus.visible(both, split) for split in ("search", "confirm")]
    assert sorted(np.concatenate(halves)) == list(both)
    assert [len(half) for half in halves] == [4, 4]
    assert corpus.visible(corpus.select(role="noise"), "confirm").tolist() == list(range(12, 18))
    assert corpus.select(name="nobody").dtype == int


def test_progress_is_told(plant, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    open_corpus(plant.config(), tmp_path, lambda done, total: seen.append((done, total)))
    assert seen == [(i, 18) for i in range(1, 19)]


def test_the_second_opening_reads_no_audio(plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = plant.config()
    first = open_corpus(config, tmp_path)

    def refuse(*args: object, **more: object) -> None:
        raise AssertionError("audio was read")

    monkeypatch.setattr(soundfile, "SoundFile", refuse)
    monkeypatch.setattr(audio.hashlib, "file_digest", refuse)
    second = open_corpus(config, tmp_path, refuse)
    assert (second.clips, second.digest, second.roles) == (first.clips, first.digest, first.roles)
    np.testing.assert_array_equal(first.waves_NT, second.waves_NT)


def test_a_changed_file_is_rendered_again(plant, tmp_path: Path) -> None:
    first = open_corpus(plant.config(), tmp_path)
    kept_NT = np.array(first.waves_NT)
    plant.sound("pump/bank0.wav", 0.6)
    second = open_corpus(plant.config(), tmp_path)
    assert second.digest != first.digest
    np.testing.assert_array_equal(kept_NT, first.waves_NT)
    np.testing.assert_array_equal(kept_NT[1:], second.waves_NT[1:])


def test_the_digest_tells_roles_apart_and_the_array_is_shared(plant, tmp_path: Path) -> None:
    corpora = [open_corpus(plant.config(seed=seed), tmp_path) for seed in range(4)]
    assert len({c.digest for c in corpora}) == len({c.roles for c in corpora}) > 1
    assert len(arrays(tmp_path)) == 1
    assert open_corpus(plant.config(sample_rate_hz=4000), tmp_path).digest not in {c.digest for c in corpora}
    assert len(arrays(tmp_path)) == 2


def damage_truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damage_longer_than_it_says(path: Path) -> None:
    np.save(path, np.load(path)[:-1])


def damage_emptied(path: Path) -> None:
    path.write_bytes(b"")


def damage_other_content(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(500))


def damage_header(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:20] + b"((((" + content[24:])


def damage_zeroed(path: Path) -> None:
    np.save(path, np.zeros_like(np.load(path)))


def damage_nan(path: Path) -> None:
    np.save(path, np.full_like(np.load(path), np.nan))


def damage_other_type(path: Path) -> None:
    np.save(path, np.load(path).astype(np.float64))


@pytest.mark.parametrize("damage", [v for k, v in sorted(globals().items()) if k.startswith("damage_")])
def test_a_damaged_array_is_rendered_again(plant, tmp_path: Path, damage) -> None:
    config = plant.config()
    whole_NT = np.array(open_corpus(config, tmp_path).waves_NT)
    damage(arrays(tmp_path)[0])
    rendered: list[int] = []
    again = open_corpus(config, tmp_path, lambda done, total: rendered.append(done))
    assert len(rendered) == len(whole_NT)
    np.testing.assert_array_equal(again.waves_NT, whole_NT)


def test_two_processes_render_once(plant, tmp_path: Path) -> None:
    config = plant.config()
    open_corpus(config, tmp_path / "name")
    path = tmp_path / "cache" / arrays(tmp_path / "name")[0].name
    processes = [start(config, tmp_path / "cache") for _ in range(2)]
    with exclusive(path):  # let go only when both are at the door
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
    found = sorted(json.loads(process.communicate()[0]) for process in processes)
    assert [rendered for rendered, _, _ in found] == [0, 18]
    assert found[0][1:] == found[1][1:]
    assert [process.returncode for process in processes] == [0, 0]
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_process_killed_while_writing_leaves_no_corpus(plant, tmp_path: Path) -> None:
    config = plant.config()
    process = start(config, tmp_path, die_at=7)
    process.communicate("go\n")
    assert process.returncode == -signal.SIGKILL
    assert arrays(tmp_path) == []
    assert len(list(tmp_path.glob("*.partial"))) == 1
    assert len(open_corpus(config, tmp_path).waves_NT) == 18
    assert not list(tmp_path.glob("*.partial"))


def test_a_failure_while_rendering_leaves_nothing_behind(plant, tmp_path: Path, refusal) -> None:
    wave_T = np.full(4000, 0.1)
    wave_T[77] = np.nan
    soundfile.write(plant.folder / "pump/good2.wav", wave_T, 8000, subtype="FLOAT")
    with refusal("pump/good2.wav [0-0.5 s]", "NaN or infinite"):
        open_corpus(plant.config(), tmp_path)
    assert not list(tmp_path.glob("corpus-*.npy*.partial")) + arrays(tmp_path)


def test_silence_is_refused(plant, tmp_path: Path, refusal) -> None:
    soundfile.write(plant.folder / "hall/b.wav", np.full(4000, 0.25), 8000)  # constant: nothing but offset
    with refusal("hall/b.wav [0-0.5 s]: silent"):
        open_corpus(plant.config(), tmp_path)


def test_a_full_disk_is_an_error_and_not_a_crash(plant, tmp_path: Path, refusal) -> None:
    config = plant.config()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with refusal(
            str(tmp_path), "cannot hold the corpus of 0.3 MB", "free space or choose another --storage"
        ):
            open_corpus(config, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("corpus-*.npy*.partial")) + arrays(tmp_path)
    assert len(open_corpus(config, tmp_path).waves_NT) == 18


def test_settings_that_cannot_be_used(refusal) -> None:
    with refusal("corpus.kind = 'tape'", "factory, stems"):
        open_source(CorpusConfig(kind="tape"))
    for clip_s in (0.0, -1.0, float("inf"), float("nan")):
        with refusal("corpus.clip_s = ", "0.1 to 600 seconds"):
            open_source(CorpusConfig(clip_s=clip_s))
    for rate in (0, -8000, 10**9):
        with refusal(f"corpus.sample_rate_hz = {rate}", "1000 to 192000"):
            open_source(CorpusConfig(sample_rate_hz=rate))


def test_normalise_keeps_the_shape_of_a_wave() -> None:
    wave_T = np.array([1.0, 3.0, 1.0, 3.0], np.float32)
    np.testing.assert_allclose(normalise(wave_T, "x", 4), [-1, 1, -1, 1])
    np.testing.assert_allclose(normalise(wave_T * 1e-4, "x", 4), [-1, 1, -1, 1], rtol=1e-4)
    np.testing.assert_allclose(normalise(wave_T * 1e30, "x", 4), [-1, 1, -1, 1], rtol=1e-4)


def test_normalise_refuses_another_length(refusal) -> None:
    with refusal("x.wav", "3", "4 are needed", "corpus.clip_s"):
        normalise(np.ones(3, np.float32), "x.wav", 4)


FACTORY = CorpusConfig(clips_per_machine=8, clip_s=0.2, seed=5)


def parts_in(cache: Path) -> list[str]:
    return [path.stem.rpartition("-")[2] for path in arrays(cache)]


def test_parts_are_rendered_apart_and_give_the_same_clips_as_one_by_one(tmp_path: Path) -> None:
    source = open_source(FACTORY)
    told: list[tuple[int, int]] = []
    search = open_corpus(
        FACTORY, tmp_path, lambda *done: told.append(done), split="search", now=("train", "search")
    )
    assert parts_in(tmp_path) == ["search", "train"]
    count = sum(part != "confirm" for part in source.parts)
    assert told == [(i, count) for i in range(1, count + 1)]
    open_corpus(FACTORY, tmp_path, lambda *done: told.append(done), now=("confirm",))
    late = len(source.clips) - count
    assert told[count:] == [(i, late) for i in range(1, late + 1)]
    whole = open_corpus(FACTORY, tmp_path, pytest.fail)
    assert (whole.digest, whole.clips, whole.roles) == (search.digest, search.clips, search.roles)
    assert whole.waves_NT.shape == (len(source.clips), 3200)
    everything_NT = np.array(whole.waves_NT)
    for index in (*range(0, len(source.clips), 41), len(source.clips) - 1):
        wave_T = normalise(source.render(index), "x", 3200)
        np.testing.assert_array_equal(wave_T, everything_NT[index])
        np.testing.assert_array_equal(wave_T, whole.waves_NT[index])
    mixed = np.random.default_rng(0).permutation(len(source.clips))
    np.testing.assert_array_equal(whole.waves_NT[mixed], everything_NT[mixed])


def test_a_corpus_for_the_search_cannot_read_what_is_held_out(tmp_path: Path) -> None:
    open_corpus(FACTORY, tmp_path)
    corpus = open_corpus(FACTORY, tmp_path, split="search")
    seen = corpus.visible(np.arange(len(corpus.clips)), "search")
    held = np.setdiff1d(np.arange(len(corpus.clips)), seen)
    assert {corpus.clips[i].name for i in held} == {*corpus.roles.confirm}
    assert len(corpus.waves_NT[seen]) == len(seen)
    for index in (held[0], held[[3, 4]], np.append(seen[:3], held[-1])):
        with pytest.raises(PermissionError, match="kept for the confirmation"):
            corpus.waves_NT[index]
    assert len(open_corpus(FACTORY, tmp_path).waves_NT[held]) == len(held)


def test_a_part_is_rendered_when_a_clip_of_it_is_read(tmp_path: Path) -> None:
    corpus = open_corpus(FACTORY, tmp_path, now=())
    assert parts_in(tmp_path) == []
    bank = corpus.select(role="machine", name=corpus.roles.confirm[0], split="train")
    assert corpus.waves_NT[bank].shape == (len(bank), 3200)
    assert parts_in(tmp_path) == ["confirm"]
    damage_truncated(arrays(tmp_path)[0])
    again = open_corpus(FACTORY, tmp_path, now=())
    np.testing.assert_array_equal(again.waves_NT[bank], corpus.waves_NT[bank])


def test_machines_that_confirm_are_not_seen_by_the_search(plant, tmp_path: Path) -> None:
    for name in ("fan", "saw", "mill"):
        for recording, label, split in (
            ("bank", "normal", "train"),
            ("good", "normal", "test"),
            ("bad", "anomaly", ""),
        ):
            plant.machine(name, recording, label=label, split=split)
    corpus = open_corpus(plant.config(), tmp_path)
    everything = corpus.select(role="machine")
    seen = {
        split: {corpus.clips[i].name for i in corpus.visible(everything, split)}
        for split in ("search", "confirm")
    }
    assert seen["search"] == {*corpus.roles.train} == {*corpus.roles.search}
    assert seen["confirm"] == {*corpus.roles.confirm}
    assert not seen["search"] & seen["confirm"]
    assert isinstance(corpus.roles, MachineRoles)
