"""Every year's folders and names, what a machine may lack, who sees whom, and the real clips where they are at hand."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.trainables.data.dcase_layouts import FIRST_INDEX, Layout
from trainables.data import audio
from trainables.data.corpus import open_corpus, open_source
from trainables.data.dcase import DcaseSource, dcase_source
from trainables.data.dcase_names import YEARS, machine_type, read_name, read_supplemental
from trainables.scoring.grid import make_plan
from trainables.settings import CorpusConfig

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "dcase2020"
BANDS = {"low": (-10.0, 0.0), "mid": (0.0, 15.0), "high": (15.0, 30.0)}


def config(root: Path, year: int, **more: object) -> CorpusConfig:
    settings = {"clip_s": 0.5, "clips_per_machine": 8, "root": str(root), "year": year} | more
    return CorpusConfig(kind="dcase", **settings)  # type: ignore[arg-type]


def machine_clips(source: DcaseSource) -> list:
    return [c for c in source.clips if c.role == "machine"]


# -- every year ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("year", "style"), [*((year, "folders") for year in YEARS), (2020, "flat"), (2023, "flat"), (2023, "raw")]
)
def test_each_year_and_each_place(year: int, style: str, tmp_path: Path) -> None:
    Layout(tmp_path, year, style).write()
    source = open_source(config(tmp_path, year))
    mine = [c for c in source.clips if c.role == "machine"]
    parts = 2 if year < 2023 else 1
    count = Counter(c.name for c in mine)
    assert len(count) == parts * len(YEARS[year].dev)
    assert {name.partition("/")[0] for name in count} == set(YEARS[year].dev)
    per_unit = Counter((c.split, c.label, c.domain) for c in mine if c.name == mine[0].name)
    if year == 2020:
        assert per_unit == {
            ("train", "normal", "source"): 4,
            ("test", "normal", "source"): 2,
            ("test", "anomaly", "source"): 2,
        }
    else:
        tests = {("test", label, d): 2 for label in ("normal", "anomaly") for d in ("source", "target")}
        assert per_unit == {("train", "normal", "source"): 4, ("train", "normal", "target"): 2, **tests}
    first = next(c for c in mine if c.split == "train")
    assert first.section == {2020: "id_01"}.get(year, "section_00")
    assert first.name == (f"ToyCar/{first.section}" if year < 2023 else "ToyCar")
    assert first.attributes == ("" if year == 2020 else "vel_6")
    assert first.origin.endswith(f"{FIRST_INDEX.get(year, 0):04d}{'' if year == 2020 else '_vel_6'}.wav")
    assert source.year == year
    assert not set(source.roles.confirm) & {*source.roles.search, *source.roles.train}


@pytest.mark.parametrize("year", YEARS)
def test_labels_of_the_evaluation_set(year: int, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "data", year).write("dev", sections=1).write("eval", sections=1)
    without = dcase_source(config(layout.root, year))
    evaluated = {c.name for c in machine_clips(without) if not is_dev(c, year)}
    assert not {c.split for c in machine_clips(without) if not is_dev(c, year)} - {"train"}
    assert any("No labels for" in note for note in without.notes)
    assert not evaluated & {*without.roles.search, *without.roles.confirm}

    layout.write_list(tmp_path / "baseline" / f"eval_data_list_{year}.csv")
    listed = dcase_source(config(layout.root, year, ground_truth=str(tmp_path / "baseline")))
    scored = {*listed.roles.search, *listed.roles.confirm}
    assert {c.name for c in machine_clips(listed)} >= scored > evaluated
    assert not any("No labels" in note for note in listed.notes)
    for clip in machine_clips(listed):
        if clip.split == "test" and not is_dev(clip, year):
            named = read_name(layout.labels[clip.name.partition("/")[0], Path(clip.origin).name], year, "")
            assert (clip.label, clip.domain) == (named.label, named.domain)
    if year >= 2023:
        assert set(listed.roles.search) == set(YEARS[year].dev)
        assert set(listed.roles.confirm) == set(YEARS[year].evaluation)
    if year > 2020:
        layout.write_tables(tmp_path / "evaluator")
        tables = dcase_source(config(layout.root, year, ground_truth=str(tmp_path / "evaluator")))
        assert tables.clips == listed.clips
        assert tables.identity == listed.identity != without.identity


def is_dev(clip, year: int) -> bool:
    return YEARS[year].is_dev(clip.name.partition("/")[0], int(clip.section[-2:]))


def test_the_baselines_labelled_copies_are_labels(tmp_path: Path) -> None:
    layout = Layout(tmp_path, 2023, "raw").write().write("eval")
    for (machine, shown), named in layout.labels.items():
        copies = tmp_path / "eval_data/raw" / machine / "test_rename"
        copies.mkdir(exist_ok=True)
        shutil.copy(copies.parent / "test" / shown, copies / named)
    source = dcase_source(config(tmp_path, 2023))
    assert set(source.roles.confirm) == set(YEARS[2023].evaluation)
    tests = [c for c in machine_clips(source) if c.name == "Vacuum" and c.split == "test"]
    assert len(tests) == 8
    assert all("test_rename" in c.origin for c in tests)


# -- attributes, supplements, channels -----------------------------------------------------------------------


def test_attributes_from_names_tables_and_none(tmp_path: Path) -> None:
    Layout(tmp_path, 2024).write()
    table = tmp_path / "dev_data" / "gearbox" / "attributes_00.csv"
    hidden = "section_00_source_train_normal_0001_noAttribute.wav"
    table.write_text(f"file_name,d1p,d1v,d2p,d2v\ngearbox/train/{hidden},volt,1.5,wt,0\n")
    clips = machine_clips(dcase_source(config(tmp_path, 2024)))
    by_name = {c.origin.rpartition("/")[2]: c.attributes for c in clips if c.name == "gearbox"}
    assert by_name.pop(hidden) == "volt_1.5_wt_0"
    assert set(by_name.values()) == {""}
    assert {c.attributes for c in clips if c.name == "fan"} == {"vel_6", "vel_22"}


def test_supplemental_clips_train_and_make_noise_but_not_of_machines_that_confirm(tmp_path: Path) -> None:
    layout = Layout(tmp_path, 2025).write()
    roles = dcase_source(config(tmp_path, 2025)).roles
    clean, noisy, held = roles.train[0], roles.train[1], roles.confirm[0]
    for machine, role in ((clean, "machine"), (noisy, "noise"), (held, "noise")):
        layout.supplement(machine, role)
    source = dcase_source(config(tmp_path, 2025))
    assert source.roles == roles
    supplements = [c for c in source.clips if c.split == "supplemental"]
    assert Counter((c.role, c.name, c.label) for c in supplements) == {("machine", clean, "normal"): 3}
    noise = [c for c in source.clips if c.role == "noise"]
    assert Counter((c.name, c.split) for c in noise) == {(f"{noisy} noise", "train"): 3}
    assert any("3 supplemental noise clips" in note for note in source.notes)
    corpus = open_corpus(config(tmp_path, 2025), tmp_path)
    bank = make_plan(corpus, split="search", seed=0, bands_db=BANDS).bank[clean]
    assert {corpus.clips[i].split for i in bank} == {"train"}


def test_what_supplemental_names_say() -> None:
    for name, role, attributes in (
        ("section_00_machine_source_0000_noAttribute.wav", "machine", ""),
        ("section_00_machine_0001_.wav", "machine", ""),
        ("section_00_source_supplemental_machine_0000.wav", "machine", ""),
        ("section_00_noise_supplemental_normal_0000.wav", "noise", ""),
        ("section_00_machine_source_0007_spd_28V_noise_1.wav", "machine", "spd_28V_noise_1"),
    ):
        found, facts = read_supplemental(name, name)
        assert (found, facts.attributes) == (role, attributes)


def test_two_channels_near_heard_and_far_as_noise(tmp_path: Path) -> None:
    Layout(tmp_path, 2026).write()
    source = dcase_source(config(tmp_path, 2026))
    assert any("far microphone" in note for note in source.notes)
    noise = next(i for i, c in enumerate(source.clips) if c.role == "noise")
    path = tmp_path / source.clips[noise].origin.removesuffix(" [far]")
    near = next(i for i, c in enumerate(source.clips) if tmp_path / c.origin == path)
    written_TC, _ = soundfile.read(path, dtype="float32")
    np.testing.assert_array_equal(source.render(near), written_TC[:, 0])
    np.testing.assert_array_equal(source.render(noise), written_TC[:, 1])
    assert {c.name.removesuffix(" far") for c in source.clips if c.role == "noise"} == set(source.roles.train)
    assert machine_type("ToyCarEmu") == machine_type("ToyCar")


def test_one_channel_in_2026_is_refused_or_needs_other_noise(tmp_path: Path, refusal) -> None:
    for path in Layout(tmp_path, 2026).write().root.rglob("*.wav"):
        wave_TC, rate = soundfile.read(path)
        soundfile.write(path, wave_TC[:, 0], rate)
    with refusal("one channel", "near and far", "corpus.noise=factory"):
        dcase_source(config(tmp_path, 2026))
    assert dcase_source(config(tmp_path, 2026, noise="factory")).year == 2026


# -- clips and noise -----------------------------------------------------------------------------------------


def test_clips_are_cut_and_looped_to_length_and_no_audio_is_read_before(tmp_path: Path, monkeypatch) -> None:
    Layout(tmp_path, 2023).write()
    with monkeypatch.context() as patch:
        patch.setattr(audio, "read", lambda *a, **k: pytest.fail("audio was read"))
        short, long = (dcase_source(config(tmp_path, 2023, clip_s=clip_s)) for clip_s in (0.3, 0.8))
    for source in (short, long):
        written_T, _ = soundfile.read(tmp_path / source.clips[0].origin, dtype="float32")
        wave_T = source.render(0)
        assert len(wave_T) == (4800 if source is short else 12_800)
        np.testing.assert_array_equal(wave_T[:4800], written_T[:4800])
    assert any("first 0.3 s" in note for note in short.notes)
    assert any("looped" in note for note in long.notes)


def test_noise_comes_from_where_it_is_asked_for(tmp_path: Path, refusal) -> None:
    root = Layout(tmp_path / "data", 2023).write().root
    auto, factory = (dcase_source(config(root, 2023, noise=word)) for word in ("auto", "factory"))
    assert any("built-in factory, because the year comes with none" in note for note in auto.notes)
    assert [c.name for c in auto.clips] == [c.name for c in factory.clips]
    assert len(auto.render(len(auto.clips) - 1)) == 8000
    own = tmp_path / "own"
    for name, seconds in (("hall/a.wav", 1.2), ("hall/b.wav", 0.5), ("street.wav", 0.3)):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(
            own / name, np.random.default_rng(0).standard_normal(round(16_000 * seconds)) / 9, 16_000
        )
    mine = dcase_source(config(root, 2023, noise=str(own)))
    noise = [c for c in mine.clips if c.role == "noise"]
    assert Counter(c.name for c in noise) == {"hall": 3, "own": 1}
    assert {len(mine.render(len(mine.clips) - 1 - i)) for i in range(4)} == {8000}
    (own / "manifest.csv").write_text(
        "path,role,name,kind,label,domain,split\nhall/a.wav,noise,hall,stationary,,,train\n"
        "street.wav,noise,street,nonstationary,,,test\n"
    )
    listed = dcase_source(config(root, 2023, noise=str(own / "manifest.csv")))
    assert {c.name for c in listed.clips if c.role == "noise"} == {"hall"}
    assert len({auto.identity, mine.identity, listed.identity}) == 3
    with refusal("corpus.noise = 'supplemental'", "allowed are auto, factory"):
        dcase_source(config(root, 2023, noise="supplemental"))
    with refusal("corpus.noise = ", "no such file or folder", "auto"):
        dcase_source(config(root, 2023, noise="nowhere"))
    (tmp_path / "empty").mkdir()
    with refusal("holds no noise"):
        dcase_source(config(root, 2023, noise=str(tmp_path / "empty")))


def test_a_year_is_rendered_and_planned_as_it_is(tmp_path: Path) -> None:
    Layout(tmp_path / "data", 2022).write()
    told: list[tuple[int, int]] = []
    corpus = open_corpus(config(tmp_path / "data", 2022), tmp_path, lambda *done: told.append(done))
    assert told[-1] == (len(corpus.clips), len(corpus.clips))
    plan, again = (make_plan(corpus, split="search", seed=s, bands_db=BANDS) for s in (0, 1))
    assert plan.digest == again.digest
    assert np.array_equal(plan.clip_R, plan.noise_R)
    assert np.isposinf(plan.snr_db_R).all()
    assert plan.machines == corpus.roles.search
    assert {machine_type(m) for m in corpus.roles.search} & {
        machine_type(m) for m in corpus.roles.confirm
    } == set()
    for machine in plan.machines:
        assert {corpus.clips[i].name for i in (*plan.bank[machine], *plan.queries[machine])} == {machine}
        assert {corpus.clips[i].split for i in plan.bank[machine]} == {"train"}


# -- refusals ------------------------------------------------------------------------------------------------


def test_what_is_missing_is_named_with_its_record_and_place(tmp_path: Path, refusal) -> None:
    with refusal("corpus.root", "no such folder", "zenodo.org/records/7882613"):
        dcase_source(config(tmp_path / "nowhere", 2023))
    with refusal("no ToyCar/train of DCASE 2023", "zenodo.org/records/7882613", "dev_data/ToyCar/train"):
        dcase_source(config(tmp_path, 2023))
    layout = Layout(tmp_path, 2023).write().write("eval", ("Vacuum", "shaker"))
    with refusal("no ToyDrone/train", "7830345", "7860847", "corpus.machines=ToyCar"):
        dcase_source(config(tmp_path, 2023))
    some = dcase_source(config(tmp_path, 2023, machines=("fan", "Vacuum", "shaker")))
    assert any("Only 3 of 14 machines" in note for note in some.notes)
    with refusal("corpus.machines", "'fun'", "fan"):
        dcase_source(config(tmp_path, 2023, machines=("fun",)))
    shutil.rmtree(tmp_path / "eval_data")
    shutil.rmtree(tmp_path / "dev_data/fan/test")
    with refusal("fan: no source normal clips in test", "zenodo.org/records/7882613"):
        dcase_source(config(tmp_path, 2023))
    for path in (layout.root / "dev_data/bearing/test").glob("*target_test_normal*"):
        path.unlink()
    with refusal("bearing: no target normal clips in test"):
        dcase_source(config(tmp_path, 2023, machines=("bearing",)))


def test_another_year_is_recognised(tmp_path: Path, refusal) -> None:
    Layout(tmp_path / "new", 2023).write().write("eval", ("Vacuum",))
    with refusal("corpus.year = 2022", "Vacuum is a machine of 2023"):
        dcase_source(config(tmp_path / "new", 2022))
    Layout(tmp_path / "old", 2022).write()
    with refusal("section 01, where machines of DCASE 2023 have only section 00"):
        dcase_source(config(tmp_path / "old", 2023))
    notes = dcase_source(config(tmp_path / "old", 2022)).notes
    assert "fan: no section_02; the scores are not those of the challenge." in notes


def test_a_set_unpacked_twice_is_refused(tmp_path: Path, refusal) -> None:
    Layout(tmp_path, 2023).write("dev", ("fan",))
    shutil.copytree(tmp_path / "dev_data/fan", tmp_path / "fan")
    with refusal(
        "dev_data/fan/train/section_00_source_train_normal_0000_vel_6.wav: is there twice", "fan/train"
    ):
        dcase_source(config(tmp_path, 2023, machines=("fan",)))


def test_other_bad_input(tmp_path: Path, refusal) -> None:
    layout = Layout(tmp_path / "data", 2023).write("dev", ("fan", "valve")).write("eval", ("shaker",))
    given = {"machines": ("fan", "valve", "shaker")}
    with refusal("corpus.year = 2019", "2020 to 2026"):
        dcase_source(config(layout.root, 2019))
    with refusal("corpus.ground_truth", "no such file or folder"):
        dcase_source(config(layout.root, 2023, ground_truth=str(tmp_path / "no"), **given))
    with refusal("holds neither eval_data_list_2023.csv"):
        dcase_source(config(layout.root, 2023, ground_truth=str(layout.root), **given))
    layout.write_tables(tmp_path / "evaluator")
    shutil.rmtree(tmp_path / "evaluator/ground_truth_domain")
    with refusal("line 1", "no domain", "ground_truth_domain"):
        dcase_source(config(layout.root, 2023, ground_truth=str(tmp_path / "evaluator"), **given))
    stray = layout.root / "dev_data/fan/train/fan_1.wav"
    stray.write_bytes(b"")
    with refusal("dev_data/fan/train/fan_1.wav: not a file name of DCASE 2023"):
        dcase_source(config(layout.root, 2023, **given))
    stray.unlink()
    (stray.parent / "section_00_source_train_normal_0000_vel_6.wav").write_bytes(b"RIFF")
    with refusal("section_00_source_train_normal_0000_vel_6.wav", "not an audio file"):
        dcase_source(config(layout.root, 2023, **given))
    with refusal("no test clip has a label"):
        dcase_source(config(layout.root, 2023, machines=("shaker",)))


# -- real clips ----------------------------------------------------------------------------------------------

real = pytest.mark.skipif(
    not REAL.is_dir(), reason="real clips are not beside the checkout (../shared/data/dcase2020)"
)


@real
def test_real_clips_lack_normals_for_testing(refusal) -> None:
    with refusal("fan/id_00: no normal clips in test", "zenodo.org/records/3678171"):
        dcase_source(config(REAL, 2020, clip_s=10.0, machines=("fan",)))


@real
def test_real_clips_in_a_layout_that_can_be_scored(tmp_path: Path) -> None:
    fan, folder = REAL / "dev_data/fan", tmp_path / "data/fan"
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
    normals = sorted((fan / "train").glob("*.wav"))
    for i, path in enumerate(normals):
        (folder / ("test" if i >= 6 else "train") / path.name).symlink_to(path)
    (anomaly,) = (fan / "test").glob("*.wav")
    for i in range(2):  # two to halve: one is a copy under the next name
        (folder / "test" / f"anomaly_id_00_{i:08d}.wav").symlink_to(anomaly)
    settings = {"clip_s": 10.0, "machines": ("fan",), "noise": str(fan / "train")}
    corpus = open_corpus(config(tmp_path / "data", 2020, **settings), tmp_path)
    assert Counter((c.name, c.split, c.label) for c in corpus.clips if c.role == "machine") == {
        ("fan/id_00", "train", "normal"): 6,
        ("fan/id_00", "test", "normal"): 2,
        ("fan/id_00", "test", "anomaly"): 2,
    }
    assert corpus.roles.search == corpus.roles.confirm == ("fan/id_00",)
    assert any("held-out" in note for note in corpus.notes)
    written_T, rate = soundfile.read(normals[0], dtype="float64")
    assert rate == 16_000
    wave_T = written_T[:160_000] - written_T[:160_000].mean()
    np.testing.assert_allclose(corpus.waves_NT[0], wave_T / np.sqrt(np.mean(wave_T**2)), atol=1e-4)
