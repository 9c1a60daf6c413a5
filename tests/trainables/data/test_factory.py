"""The built-in factory: the same clips for the same seed, everywhere, until ``REVISION`` says otherwise."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trainables.data import designs, factory
from trainables.data.corpus import normalise, open_source
from trainables.data.factory import factory_source
from trainables.data.physics import render
from trainables.errors import UserError
from trainables.settings import CorpusConfig

ROOT = Path(__file__).resolve().parents[3]
CONFIG = CorpusConfig(clips_per_machine=8, clip_s=1.0, seed=3)
SAMPLES, RATE_HZ = 16_000, 16_000

# Made by `python tests/trainables/data/test_factory.py`. Change them together with factory.REVISION, never alone.
GOLDEN_REVISION = 5
GOLDEN: dict[str, list[float]] = {
    "fan/unit00_train_target_normal": [0.80073, 0.36168, 0.29563],
    "gearbox/unit00_train_target_normal": [0.81199, 0.2981, 0.27122],
    "bearing/unit00_train_target_normal": [0.78889, 0.83858, 0.31838],
    "slider/unit00_train_target_normal": [0.70056, 0.54082, 0.61012],
    "valve/unit00_train_target_normal": [0.5071, 0.4104, 11.44022],
    "pump/unit00_train_target_normal": [0.61759, 0.239, 1.1402],
    "compressor/unit00_train_target_normal": [0.69962, 0.22894, 0.63635],
    "motor/unit00_train_target_normal": [0.80144, 0.29243, 0.29157],
    "blower/unit00_train_target_normal": [0.79772, 0.2594, 0.29962],
    "blower/unit00_test_source_raceway": [0.77657, 0.63478, 0.3623],
    "blower/unit00_test_source_imbalance": [0.7917, 0.22871, 0.30891],
    "blower/unit00_test_source_looseness": [0.79358, 0.23156, 0.31713],
    "reducer/unit00_train_target_normal": [0.81418, 0.41588, 0.26431],
    "reducer/unit00_test_source_chipped": [0.73064, 0.41129, 0.68416],
    "reducer/unit00_test_source_wear": [0.75646, 0.3542, 0.39655],
    "reducer/unit00_test_source_raceway": [0.76349, 0.70613, 0.44444],
    "spindle/unit00_train_target_normal": [0.79338, 1.11482, 0.31137],
    "spindle/unit00_test_source_raceway": [0.78434, 0.98538, 0.33532],
    "spindle/unit00_test_source_imbalance": [0.7935, 1.05553, 0.31361],
    "spindle/unit00_test_source_squeal": [0.79196, 1.05937, 0.31404],
    "conveyor/unit00_train_target_normal": [0.72766, 0.65636, 0.49334],
    "conveyor/unit00_test_source_squeal": [0.75681, 0.68191, 0.42841],
    "conveyor/unit00_test_source_raceway": [0.73238, 0.70748, 0.51399],
    "conveyor/unit00_test_source_weak": [0.7363, 0.65943, 0.43666],
    "relay/unit00_train_target_normal": [0.52995, 0.47808, 4.10784],
    "relay/unit00_test_source_bounce": [0.53351, 0.47718, 1.77253],
    "relay/unit00_test_source_weak": [0.53275, 0.40012, 4.97959],
    "relay/unit00_test_source_sluggish": [0.48164, 0.43557, 1.69345],
    "mixer/unit00_train_target_normal": [0.80655, 0.53853, 0.28324],
    "mixer/unit00_test_source_wear": [0.77866, 0.45391, 0.34368],
    "mixer/unit00_test_source_raceway": [0.71324, 0.69566, 0.50427],
    "mixer/unit00_test_source_imbalance": [0.79483, 0.48606, 0.31744],
    "vacuum/unit00_train_target_normal": [0.7892, 0.36193, 0.31895],
    "vacuum/unit00_test_source_raceway": [0.77604, 0.89732, 0.36591],
    "vacuum/unit00_test_source_imbalance": [0.7871, 0.33895, 0.33221],
    "vacuum/unit00_test_source_looseness": [0.79368, 0.32781, 0.31101],
    "winch/unit00_train_target_normal": [0.80872, 0.45798, 0.27726],
    "winch/unit00_test_source_chipped": [0.72759, 0.41344, 0.64501],
    "winch/unit00_test_source_wear": [0.80998, 0.62293, 0.27811],
    "winch/unit00_test_source_raceway": [0.69723, 0.82095, 0.59219],
    "press/unit00_train_target_normal": [0.73699, 0.38272, 0.47615],
    "press/unit00_test_source_leak": [0.68586, 0.48844, 0.61104],
    "press/unit00_test_source_bounce": [0.77365, 0.31366, 0.35391],
    "press/unit00_test_source_weak": [0.65406, 0.32152, 0.73798],
    "saw/unit00_train_target_normal": [0.70205, 0.60726, 0.54762],
    "saw/unit00_test_source_squeal": [0.70646, 0.60271, 0.66048],
    "saw/unit00_test_source_raceway": [0.73783, 0.5902, 0.49868],
    "saw/unit00_test_source_weak": [0.72753, 0.54246, 0.53349],
    "stepper/unit00_train_target_normal": [0.55252, 0.2812, 3.18579],
    "stepper/unit00_test_source_bounce": [0.58434, 0.30179, 1.58399],
    "stepper/unit00_test_source_weak": [0.52617, 0.21641, 4.41978],
    "stepper/unit00_test_source_sluggish": [0.56657, 0.28039, 1.16213],
    "forge_idle/test": [0.7999, 0.33298, 0.29115],
    "forge_busy/test": [0.77419, 0.33902, 0.42605],
    "dock_idle/test": [0.79926, 0.5546, 0.29546],
    "dock_busy/test": [0.79781, 0.40869, 0.30308],
    "welding_idle/test": [0.79738, 0.33621, 0.29875],
    "welding_busy/test": [0.79003, 0.44624, 0.32624],
    "assembly_idle/test": [0.79842, 0.77812, 0.29493],
    "assembly_busy/test": [0.79864, 0.64313, 0.2967],
}


def wave_of(source, index):
    return normalise(source.render(index), source.clips[index].origin, SAMPLES)


def fingerprints():
    """Mean size, mean step and 4th moment of a clip of every machine type, most faults and every environment."""
    source, found = factory_source(CONFIG), {}
    for index, clip in enumerate(source.clips):
        name, number = clip.origin.rsplit("_", 1)
        fault = (clip.label, clip.domain) == ("anomaly", "source") and int(number) < 3
        first = clip.origin.endswith("_0000") and (clip.split, clip.domain) in (
            ("test", ""),
            ("train", "target"),
        )
        if fault or first:
            wave = wave_of(source, index).astype(np.float64)
            stats = np.abs(wave).mean(), np.abs(np.diff(wave)).mean(), (wave**4).mean() / 10
            found[name] = [round(float(value), 5) for value in stats]
    return found


def test_clips_sound_as_they_did():
    advice = "if that is meant, bump factory.REVISION and renew the numbers (see the comment on them)"
    assert factory.REVISION == GOLDEN_REVISION, f"factory.REVISION has changed; {advice}"
    found = fingerprints()
    assert found.keys() == GOLDEN.keys(), f"other clips are listed; {advice}"
    changed = [n for n, stats in GOLDEN.items() if not np.allclose(found[n], stats, rtol=0, atol=1e-4)]
    assert not changed, f"{len(changed)} of {len(GOLDEN)} clips sound different ({changed[0]}); {advice}"


PRINT = """
import hashlib, json, sys
from trainables.data.factory import factory_source
from trainables.settings import CorpusConfig
source = factory_source(CorpusConfig(clips_per_machine=8, clip_s=1.0, seed=3))
picked = range(0, len(source.clips), 100)
print(json.dumps([hashlib.sha256(source.render(i).tobytes()).hexdigest() for i in reversed(picked)][::-1]))
"""


def test_another_process_hears_the_same_in_any_order():
    done = subprocess.run([sys.executable, "-c", PRINT], cwd=ROOT, capture_output=True, text=True, check=True)
    source = factory_source(CONFIG)
    here = [source.render(i) for i in range(0, len(source.clips), 100)]
    assert json.loads(done.stdout) == [hashlib.sha256(wave.tobytes()).hexdigest() for wave in here]
    assert len({wave.tobytes() for wave in here}) == len(here)


def test_a_seed_changes_clips_and_not_machines():
    one, other = factory_source(CONFIG), factory_source(CorpusConfig(clips_per_machine=8, clip_s=1.0, seed=4))
    assert one.clips == other.clips
    assert one.identity != other.identity
    assert not np.array_equal(one.render(0), other.render(0))
    assert designs.design("rotor", "fan") == designs.design("rotor", "fan")
    assert designs.design("rotor", "fan") != designs.design("rotor", "blower")


def test_roles():
    roles = factory_source(CONFIG).roles
    assert len({*roles.train, *roles.search, *roles.confirm}) >= 10
    assert len(roles.search) >= 6
    assert len(roles.confirm) >= 4
    assert not {*roles.train} & {*roles.search}
    assert not {*roles.train, *roles.search} & {*roles.confirm}
    assert {*roles.train, *roles.search, *roles.confirm} == set(designs.TYPES)
    for split in (roles.train, roles.search):
        assert len({designs.TYPES[name] for name in split}) >= 6  # of seven families


def test_what_there_is_of_each_machine():
    source = factory_source(CONFIG)
    for name in designs.TYPES:
        clips = [c for c in source.clips if c.name == name]
        assert {c.domain for c in clips} == {"source", "target"}
        bank = [c.domain for c in clips if c.split == "train"]
        assert bank.count("source") > bank.count("target") >= 3
        if name in source.roles.train:
            assert {c.label for c in clips} == {"normal"}
            continue
        for domain in ("source", "target"):
            queries = [c for c in clips if c.split == "test" and c.domain == domain]
            assert {c.label for c in queries} == {"normal", "anomaly"}
            kinds = {c.origin.split("_")[-2] for c in queries if c.label == "anomaly"}
            assert kinds == set(list(designs.faults(designs.TYPES[name], name))[:3])
    assert all(c.recording == c.origin for c in source.clips)
    assert len({c.origin for c in source.clips}) == len(source.clips)


def test_noise_is_enough_and_comes_as_environments():
    source = factory_source(CONFIG)
    for kind in ("stationary", "nonstationary"):
        assert len({c.name for c in source.clips if c.kind == kind}) >= 3
    machines = sum(c.role == "machine" and c.name in source.roles.train for c in source.clips)
    assert sum(c.role == "noise" and c.split == "train" for c in source.clips) >= machines
    scored = max(
        sum(c.name == name for c in source.clips) for name in (*source.roles.search, *source.roles.confirm)
    )
    for name in {c.name for c in source.clips if c.role == "noise"}:
        assert sum(c.name == name and c.split == "test" for c in source.clips) >= scored


@pytest.mark.parametrize("name", [*designs.SEARCH, *designs.CONFIRM])
def test_every_fault_changes_the_sound(name):
    """Same random numbers, so only the fault differs; a level or a rounding would not pass."""
    family = designs.TYPES[name]
    machine, kinds = designs.design(family, name), designs.faults(family, name)
    assert len(kinds) >= 3

    def heard(design):
        rng = np.random.default_rng(1)
        wave = render(design, rng, speed=1.0, load=1.0, num_samples=SAMPLES, rate_hz=RATE_HZ)
        return normalise(wave, name, SAMPLES).reshape(40, -1)

    def spectrum(wave):
        return np.log(np.abs(np.fft.rfft(wave * np.hanning(wave.shape[1]))).mean(0) + 1e-2)

    healthy = heard(machine)
    assert np.array_equal(healthy, heard(machine))
    for kind, fault in kinds.items():
        broken = heard(fault(machine))
        assert np.abs(broken - healthy).mean() > 0.05, kind
        assert np.abs(spectrum(broken) - spectrum(healthy)).max() > 0.1, kind


def test_busy_places_are_less_steady_than_idle_ones():
    source = factory_source(CONFIG)

    def unrest(name):
        waves = [wave_of(source, i) for i, c in enumerate(source.clips) if c.name == name][:6]
        levels = [np.log(np.square(wave).reshape(20, -1).mean(1)) for wave in waves]
        return np.mean([level.std() for level in levels])

    for place in designs.PLACES:
        assert unrest(f"{place}_busy") > 1.2 * unrest(f"{place}_idle"), place


def test_clips_are_finite_float32_of_the_asked_length_at_any_rate():
    for rate_hz, clip_s in ((16_000, 0.4), (8_000, 1.0), (44_100, 0.1)):
        source = open_source(CorpusConfig(clips_per_machine=8, sample_rate_hz=rate_hz, clip_s=clip_s))
        for index in range(0, len(source.clips), 97):
            wave = source.render(index)
            assert wave.shape == (round(rate_hz * clip_s),)
            assert wave.dtype == np.float32
            assert np.isfinite(wave).all()


def test_too_few_clips_are_refused():
    with pytest.raises(UserError, match=r"corpus.clips_per_machine = 7: at least 8"):
        factory_source(CorpusConfig(clips_per_machine=7))


if __name__ == "__main__":
    print(f"GOLDEN_REVISION = {factory.REVISION}")
    print("GOLDEN: dict[str, list[float]] = {")
    print("\n".join(f'    "{name}": {stats},' for name, stats in fingerprints().items()) + "\n}")
