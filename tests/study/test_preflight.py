"""What is refused before anything runs, in one line, and that looking leaves nothing behind."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from study import preflight as module
from study.config import StudyConfig, resolve
from study.preflight import check_corpus, check_encoder, check_folder, check_room, preflight, target_bytes
from trainables.data.corpus import Clip, Corpus, MachineRoles
from trainables.encoders.encoder import load_encoder
from trainables.encoders.tiny import Tiny, TinyShape, save_tiny
from trainables.errors import UserError
from trainables.files import content_digest
from trainables.settings import LIMITS, CorpusConfig, EncoderConfig


def refusal(check: object, *arguments: object) -> str:
    with pytest.raises(UserError) as refused:
        check(*arguments)  # type: ignore[operator]
    assert "\n" not in str(refused.value)
    return str(refused.value)


# -- the whole ------------------------------------------------------------------------------------------------


@pytest.fixture
def config() -> StudyConfig:
    return resolve(StudyConfig(preset="quick"), ["slots.cpus_per_worker=0.5", "corpus.clips_per_machine=8"])


def uri(storage: Path) -> str:
    return f"sqlite:///{storage / 'mlflow.db'}"


def test_what_passes_is_told_and_nothing_is_left_behind(config: StudyConfig, tmp_path: Path) -> None:
    storage = tmp_path / "not" / "yet"
    found = preflight(config, storage, uri(storage), dry_run=True)
    text = "\n".join(found.lines)
    for part in ("factory: ", "2 slots x 1 worker x 0.5 CPU", str(storage), "GB free", "sqlite:///"):
        assert part in text
    assert list(tmp_path.iterdir()) == []


def test_the_identity_of_the_corpus_follows_its_samples(config: StudyConfig, tmp_path: Path) -> None:
    other = dataclasses.replace(config, corpus=dataclasses.replace(config.corpus, seed=1))
    first, again, second = (
        preflight(c, tmp_path, uri(tmp_path)).corpus_identity for c in (config, config, other)
    )
    assert first == again != second


def test_real_recordings_pass_with_notes(real_recordings: Path, tmp_path: Path) -> None:
    settings = ["corpus.kind=stems", f"corpus.manifest={real_recordings / 'manifest.csv'}", "slots.count=1"]
    found = preflight(resolve(StudyConfig(), settings), tmp_path, uri(tmp_path))
    assert any("fan has no anomalies" in note for note in found.notes)


def test_values_out_of_range_are_refused_whoever_made_the_config(config: StudyConfig, tmp_path: Path) -> None:
    wrong = dataclasses.replace(config, training=dataclasses.replace(config.training, epochs=0))
    assert "training.epochs = 0" in refusal(preflight, wrong, tmp_path, uri(tmp_path))


def test_what_a_trial_would_refuse_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIMITS, "training.epochs", (1, 3))
    with pytest.raises(UserError, match=r"training\.epochs = 4: allowed are 1 to 3"):
        resolve(StudyConfig(), ["training.epochs=4"])


def test_more_than_the_machine_has_is_refused(config: StudyConfig, tmp_path: Path) -> None:
    wrong = dataclasses.replace(config, slots=dataclasses.replace(config.slots, count=9999))
    assert "this machine has" in refusal(preflight, wrong, tmp_path, uri(tmp_path))


def test_a_tracking_server_that_is_not_there_is_refused(config: StudyConfig, tmp_path: Path) -> None:
    assert "refused" in refusal(preflight, config, tmp_path, "http://127.0.0.1:1")


def test_a_missing_manifest_is_refused(tmp_path: Path) -> None:
    config = resolve(
        StudyConfig(), ["corpus.kind=stems", f"corpus.manifest={tmp_path / 'none.csv'}", "slots.count=1"]
    )
    assert "none.csv" in refusal(preflight, config, tmp_path, uri(tmp_path))


def test_cheap_checks_come_first(
    config: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for name in ("check_folder", "check", "open_source", "check_corpus", "check_room", "check_encoder"):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, _real=real, _name=name: (order.append(_name), _real(*a))[1]
        )
    preflight(config, tmp_path, uri(tmp_path))
    before = ["check_folder", "check", "open_source", "check_corpus", "check_room", "check_encoder"]
    assert order == [*before, "check_room"]  # with the targets, whose size the encoder tells


# -- the folder -----------------------------------------------------------------------------------------------


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    assert "runs is a file" in refusal(check_folder, tmp_path / "runs")
    assert "runs is a file" in refusal(check_folder, tmp_path / "runs" / "below")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert "broken link" in refusal(check_folder, tmp_path / "link")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() == 0:  # may write anywhere, except where nobody can
        yield Path("/proc/self")
        return
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o500)
    yield folder
    folder.chmod(0o700)


def test_a_folder_nobody_may_write_is_refused(read_only: Path) -> None:
    message = refusal(check_folder, read_only / "runs")
    assert "cannot write" in message
    assert "--storage" in message


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    check_room(tmp_path / "not" / "yet", 0.9e9)
    message = refusal(check_room, tmp_path / "not" / "yet", 2e9)
    assert "1.0 GB free" in message
    assert "2.0 GB" in message


# -- the corpus -----------------------------------------------------------------------------------------------


def clip(role: str, name: str, split: str, **other: str) -> Clip:
    recording = f"{name}-{split}-{other}"
    return Clip(role=role, name=name, split=split, recording=recording, origin=recording, **other)


def clips() -> list[Clip]:
    made = []
    for name in ("fan", "pump", "valve"):
        made.append(clip("machine", name, "train", label="normal", domain="source"))
        made += [
            clip("machine", name, "test", label=label, domain="source") for label in ("normal", "anomaly")
        ]
    for kind in ("stationary", "nonstationary"):
        made += [clip("noise", f"{kind} place", split, kind=kind) for split in ("train", "test")]
    return made


def corpus(kept: list[Clip], train: tuple[str, ...] = ("fan", "pump")) -> Corpus:
    roles = MachineRoles(train=train, search=("pump",), confirm=("valve",))
    return Corpus(
        clips=tuple(kept), waves_NT=np.empty((len(kept), 0)), roles=roles, sample_rate_hz=16_000, digest="x"
    )


def without(**wanted: str) -> Corpus:
    return corpus([c for c in clips() if not all(getattr(c, k) == v for k, v in wanted.items())])


def test_a_whole_corpus_passes() -> None:
    notes, num_mixtures = check_corpus(corpus(clips()), StudyConfig())
    assert notes == []
    assert num_mixtures == 2 * 3 * 2 * 3  # machines, clips, kinds of noise, bands


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"role": "machine", "split": "train"}, ["no normal machine clips to train on", "split train"]),
        ({"role": "noise", "split": "train"}, ["no noise clips to train on"]),
        ({"kind": "stationary", "split": "test"}, ["stationary", "test"]),
        ({"kind": "nonstationary", "split": "test"}, ["nonstationary", "test"]),
        ({"name": "pump", "label": "anomaly"}, ["pump", "anomaly"]),
        ({"name": "pump", "split": "test", "label": "normal"}, ["pump", "normal"]),
        ({"name": "valve", "split": "train"}, ["valve", "bank"]),
        ({"name": "valve", "label": "anomaly"}, ["valve", "anomaly"]),
    ],
)
def test_a_corpus_that_lacks_what_is_needed_is_refused(wanted: dict[str, str], words: list[str]) -> None:
    message = refusal(check_corpus, without(**wanted), StudyConfig())
    for part in words:
        assert part in message


def test_confirm_machines_do_not_matter_when_nothing_is_confirmed() -> None:
    config = resolve(StudyConfig(), ["confirm.seeds=0"])
    assert check_corpus(without(name="valve", label="anomaly"), config)[1] == 18


def test_what_makes_a_corpus_weak_is_a_note() -> None:
    notes, _ = check_corpus(without(kind="nonstationary", split="train"), StudyConfig())
    assert ["nonstationary" in note for note in notes] == [True]
    notes, _ = check_corpus(corpus(clips(), train=("pump",)), StudyConfig())
    assert ["One machine type" in note for note in notes] == [True]


# -- the encoder ----------------------------------------------------------------------------------------------


def test_the_built_in_encoder_costs_nothing_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.subprocess, "run", None)
    check_encoder(EncoderConfig(), CorpusConfig())


def test_whose_weights_they_are_is_told_and_they_are_converted_once(tmp_path: Path) -> None:
    import torch

    from trainables.encoders.beats_checkpoint import BeatsShape, random_checkpoint

    sizes = {"encoder_embed_dim": 64, "encoder_ffn_embed_dim": 64, "embed_dim": 16}
    shape = BeatsShape(encoder_layers=1, encoder_attention_heads=1, **sizes)
    torch.save(random_checkpoint(shape), tmp_path / "own.pt")
    config = EncoderConfig(name="beats", checkpoint=str(tmp_path / "own.pt"))
    said = check_encoder(config, CorpusConfig(), tmp_path / "cache")
    assert said == f"own.pt, 1 layers of 64, SHA-256 {content_digest(tmp_path / 'own.pt')}"
    assert len(list((tmp_path / "cache").glob("beats-*.safetensors"))) == 1
    study = StudyConfig(encoder=config, corpus=CorpusConfig(clip_s=2.0))
    tokens = 12 * 8 * 64  # patches of 16 frames of 10 ms, bands, width
    assert target_bytes(study) == 4 * (8 * 64 + tokens)
    assert target_bytes(dataclasses.replace(study, system="identify")) == 4 * 8 * 64
    assert target_bytes(dataclasses.replace(study, system="frozen")) == 4 * 8 * 64
    assert target_bytes(dataclasses.replace(study, system="identify,retain")) == target_bytes(study)


def test_the_built_in_encoders_targets_are_no_larger_than_counted() -> None:
    import torch

    encoder = load_encoder(EncoderConfig())
    for clip_s in (0.5, 2.0, 10.0):
        tokens = encoder.tokens(encoder.features(torch.zeros(1, round(16_000 * clip_s))))
        counted = target_bytes(StudyConfig(corpus=CorpusConfig(clip_s=clip_s)))
        assert 0.5 * counted < 4 * (tokens.numel() + encoder.embedding_size) <= counted


def test_the_built_in_encoder_hears_the_shortest_clip_that_is_allowed() -> None:
    load_encoder(EncoderConfig()).check_clips(resolve(StudyConfig(), ["corpus.clip_s=0.5"]).corpus)


def test_clips_too_short_for_an_encoder_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "slow.safetensors"
    save_tiny(Tiny(TinyShape(patch_frames=64, width=8, depth=1)), path, {})
    check_encoder(EncoderConfig(checkpoint=str(path)), CorpusConfig(clip_s=1.5))
    message = refusal(check_encoder, EncoderConfig(checkpoint=str(path)), CorpusConfig(clip_s=1.0))
    assert message == "corpus.clip_s = 1: the encoder tiny needs at least 1.324 seconds"


def test_weights_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    message = refusal(
        check_encoder, EncoderConfig(checkpoint=str(tmp_path / "none.safetensors")), CorpusConfig()
    )
    assert "no such file" in message


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"not weights at all")
    assert str(path) in refusal(check_encoder, EncoderConfig(checkpoint=str(path)), CorpusConfig())


def test_a_layer_that_the_encoder_does_not_have_is_refused(root: Path) -> None:
    if not list((root / "trainables" / "encoders").rglob("*.safetensors")):
        pytest.skip("the tiny encoder's weights are not there yet")
    assert "encoder.layer = 77" in refusal(check_encoder, EncoderConfig(layer=77), CorpusConfig())


def test_an_encoder_that_cannot_even_be_imported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ENCODER_CHECK", "import a_module_that_is_missing")
    assert "a_module_that_is_missing" in refusal(check_encoder, EncoderConfig(layer=1), CorpusConfig())
