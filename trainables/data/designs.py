"""The machines, faults and noise environments of the built-in factory.

Seven families of machines; a type is one draw of its family's parameters, fixed by the type's name alone, so that
``fan`` is the same fan in every corpus whatever its seed. Faults change a design the way wear changes a machine:
they add or alter excitation, never level (clips are level-normalised). A place is likewise one draw of a
process with fixed parameters: idle, it makes stationary noise; busy, events come on top of that background.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from trainables.data.physics import Design, Flow, Knocks, Tones, band_noise, render
from trainables.settings import Band

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "rotor": ("fan", "blower", "vacuum"),
    "gear": ("gearbox", "reducer", "winch"),
    "bearing": ("bearing", "spindle"),
    "stroke": ("pump", "compressor", "press"),
    "click": ("valve", "relay", "stepper"),
    "friction": ("slider", "conveyor", "saw"),
    "electric": ("motor", "mixer"),
}
TYPES: Mapping[str, str] = {name: family for family, names in FAMILIES.items() for name in names}
TRAIN = ("fan", "gearbox", "bearing", "slider", "valve", "pump", "compressor", "motor")
SEARCH = ("blower", "reducer", "spindle", "conveyor", "relay", "mixer")
CONFIRM = ("vacuum", "winch", "press", "saw", "stepper")
PLACES: Mapping[str, str] = {
    "forge": "strikes",
    "dock": "passing",
    "welding": "bursts",
    "assembly": "signals",
}

EVENT_LEVEL = 1.2  # of an event against the background, both about unit RMS
Fault = Callable[[Design], Design]


def name_rng(*name: object) -> np.random.Generator:
    """A generator that depends on the given names and numbers only, the same on every machine."""
    return np.random.default_rng([zlib.crc32(str(part).encode()) for part in name])


def design(family: str, name: str) -> Design:
    """The machine called ``name`` of a family; the parameters are drawn in a fixed order from the name alone."""
    rng = name_rng("design", family, name)
    u, many = rng.uniform, tuple(rng.uniform(350, 5500, 3))
    body = tuple((float(hz), float(u(1.0, 4.0))) for hz in many)
    if family == "rotor":
        shaft, blades = u(22, 60), int(rng.integers(3, 9))
        air = Flow(
            band_hz=(u(80, 250), u(1200, 4000)), level=u(0.5, 0.9), am_ratio=blades, am_depth=u(0.1, 0.3)
        )
        passing = Tones(ratio=blades, level=u(0.4, 0.8), num_harmonics=8)
        turning = Tones(ratio=1, level=0.15, num_harmonics=4)
        return Design(shaft_hz=shaft, tones=(passing, turning), flows=(air,), body=body)
    if family == "gear":
        shaft, teeth = u(8, 20), int(rng.integers(17, 43))
        mesh = Tones(ratio=teeth, level=u(0.5, 0.9), num_harmonics=5, am_ratio=1, am_depth=u(0.1, 0.3))
        second = Tones(ratio=teeth * u(0.21, 0.37), level=u(0.2, 0.5), num_harmonics=6)
        oil = Flow(band_hz=(100, 3000), level=0.35)
        return Design(shaft_hz=shaft, tones=(mesh, second), flows=(oil,), body=body)
    if family == "bearing":
        shaft = u(15, 45)
        turning = Tones(ratio=1, level=u(0.3, 0.6), num_harmonics=10, decay=u(0.6, 1.2))
        rolling = Flow(band_hz=(u(600, 1500), u(3000, 6000)), level=u(0.5, 0.8), am_ratio=1, am_depth=0.2)
        return Design(shaft_hz=shaft, tones=(turning,), flows=(rolling,), body=body)
    if family == "stroke":
        shaft = u(5, 12)
        strike = Knocks(ratio=1, level=u(1.0, 1.6), ring_hz=u(250, 900), ring_s=u(0.008, 0.02))
        suck = Flow(band_hz=(u(200, 500), u(1500, 3500)), level=u(0.4, 0.7), am_ratio=1, am_depth=0.8)
        hum = Tones(ratio=u(4, 9), level=u(0.3, 0.6), num_harmonics=5)
        return Design(shaft_hz=shaft, tones=(hum,), knocks=(strike,), flows=(suck,), body=body)
    if family == "click":
        shaft = u(1.8, 4.0)
        opening = Knocks(ratio=1, level=u(1.6, 2.4), ring_hz=u(1200, 3000), ring_s=u(0.003, 0.008))
        closing = Knocks(ratio=1, level=u(0.9, 1.4), ring_hz=u(600, 1500), ring_s=u(0.006, 0.014))
        idle = Flow(band_hz=(u(100, 300), u(1500, 5000)), level=u(0.2, 0.3))
        coil = Tones(ratio=u(20, 40), level=u(0.08, 0.2), num_harmonics=4)
        return Design(shaft_hz=shaft, tones=(coil,), knocks=(opening, closing), flows=(idle,), body=body)
    if family == "friction":
        shaft = u(1.2, 3.5)
        rub = Flow(band_hz=(u(400, 1200), u(2500, 5500)), level=u(0.6, 0.9), am_ratio=2, am_depth=u(0.5, 0.8))
        drive = Tones(ratio=u(30, 90), level=u(0.3, 0.6), num_harmonics=6, am_ratio=1, am_depth=0.4)
        stop = Knocks(ratio=2, level=u(0.5, 1.0), ring_hz=u(300, 1200), ring_s=0.01)
        return Design(shaft_hz=shaft, tones=(drive,), knocks=(stop,), flows=(rub,), body=body)
    if family == "electric":
        shaft = u(23, 30)
        mains = Tones(ratio=100 / shaft, level=u(0.5, 0.8), num_harmonics=9, decay=u(0.5, 1.0))
        pwm = Tones(
            ratio=u(2400, 4200) / shaft, level=u(0.1, 0.25), num_harmonics=2, am_ratio=4, am_depth=0.5
        )
        cooling = Flow(band_hz=(150, u(1500, 4000)), level=u(0.3, 0.5))
        return Design(shaft_hz=shaft, tones=(mains, pwm), flows=(cooling,), body=body)
    raise ValueError(f"no family {family!r}")


def faults(family: str, name: str) -> dict[str, Fault]:
    """The kinds of fault of a machine type (at least three) by name, each as a change of its design."""
    rng = name_rng("faults", family, name)
    u = rng.uniform
    ring, ratio, hiss = u(2500, 5500), u(3.1, 7.9), u(2500, 4500)
    slow = family in ("stroke", "click", "friction")  # these turn slowly: faults repeat faster than the shaft

    def raceway(d: Design) -> Design:
        hits = Knocks(ratio=ratio * (6 if slow else 1), level=0.55, ring_hz=ring, ring_s=0.002, am_depth=0.5)
        return replace(d, knocks=(*d.knocks, hits))

    def imbalance(d: Design) -> Design:
        tones = tuple(replace(t, am_ratio=1.0, am_depth=0.75) for t in d.tones)
        return replace(d, tones=(*tones, Tones(ratio=8 if slow else 1, level=0.45, num_harmonics=4)))

    def leak(d: Design) -> Design:
        jet = Flow(band_hz=(hiss, hiss + 1800), level=0.4, am_ratio=1, am_depth=0.3)
        return replace(d, flows=(*d.flows, jet))

    def chipped(d: Design) -> Design:
        tooth = Knocks(ratio=1, level=1.0, ring_hz=0.4 * ring, ring_s=0.006)
        return replace(d, knocks=(*d.knocks, tooth))

    def looseness(d: Design) -> Design:
        halves = (replace(t, ratio=t.ratio / 2, num_harmonics=2 * t.num_harmonics) for t in d.tones)
        return replace(d, tones=tuple(halves))

    def wear(d: Design) -> Design:
        rough = (replace(t, decay=t.decay * 0.35, am_depth=0.5, am_ratio=2.0) for t in d.tones)
        return replace(d, tones=tuple(rough))

    def squeal(d: Design) -> Design:
        tone = Tones(
            ratio=hiss / d.shaft_hz, level=0.35, num_harmonics=1, wobble=60.0, am_ratio=1, am_depth=0.6
        )
        return replace(d, tones=(*d.tones, tone))

    def bounce(d: Design) -> Design:
        often = (replace(k, ratio=3 * k.ratio, level=0.7 * k.level, jitter=0.08) for k in d.knocks)
        return replace(d, knocks=tuple(often))

    def weak(d: Design) -> Design:
        dull = (replace(k, missing=0.3, ring_hz=0.55 * k.ring_hz) for k in d.knocks)
        return replace(d, knocks=tuple(dull))

    def sluggish(d: Design) -> Design:
        slack = (replace(k, ring_s=3.5 * k.ring_s, jitter=0.06) for k in d.knocks)
        return replace(d, knocks=tuple(slack))

    table: Mapping[str, tuple[Fault, ...]] = {
        "rotor": (raceway, imbalance, looseness),
        "gear": (chipped, wear, raceway),
        "bearing": (raceway, imbalance, squeal),
        "stroke": (leak, bounce, weak),
        "click": (bounce, weak, sluggish, leak),
        "friction": (squeal, raceway, weak),
        "electric": (wear, raceway, imbalance, looseness),
    }
    return {f.__name__: f for f in table[family]}


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place in the factory: a steady background, and the events that come on top when people work there.

    The background is a hum (``background``) in noise between ``band_hz`` that falls as ``1 / f ** tilt`` in power.
    ``events`` are strikes, passing, bursts or signals, about ``rate_hz`` a second, ringing at ``ring_hz`` for
    ``ring_s``; ``engine`` is what passes.
    """

    background: Design
    band_hz: Band
    tilt: float
    events: str
    ring_hz: float
    ring_s: float
    rate_hz: float
    engine: Design


