"""Reading pieces of audio files: formats, channels, rates, and every way a file can be unusable."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from trainables.data import audio


def tone(hz: float, rate: int, seconds: float = 1.0) -> np.ndarray:
    return np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def level_db(wave_T: np.ndarray) -> float:
    """Level of the middle of a wave relative to a full-scale sine."""
    inner = wave_T[len(wave_T) // 4 : -len(wave_T) // 4]
    return float(10 * np.log10(2 * np.mean(np.square(inner, dtype=np.float64)) + 1e-30))


@pytest.mark.parametrize(
    ("name", "subtype", "error"),
    [
        ("a.wav", "PCM_16", 2**-15),
        ("a.wav", "PCM_24", 2**-22),
        ("a.wav", "FLOAT", 1e-7),
        ("a.wav", "DOUBLE", 1e-7),
        ("a.flac", "PCM_16", 2**-15),
        ("a.flac", "PCM_24", 2**-22),
    ],
)
def test_formats_give_the_same_wave(tmp_path: Path, name: str, subtype: str, error: float) -> None:
    wave_T = 0.5 * tone(440, 16000)
    soundfile.write(tmp_path / name, wave_T, 16000, subtype=subtype)
    read_T = audio.read(tmp_path / name, sample_rate_hz=16000)
    assert read_T.dtype == np.float32
    np.testing.assert_allclose(read_T, wave_T, atol=error)


def test_channel_is_the_first_or_the_mean(tmp_path: Path) -> None:
    left_T, right_T = 0.5 * tone(300, 8000), 0.25 * tone(900, 8000)
    soundfile.write(tmp_path / "a.wav", np.stack([left_T, right_T], axis=1), 8000, subtype="FLOAT")
    np.testing.assert_allclose(audio.read(tmp_path / "a.wav", sample_rate_hz=8000), left_T, atol=1e-6)
    mean_T = audio.read(tmp_path / "a.wav", sample_rate_hz=8000, channel="mean")
    np.testing.assert_allclose(mean_T, (left_T + right_T) / 2, atol=1e-6)


@pytest.mark.parametrize("name", ["long.wav", "long.flac"])
def test_a_piece_is_read_without_decoding_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    wave_T = 0.5 * tone(50, 8000, 30.0)
    soundfile.write(tmp_path / name, wave_T, 8000)
    asked: list[int] = []

    class Watched(soundfile.SoundFile):  # type: ignore[misc]
        def read(self, frames: int = -1, **more: object) -> np.ndarray:
            asked.append(frames)
            return np.asarray(super().read(frames, **more))

    monkeypatch.setattr(soundfile, "SoundFile", Watched)
    piece_T = audio.read(tmp_path / name, sample_rate_hz=8000, start_s=20.0, end_s=21.5)
    assert asked == [12000]
    np.testing.assert_allclose(piece_T, wave_T[160000:172000], atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
def test_resampling_keeps_what_fits_and_drops_the_rest(rate: int) -> None:
    low_hz = min(rate, 16000) / 2
    for share in (0.05, 0.5, 0.9):
        assert abs(level_db(audio.resample(tone(share * low_hz, rate), rate, 16000))) < 0.01
    for hz in (8001.0, 9000.0, 14000.0):
        if hz < rate / 2:
            assert level_db(audio.resample(tone(hz, rate), rate, 16000)) < -80


@pytest.mark.parametrize(("rate", "num"), [(44100, 88200), (20000, 20001), (8000, 3), (16000, 5)])
def test_resampling_gives_the_expected_number_of_samples(rate: int, num: int) -> None:
    assert len(audio.resample(np.ones(num), rate, 16000)) == -(-num * 16000 // rate)


def test_a_piece_neither_starts_nor_stops_with_a_click() -> None:
    out_T = audio.resample(tone(200, 44100) + 1.0, 44100, 16000)
    expected_T = tone(200, 16000) + 1.0
    assert np.abs(out_T - expected_T).max() < 0.02  # without mirroring 1.0: the wave would start from zero


def test_a_loop_goes_on_and_keeps_its_power() -> None:
    rng = np.random.default_rng(0)
    power_T = np.zeros(4000)
    for _ in range(200):
        wave_T = rng.standard_normal(1000).astype(np.float32)
        out_T = audio.loop(wave_T, 4000, 100)
        assert out_T.dtype == np.float32
        np.testing.assert_array_equal(out_T[:900], wave_T[:900])
        np.testing.assert_allclose(out_T[1000:1800], wave_T[100:900], rtol=1e-6)
        power_T += np.square(out_T) / 200
    seams = np.r_[900:1000, 1800:1900, 2700:2800]
    assert abs(power_T[seams].mean() - 1) < 0.05


@pytest.mark.parametrize("num", [4, 5, 1000])
def test_a_loop_fills_whatever_length_is_asked_for(num: int) -> None:
    assert np.all(np.abs(audio.loop(np.ones(num, np.float32), 1234, 400)[: num - num // 4]) == 1)
    assert np.abs(audio.loop(np.ones(num, np.float32), 1234, 400)).min() > 0.99


def test_missing_file_and_folder(tmp_path: Path, refusal) -> None:
    with refusal("gone.wav", "no such file"):
        audio.read(tmp_path / "gone.wav", sample_rate_hz=8000)
    with refusal(str(tmp_path), "not a file"):
        audio.probe(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path, refusal) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    with refusal("pipe.wav", "not a file"):
        audio.probe(tmp_path / "pipe.wav")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.wav", b"hello, I am not a sound"),
        ("nothing.wav", b""),
        ("pure.raw", bytes(1000)),
        ("x.flac", b"fLaC"),
    ],
)
def test_not_audio(tmp_path: Path, refusal, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with refusal(name, "not an audio file"):
        audio.probe(tmp_path / name)


def test_empty(tmp_path: Path, refusal) -> None:
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 8000)
    with refusal("empty.wav", "no samples"):
        audio.probe(tmp_path / "empty.wav")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_numbers(tmp_path: Path, refusal, value: float) -> None:
    wave_T = tone(100, 8000)
    wave_T[4321] = value
    soundfile.write(tmp_path / "broken.wav", wave_T, 8000, subtype="FLOAT")
    with refusal("broken.wav", "NaN or infinite"):
        audio.read(tmp_path / "broken.wav", sample_rate_hz=8000)
    audio.read(tmp_path / "broken.wav", sample_rate_hz=8000, end_s=0.5)  # that piece is sound


def test_too_short(tmp_path: Path, refusal) -> None:
    soundfile.write(tmp_path / "short.wav", tone(100, 8000, 1.5), 8000)
    with refusal("short.wav", "1.500 s long", "2 s are needed"):
        audio.read(tmp_path / "short.wav", sample_rate_hz=8000, least_s=2.0)
    with refusal("short.wav", "1.000 s long"):
        audio.read(tmp_path / "short.wav", sample_rate_hz=8000, start_s=0.5, least_s=1.1)
    assert len(audio.read(tmp_path / "short.wav", sample_rate_hz=8000, least_s=1.5)) == 12000


@pytest.mark.parametrize(("start_s", "end_s"), [(1.0, 1.0), (0.8, 0.2), (1.5, None), (0.0, 1.2), (-0.1, 0.5)])
def test_bounds_outside_the_file(tmp_path: Path, refusal, start_s: float, end_s: float | None) -> None:
    soundfile.write(tmp_path / "one.wav", tone(100, 8000), 8000)
    with refusal("one.wav", f"piece {start_s:g} to", "1.000 s long"):
        audio.read(tmp_path / "one.wav", sample_rate_hz=8000, start_s=start_s, end_s=end_s)


def test_an_end_rounded_to_milliseconds_is_accepted(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "one.wav", np.zeros(44097), 44100)  # 0.99993 s
    assert len(audio.read(tmp_path / "one.wav", sample_rate_hz=44100, end_s=1.0)) == 44097


def test_a_file_cut_off_in_transfer(tmp_path: Path, refusal) -> None:
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "cut.flac", 0.1 * rng.standard_normal(40000), 8000)
    content = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(content[: len(content) // 2])
    with refusal("cut.flac"):
        audio.read(tmp_path / "cut.flac", sample_rate_hz=8000)


def test_an_unknown_channel(tmp_path: Path, refusal) -> None:
    soundfile.write(tmp_path / "one.wav", tone(100, 8000), 8000)
    with refusal("corpus.channel = 'left'", "first, mean, last"):
        audio.read(tmp_path / "one.wav", sample_rate_hz=8000, channel="left")


def test_messages_name_the_row_that_was_asked_for(tmp_path: Path, refusal) -> None:
    with refusal("row 3: a.wav: no such file"):
        audio.probe(tmp_path / "a.wav", "row 3: a.wav")


def test_survey_reads_a_file_again_only_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {"a": tmp_path / "a.wav", "b": tmp_path / "b.wav"}
    for path, hz in zip(paths.values(), (100, 200), strict=True):
        soundfile.write(path, tone(hz, 8000), 8000)
    index = tmp_path / "cache" / "index.json"
    first = audio.survey(paths, index)
    assert first["a"].sha256 == hashlib.sha256(paths["a"].read_bytes()).hexdigest()
    assert (first["a"].num_frames, first["a"].rate_hz, first["a"].num_channels) == (8000, 8000, 1)
    opened: list[Path] = []
    monkeypatch.setattr(audio, "_open", lambda path, name: opened.append(path) or soundfile.SoundFile(path))
    assert audio.survey(paths, index) == first
    assert opened == []
    stat = paths["b"].stat()
    soundfile.write(paths["b"], tone(300, 8000), 8000)  # as long as before, and with the old date
    os.utime(paths["b"], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = audio.survey(paths, index)
    assert opened == [paths["b"]]
    assert again["a"] == first["a"]
    assert again["b"].sha256 != first["b"].sha256


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', '{"x": {"audio": {"rate_hz": 1}}}'])
def test_a_broken_index_is_made_anew(tmp_path: Path, content: str) -> None:
    soundfile.write(tmp_path / "a.wav", tone(100, 8000), 8000)
    (tmp_path / "index.json").write_text(content)
    facts = audio.survey({"a": tmp_path / "a.wav"}, tmp_path / "index.json")
    assert facts == audio.survey({"a": tmp_path / "a.wav"})
    assert facts == audio.survey({"a": tmp_path / "a.wav"}, tmp_path / "index.json")
