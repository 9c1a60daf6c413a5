"""A student with its banks: for every system, from training to a folder and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import search_spaces
from study import confirm
from study import detector as module
from study.config import StudyConfig
from study.detector import Detector, load_detector
from study.folder import StudyFolder
from study.packaging import new_detector
from study.student import Normal, Trained, best_student, build_student, embed
from trainables import loop
from trainables.checkpoint import learned_state
from trainables.encoders.encoder import load_encoder
from trainables.errors import UserError
from trainables.settings import CorpusConfig, EncoderConfig, TrainingConfig

CORPUS = CorpusConfig(clips_per_machine=8, clip_s=0.5)


def sounds(count: int, seed: int = 0, pitch: float = 0.1) -> np.ndarray:
    """Waves of unit RMS of a humming machine."""
    rng = np.random.default_rng(seed)
    at = np.arange(8000)
    waves = [
        np.sin(pitch * (1 + 0.05 * rng.random()) * at) + 0.3 * rng.standard_normal(8000) for _ in range(count)
    ]
    return np.stack([wave / np.sqrt(np.mean(wave**2)) for wave in waves]).astype(np.float32)


def bank(waves: np.ndarray, name: str = "normal") -> list[Normal]:
    return [Normal(f"{name}{i}.wav", i % 4 == 3, wave_T) for i, wave_T in enumerate(waves)]


@pytest.fixture(scope="module")
def detector() -> Detector:
    """The frozen encoder as a student, with two machines."""
    weights = {f"encoder.{k}": v for k, v in learned_state(load_encoder(EncoderConfig())).items()}
    trained = Trained(job_id="c-best-s0", system="retain", params={}, weights=weights)
    made = Detector(
        student=build_student(trained, EncoderConfig()),
        trained=trained,
        corpus=CORPUS,
        encoder=EncoderConfig(),
        backend="knn1_domain_z",
        facts={"study": "tiny", "student": "c-best-s0"},
    )
    made.add("hum", bank(sounds(12)))
    made.add("whistle", bank(sounds(5, pitch=0.9), "high"))
    return made


def recording(folder: Path, wave_T: np.ndarray, name: str = "new.wav") -> Path:
    soundfile.write(folder / name, 0.1 * wave_T, 16_000, subtype="FLOAT")
    return folder / name


def test_the_threshold_comes_from_clips_that_never_met_themselves(detector: Detector) -> None:
    """By hand: each clip of the bank against a bank without it."""
    from trainables.scoring.threshold import Threshold

    normals = dataclasses.replace(detector.banks["hum"], backend="knn1")
    emb_NE = normals.emb_NE.astype(np.float64)
    left_out = [np.linalg.norm(np.delete(emb_NE, i, 0) - emb_NE[i], axis=1).min() for i in range(len(emb_NE))]
    assert min(left_out) > 0
    np.testing.assert_allclose(normals.left_out(), left_out, rtol=1e-4)
    assert normals.threshold.at(0.1) == Threshold(normals.left_out()).at(0.1)
    assert np.median(left_out) < normals.threshold.at(0.1) < 2 * max(left_out)


@pytest.mark.parametrize("backend", ["knn1", "mahalanobis"])
def test_pieces_of_one_recording_never_vouch_for_each_other(detector: Detector, backend: str) -> None:
    """Beside its neighbours from the same file a normal piece scores far less than a new recording would."""
    hum = detector.banks["hum"]
    emb_NE = np.repeat(hum.emb_NE[:6], 2, axis=0) + 1e-3 * np.arange(12)[:, None]
    origins = tuple(f"a [{i // 2}].wav [{2 * (i % 2)}-{2 * (i % 2) + 2} s]" for i in range(12))
    pieces = dataclasses.replace(
        hum, backend=backend, emb_NE=emb_NE, is_target_N=np.zeros(12, bool), origins=origins
    )
    for i, score in enumerate(pieces.left_out()):
        others = np.array([j for j in range(12) if j // 2 != i // 2])
        rest = dataclasses.replace(
            pieces,
            emb_NE=emb_NE[others],
            is_target_N=np.zeros(10, bool),
            origins=tuple(origins[j] for j in others),
        )
        assert score == pytest.approx(rest.judge(emb_NE[i : i + 1])[0][0], rel=1e-4)
    apart = dataclasses.replace(pieces, origins=tuple(f"{i}.wav" for i in range(12)))
    assert np.median(pieces.left_out()) > np.median(apart.left_out())


def test_a_line_names_the_nearest_normal_clip(detector: Detector, tmp_path: Path) -> None:
    waves = sounds(12)
    line = detector.line(recording(tmp_path, waves[7]), "hum", 0.1)
    assert (line["nearest"], line["distance"]) == ("normal7.wav", pytest.approx(0, abs=1e-2))
    assert line["anomalous"] is False
    assert line["score"] < line["threshold"]
    other = detector.line(recording(tmp_path, sounds(1, pitch=0.5)[0]), "hum", 0.1)
    assert other["anomalous"] is True
    assert other["distance"] > 1
    long = detector.line(recording(tmp_path, np.r_[waves[7], sounds(1, pitch=0.5)[0], waves[2]]), "hum", 0.1)
    assert (long["score"], long["nearest"]) == (other["score"], other["nearest"]), "of its worst piece"
    assert [p["score"] == long["score"] for p in long["pieces"]] == [False, True, False]


@pytest.mark.parametrize("backend", ["knn1_cosine", "beam_domain_z", "fusion_min_z", "mahalanobis"])
def test_every_back_end_gives_a_threshold(detector: Detector, backend: str, tmp_path: Path) -> None:
    other = dataclasses.replace(detector, backend=backend, banks={})
    other.add("hum", bank(sounds(12)))
    line = other.line(recording(tmp_path, sounds(1, seed=9)[0]), None, 0.1)
    assert line["backend"] == backend
    assert line["anomalous"] is (line["score"] > line["threshold"])
    known = other.line(recording(tmp_path, sounds(12)[7]), None, 0.1)
    assert known["score"] < other.banks["hum"].left_out()[7], "what it would be if it had met itself"


def test_whatever_is_wrong_with_a_recording_becomes_its_line(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = recording(tmp_path, sounds(1)[0])
    assert "machine is missing; allowed are hum, whistle" in detector.line(good, None, 0.1)["error"]
    assert "machine 'saw': not known here; allowed are hum" in detector.line(good, "saw", 0.1)["error"]
    line = detector.line(tmp_path / "gone.wav", "hum", 0.1, name="recording 2")
    assert line == {
        "machine": "hum",
        **detector.facts,
        "error": "recording 2: no such file; correct the path",
    }

    def fail(*arguments: object) -> None:
        raise RuntimeError("out of\n memory")

    monkeypatch.setattr(module, "embed", fail)
    assert detector.line(good, "hum", 0.1)["error"] == f"{good}: unexpected RuntimeError: out of memory"


def test_a_bank_of_two_has_no_threshold(detector: Detector, tmp_path: Path) -> None:
    few = dataclasses.replace(detector, banks={})
    few.add("", bank(sounds(2)))
    line = few.line(recording(tmp_path, sounds(1, seed=9)[0]), "any label", 0.1)
    assert "machine 'any label': not known here" in line["error"]
    line = few.line(recording(tmp_path, sounds(1, seed=9)[0]), None, 0.1)
    assert (line["threshold"], line["anomalous"], line["threshold_from"]) == (None, None, "none")
    with pytest.raises(UserError, match="no normal clip"):
        few.add("", [])


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("system", "recipe"),
    [("retain", "paper"), ("adapt", "paper"), ("adapt,retain", "adapt-full"), ("identify", "paper")],
)
def test_a_student_of_every_system_is_taken_along(
    system: str, recipe: str, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What training saves, opened from the study and then from a folder, embeds as the student in training did."""
    few = TrainingConfig(epochs=1, steps_per_epoch=1, batch_size=8, device="cpu")
    config = StudyConfig(system=system, corpus=CORPUS, training=few)
    folder, cpu = StudyFolder(tmp_path / "made"), torch.device("cpu")
    path = folder.checkpoint_path("c-best-s0")
    params = dict(search_spaces.load(system).RECIPES[recipe])
    trial = config.trial(params, seed=0)
    next(loop.train(trial, cache_dir=cache_dir, checkpoint_dir=path))
    folder.write_job({"id": "c-best-s0", "role": "confirm", "params": params})
    monkeypatch.setattr(confirm, "student_path", lambda config, folder: path)

    run = loop._Run(trial, loop.prepare(trial, cache_dir, cpu), cpu, 0, 1)
    run.restore(path)
    corpus = run.materials.corpus
    waves = [corpus.waves_NT[i] for i in corpus.select(role="machine", name="fan", split="train")[:3]]
    with torch.no_grad():
        feature = run.system.encoder.features(torch.from_numpy(np.stack(waves)))
        wanted = run.judged.eval().embed(feature, ["fan"] * 3).numpy()

    made = new_detector(config, folder, cache_dir)
    assert made.trained.job_id == "c-best-s0"
    np.testing.assert_allclose(embed(made.student, waves, "fan"), wanted, rtol=1e-4, atol=1e-5)
    made.add("fan", bank(np.stack(waves)))
    made.save(tmp_path / "taken", waves[0])
    again = load_detector(tmp_path / "taken")
    np.testing.assert_array_equal(embed(again.student, waves, "fan"), embed(made.student, waves, "fan"))
    heard = tmp_path / "taken" / "example.wav"
    assert again.line(heard, "fan", 0.1) == made.line(heard, "fan", 0.1)
    assert again.line(heard, "fan", 0.1)["nearest"] == "normal0.wav"
    assert not list((tmp_path / "taken").glob("**/*.p*")), "nothing pickled"
    if "group_count" in params:
        assert not np.allclose(embed(again.student, waves, None), wanted, atol=1e-5), (
            "a machine has its group"
        )

    (path / "epoch-0001.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="holds no sound checkpoint"):
        best_student(config, folder)
    with pytest.raises(UserError, match="no student of the encoder tiny"):
        build_student(
            dataclasses.replace(made.trained, weights={"encoder.other": torch.ones(1)}), EncoderConfig()
        )


def test_an_encoder_with_weights_of_its_own_is_taken_along(detector: Detector, tmp_path: Path) -> None:
    from trainables.encoders.tiny import load_tiny, save_tiny

    encoder = EncoderConfig(checkpoint=str(tmp_path / "mine.safetensors"))
    save_tiny(load_tiny(None), tmp_path / "mine.safetensors", {})
    dataclasses.replace(detector, encoder=encoder).save(tmp_path / "taken", sounds(1)[0])
    for file in tmp_path.glob("mine.*"):
        file.unlink()
    moved = (tmp_path / "taken").rename(tmp_path / "moved")
    again = load_detector(moved)
    assert again.encoder.checkpoint == str(moved / "encoder" / "model.safetensors")
    new = recording(tmp_path, sounds(1, seed=5)[0])
    assert again.line(new, "hum", 0.1) == detector.line(new, "hum", 0.1)