def place(name: str) -> Place:
    """The place called ``name``; its parameters depend on the name alone."""
    rng = name_rng("place", name)
    u = rng.uniform
    hum = Tones(ratio=u(1, 4), level=u(0.2, 0.6), num_harmonics=7, decay=0.8)
    body = tuple((float(hz), float(u(1, 3))) for hz in rng.uniform(200, 4000, 2))
    return Place(
        background=Design(shaft_hz=u(24, 60), tones=(hum,), body=body),
        band_hz=(u(40, 250), u(2500, 6500)),
        tilt=u(0.3, 1.2),
        events=PLACES.get(name) or str(rng.choice(sorted(PLACES.values()))),
        ring_hz=u(500, 2500),
        ring_s=u(0.02, 0.06),
        rate_hz=u(1.5, 3.0),
        engine=Design(shaft_hz=u(18, 40), tones=(Tones(ratio=2, level=0.7, num_harmonics=12, decay=0.7),)),
    )


def noise(here: Place, rng: np.random.Generator, *, busy: bool, num_samples: int, rate_hz: int) -> np.ndarray:
    """A clip [T] of the place, float32, any level: idle (stationary) or busy (events over the same background)."""
    wave = band_noise(rng, num_samples, rate_hz, here.band_hz, here.tilt)
    wave = wave + render(here.background, rng, speed=1, load=1, num_samples=num_samples, rate_hz=rate_hz)
    if not busy:
        return wave
    t = np.arange(num_samples, dtype=np.float32) / rate_hz
    length_s = num_samples / rate_hz
    if here.events == "passing":
        centre, width, speed = rng.uniform(0, length_s), rng.uniform(0.4, 0.9), rng.uniform(0.8, 1.3)
        near = np.exp(-(((t - centre) / width) ** 2)).astype(np.float32)
        engine = render(here.engine, rng, speed=speed, load=1, num_samples=num_samples, rate_hz=rate_hz)
        tyres = band_noise(rng, num_samples, rate_hz, (80, 900), 0.5)
        return wave + EVENT_LEVEL * near * (engine + 0.6 * tyres)
    for _ in range(max(1, rng.poisson(here.rate_hz * length_s))):
        start, size = rng.uniform(-0.1, length_s), EVENT_LEVEL * rng.uniform(0.5, 1.5)
        age = t - np.float32(start)
        if here.events == "strikes":
            ring = np.exp(-age.clip(0) / here.ring_s) * np.sin(
                2 * np.pi * here.ring_hz * rng.uniform(0.9, 1.1) * age
            )
            wave += np.where(age > 0, 4 * size * ring, 0)
        elif here.events == "bursts":
            gate = (age > 0) & (age < rng.uniform(0.05, 0.25))
            low_hz = 1.2 * here.ring_hz
            wave += size * gate * band_noise(rng, num_samples, rate_hz, (low_hz, low_hz + 2500))
        else:
            gate = (age > 0) & (age < rng.uniform(0.15, 0.4))
            sweep = here.ring_hz * (1 + 0.3 * np.sin(2 * np.pi * 3 * age))
            wave += size * gate * np.sin(2 * np.pi * np.cumsum(sweep) / rate_hz)
    return wave.astype(np.float32)
