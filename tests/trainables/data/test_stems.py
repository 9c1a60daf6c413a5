"""Own recordings as a corpus: cutting, looping, what a manifest may name, and the real set where it is at hand."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from trainables.data import audio
from trainables.data.corpus import open_corpus
from trainables.data.stems import StemsSource, stems_source
from trainables.settings import CorpusConfig

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "real" / "manifest.csv"


def pieces(source: StemsSource, name: str) -> list[str]:
    return [c.origin.partition(" ")[2] for c in source.clips if c.name == name]


def test_a_plant_becomes_clips(plant) -> None:
    source = stems_source(plant.config())
    assert Counter((c.role, c.label, c.kind, c.split) for c in source.clips) == {
        ("machine", "normal", "", "train"): 4,
        ("machine", "normal", "", "test"): 4,
        ("machine", "anomaly", "", "test"): 4,
        ("noise", "", "stationary", "train"): 1,
        ("noise", "", "stationary", "test"): 2,
        ("noise", "", "nonstationary", "train"): 1,
        ("noise", "", "nonstationary", "test"): 2,
    }
    clip = source.clips[0]
    assert (clip.origin, clip.recording, clip.domain) == ("pump/bank0.wav [0-0.5 s]", "pump/bank0", "source")
    wave_T = source.render(0)
    assert wave_T.dtype == np.float32
    written_T, _ = soundfile.read(plant.folder / "pump/bank0.wav", dtype="float32")
    np.testing.assert_array_equal(wave_T, written_T)


def test_machine_rows_are_cut_and_the_remainder_dropped(plant) -> None:
    plant.machine("pump", "long", split="train", seconds=1.9)
    plant.machine("pump", "part", split="train", seconds=3.0, start_s="0.25", end_s="1.3")
    source = stems_source(plant.config())
    assert pieces(source, "pump")[-5:] == [
        "[0-0.5 s]",
        "[0.5-1 s]",
        "[1-1.5 s]",
        "[0.25-0.75 s]",
        "[0.75-1.25 s]",
    ]
    written_T, _ = soundfile.read(plant.folder / "pump/part.wav", dtype="float32")
    index = next(i for i, c in enumerate(source.clips) if c.origin == "pump/part.wav [0.75-1.25 s]")
    np.testing.assert_array_equal(source.render(index), written_T[6000:10000])


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.2, ["[0-0.2 s]"]),
        (0.4, ["[0-0.4 s]"]),
        (0.5, ["[0-0.5 s]"]),
        (0.7, ["[0-0.5 s]"]),
        (0.75, ["[0-0.5 s]", "[0.5-0.75 s]"]),
        (1.3, ["[0-0.5 s]", "[0.5-1 s]", "[1-1.3 s]"]),
    ],
)
def test_noise_remainders_are_kept_from_half_a_clip_on(plant, seconds: float, expected: list[str]) -> None:
    plant.noise("shop", "a", kind="stationary", split="test", seconds=seconds)
    source = stems_source(plant.config())
    assert pieces(source, "shop") == expected
    for i, clip in enumerate(source.clips):
        if clip.name == "shop":
            assert source.render(i).shape == (4000,)
    looped = sum(end not in ("[0-0.5 s]", "[0.5-1 s]") for end in expected)
    said = f"{looped} of {6 + len(expected)} noise clips come from less than 0.5 s of sound and are looped."
    assert (said in source.notes) == bool(looped)


def test_short_noise_is_looped_with_a_crossfade(plant) -> None:
    plant.noise("shop", "a", kind="stationary", split="test", seconds=0.3)
    source = stems_source(plant.config())
    wave_T = source.render(len(source.clips) - 1)
    written_T, _ = soundfile.read(plant.folder / "shop/a.wav", dtype="float32")
    np.testing.assert_array_equal(wave_T, audio.loop(written_T, 4000, 400))
    np.testing.assert_array_equal(wave_T[:2000], written_T[:2000])


def test_rates_channels_and_sample_formats_mix(plant) -> None:
    kinds = [(8000, 1, "PCM_16"), (44100, 2, "PCM_24"), (20000, 3, "FLOAT"), (48000, 1, "PCM_U8")]
    for i, (rate, channels, subtype) in enumerate(kinds):
        plant.machine("pump", f"mixed{i}", split="train")
        plant.sound(f"pump/mixed{i}.wav", 1.0, rate=rate, channels=channels, subtype=subtype)
    for sample_rate_hz in (8000, 16000):
        source = stems_source(plant.config(sample_rate_hz=sample_rate_hz))
        waves = [source.render(i) for i, c in enumerate(source.clips) if "mixed" in c.origin]
        assert [w.shape for w in waves] == [(sample_rate_hz // 2,)] * 8


def test_the_mean_of_channels_on_request(plant) -> None:
    plant.machine("pump", "wide", split="train")
    wave_TC = plant.sound("pump/wide.wav", 0.5, channels=2, subtype="FLOAT")
    first, mean = (stems_source(plant.config(channel=channel)) for channel in ("first", "mean"))
    last = len(first.clips) - 1
    np.testing.assert_allclose(first.render(last), wave_TC[:, 0], atol=1e-6)
    np.testing.assert_allclose(mean.render(last), wave_TC.mean(axis=1), atol=1e-6)
    assert first.identity != mean.identity


def test_a_row_up_to_a_millisecond_short_is_still_a_clip(plant) -> None:
    plant.machine("pump", "near", split="train", seconds=0.4995)
    source = stems_source(plant.config())
    wave_T = source.render(len(source.clips) - 1)
    assert wave_T.shape == (4000,)
    assert np.all(wave_T[3996:] == wave_T[3995])


def test_a_machine_row_that_is_too_short(plant, refusal) -> None:
    plant.machine("pump", "brief", split="train", seconds=0.3)
    parts = (
        "row 20: pump/brief.wav is 0.300 s long",
        "corpus.clip_s = 0.5 s",
        "set corpus.clip_s to 0.3 or less",
    )
    with refusal(*parts):
        stems_source(plant.config())
    stems_source(plant.config(clip_s=0.3))


def test_a_noise_row_that_is_too_short(plant, refusal) -> None:
    plant.noise("shop", "a", kind="stationary", split="test", seconds=0.1)
    with refusal("row 20: shop/a.wav is 0.100 s long", "from 0.2 s on"):
        stems_source(plant.config())


def test_a_piece_outside_its_file(plant, refusal) -> None:
    plant.machine("pump", "part", split="train", start_s="0.2", end_s="0.8")
    with refusal("row 20: pump/part.wav: piece 0.2 to 0.8 s does not lie in the file", "0.500 s long"):
        stems_source(plant.config())


def test_a_missing_file(plant, refusal) -> None:
    (plant.folder / "pump/good1.wav").unlink()
    with refusal("row 6, column path: 'pump/good1.wav' is not a file below", "correct or remove the row"):
        stems_source(plant.config())


def test_a_file_that_is_not_audio(plant, refusal) -> None:
    (plant.folder / "pump/good1.wav").write_text("hello")
    with refusal("pump/good1.wav: not an audio file"):
        stems_source(plant.config())


@pytest.mark.parametrize("path", ["\0.wav", "x" * 5000 + ".wav"])
def test_a_path_that_cannot_be_one(plant, refusal, path: str) -> None:
    plant.rows[0]["path"] = path
    with refusal("row 2, column path: "):
        stems_source(plant.config())


@pytest.mark.parametrize("how", ["absolute", "dots", "link"])
def test_paths_stay_in_the_manifests_folder_unless_allowed(plant, refusal, how: str) -> None:
    outside = plant.folder.parent / "elsewhere.wav"
    shutil.copy(plant.folder / "pump/bank0.wav", outside)
    (plant.folder / "link.wav").symlink_to(outside)
    path = {"absolute": str(outside), "dots": "../elsewhere.wav", "link": "link.wav"}[how]
    plant.rows[0]["path"] = path
    with refusal(f"row 2, column path: {path!r} leaves the manifest's folder", "corpus.allow_outside=true"):
        stems_source(plant.config())
    assert stems_source(plant.config(allow_outside=True)).clips[0].recording == "pump/bank0"


def test_an_unknown_channel(plant, refusal) -> None:
    with refusal("corpus.channel = 'right'", "first, mean, last"):
        stems_source(plant.config(channel="right"))


def test_rows_that_contradict_each_other(plant, refusal) -> None:
    plant.rows.append(plant.rows[0] | {"label": "anomaly", "split": "test"})
    with refusal("row 20, columns path, start_s, end_s: pump/bank0.wav from 0 to 0.5 s is also row 2"):
        stems_source(plant.config())


def test_a_copied_machine_file_in_bank_and_queries(plant, refusal) -> None:
    shutil.copy(plant.folder / "pump/bank0.wav", plant.folder / "pump/good0.wav")
    with refusal("row 3, column path: pump/good0.wav is a copy of pump/bank0.wav in row 2"):
        stems_source(plant.config())


def test_a_copied_noise_file_joins_the_originals_side(plant) -> None:
    for name in ("one", "two"):
        plant.noise("shop", name, kind="stationary", seconds=0.5)
    shutil.copy(plant.folder / "shop/one.wav", plant.folder / "shop/two.wav")
    for seed in range(5):
        source = stems_source(plant.config(seed=seed))
        assert len({c.split for c in source.clips if c.name == "shop"}) == 1
        assert any("shop/two.wav (of shop/one.wav)" in note for note in source.notes)


def test_empty_splits_are_drawn(plant) -> None:
    for cells in plant.rows:
        cells["split"] = ""
    source = stems_source(plant.config())
    normals = Counter(c.split for c in source.clips if c.label == "normal")
    assert normals == {"train": 5, "test": 3}
    assert Counter(c.split for c in source.clips if c.role == "noise") == {"train": 2, "test": 4}


def test_missing_noise_and_missing_anomalies(plant, refusal) -> None:
    rows = plant.rows
    plant.rows = [r for r in rows if r.get("kind") != "stationary"]
    with refusal("no stationary noise in test"):
        stems_source(plant.config())
    plant.rows = [r for r in rows if r.get("label") != "anomaly"]
    with refusal("no machine can be scored"):
        stems_source(plant.config())


def test_a_recording_that_the_manifest_divides_is_followed_and_said(plant) -> None:
    plant.machine("pump", "both", split="train", seconds=1.0, end_s="0.5")
    plant.rows.append(plant.rows[-1] | {"split": "test", "start_s": "0.5", "end_s": "1"})
    source = stems_source(plant.config())
    assert [c.split for c in source.clips if c.recording == "pump/both"] == ["train", "test"]
    said = "pump: the manifest puts parts of one recording into both train and test (1 of 13 recordings)."
    assert said in source.notes


def test_noise_that_has_to_serve_twice_is_said(plant) -> None:
    source = stems_source(plant.config())
    said = (
        "Noise for scoring is used more than once: an environment has 2 to 2 test clips, for 8 clips of pump."
    )
    assert source.notes[-1] == said
    for i in range(6):
        for name, kind in (("hall", "stationary"), ("yard", "nonstationary")):
            plant.noise(name, f"more{i}", kind=kind, split="test")
    assert not any("more than once" in note for note in stems_source(plant.config()).notes)


def test_identity_follows_content_and_rows_and_not_places(plant, tmp_path: Path) -> None:
    config = plant.config()
    identity = stems_source(config).identity
    moved = shutil.copytree(plant.folder, tmp_path / "moved")
    assert (
        stems_source(CorpusConfig(**{**vars(config), "manifest": str(moved / "manifest.csv")})).identity
        == identity
    )
    changed = [{"domain": "target"}, {"split": "train"}, {"recording": "good9"}, {"end_s": "0.4995"}]
    row = plant.rows[1]
    assert row["recording"] == "good0"
    for change in changed:
        plant.rows[1] = row | change
        assert stems_source(plant.config()).identity != identity, change
    plant.rows[1] = row
    assert stems_source(plant.config()).identity == identity
    plant.sound("pump/bank0.wav", 0.5001)
    assert stems_source(plant.config()).identity != identity


@pytest.mark.skipif(
    not REAL.is_file(), reason="real recordings are not beside the checkout (../shared/data/real)"
)
def test_the_real_recordings(tmp_path: Path) -> None:
    config = CorpusConfig(kind="stems", manifest=str(REAL), clip_s=2.0)
    corpus = open_corpus(config, tmp_path)
    assert corpus.waves_NT.shape == (len(corpus.clips), 32000)
    assert Counter((c.name, c.label, c.split) for c in corpus.clips if c.role == "machine") == {
        ("bldc_motor", "normal", "train"): 16,
        ("bldc_motor", "normal", "test"): 16,
        ("bldc_motor", "anomaly", "test"): 24,
        ("fan", "normal", "train"): 300,
        ("fan", "normal", "test"): 75,
    }
    assert Counter((c.kind, c.split) for c in corpus.clips if c.role == "noise") == {
        ("stationary", "train"): 13,
        ("stationary", "test"): 17,
        ("nonstationary", "train"): 13,
        ("nonstationary", "test"): 13,
    }
    roles = corpus.roles
    assert (roles.train, roles.search, roles.confirm) == (
        ("bldc_motor", "fan"),
        ("bldc_motor",),
        ("bldc_motor",),
    )
    held = Counter(recording.split("_")[1].split("/")[1] for recording in roles.confirm_recordings)
    assert held == {"healthy": 4, "propeller": 3}
    bank = corpus.select(role="machine", name="bldc_motor", split="train")
    assert [len(corpus.visible(bank, split)) for split in ("search", "confirm")] == [8, 16]
    for part in (
        "noise/crowd/n9.wav (of noise/crowd/n7.wav)",
        "(8 of 14 recordings)",
        "one domain only (source)",
    ):
        assert any(part in note for note in corpus.notes), part
