"""How recordings are found, and how they are cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from study.recordings import batches, expand, pieces
from trainables.errors import UserError
from trainables.settings import CorpusConfig

CORPUS = CorpusConfig(clip_s=1.0)


def test_files_folders_and_patterns_are_found_one_by_one(tmp_path: Path) -> None:
    for name in ("b.wav", "a.flac", "notes.txt", "deep/c.WAV", "odd[1].wav"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()

    def found(*given: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in expand(str(tmp_path / name) for name in given)]

    assert found("") == ["a.flac", "b.wav", "odd[1].wav", "deep/c.WAV"]
    assert found("b.wav", "notes.txt", "gone.wav") == ["b.wav", "notes.txt", "gone.wav"], "as they are"
    assert found("*.wav") == ["b.wav", "odd[1].wav"]
    assert found("**/*.WAV") == ["deep/c.WAV"]
    assert found("odd[1].wav") == ["odd[1].wav"], "a file of that name is no pattern"
    assert found("*.mp3") == ["*.mp3"], "to be told as a file that is not there"
    first = next(expand(iter([str(tmp_path), "never asked for"])))
    assert first.name == "a.flac"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: a folder without .wav or .flac files"):
        list(expand([str(tmp_path / "empty")]))


def test_a_recording_is_cut_as_the_corpus_cuts_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    wave_TC = 0.1 * rng.standard_normal((40_000, 2))  # 2.5 s
    soundfile.write(tmp_path / "two.wav", wave_TC, 16_000, subtype="DOUBLE")
    whole = list(pieces(tmp_path / "two.wav", CORPUS))
    assert [(p.start_s, p.end_s) for p in whole] == [(0.0, 1.0), (1.0, 2.0), (1.5, 2.5)]
    clips = list(pieces(tmp_path / "two.wav", CORPUS, whole=False))
    assert [(p.start_s, p.end_s) for p in clips] == [(0.0, 1.0), (1.0, 2.0)], "no clip hears what another has"
    expected_T = wave_TC[16_000:32_000, 0] - wave_TC[16_000:32_000, 0].mean()
    expected_T /= np.sqrt(np.mean(expected_T**2))
    np.testing.assert_allclose(whole[1].wave_T, expected_T, atol=1e-4)
    assert all(p.wave_T.shape == (16_000,) for p in whole)


def test_what_cannot_be_cut_is_refused_by_name(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "short.wav", 0.1 * np.ones(8000), 16_000)
    with pytest.raises(UserError, match=r"^recording 3: 0.500 s long where this study works with 1 s"):
        list(pieces(tmp_path / "short.wav", CORPUS, name="recording 3"))
    soundfile.write(tmp_path / "dies.wav", np.r_[0.1 * np.sin(np.arange(16_000)), np.zeros(16_000)], 16_000)
    cut = pieces(tmp_path / "dies.wav", CORPUS)
    assert next(cut).start_s == 0
    with pytest.raises(UserError, match=r"dies.wav \[1-2 s\]: silent"):
        next(cut)


def test_batches_hold_at_most_so_many() -> None:
    assert list(batches(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert not list(batches([], 2))
