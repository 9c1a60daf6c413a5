"""What DCASE Task 2 published since 2020: machines, records, and what its file names say. Nothing here opens a file.

2020 names machines by id and knows one domain; from 2021 on there are sections with a source and a target domain, and
attributes in the names; from 2024 on some machines have none. Tests of the evaluation set carry no label in their
names. A name that does not fit its year is refused with a ``UserError`` that says what would.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from trainables.errors import UserError

NO_ATTRIBUTE = "noAttribute"


@dataclass(frozen=True, kw_only=True)
class Year:
    """Machines of the development and the evaluation set, and the Zenodo records that hold them.

    ``records``: development set, additional training set, evaluation set. ``dev_parts`` are the ids or sections of
    the development set where both sets share their machines, by machine (``""``: all others).
    """

    dev: tuple[str, ...]
    evaluation: tuple[str, ...]
    records: tuple[int, int, int]
    dev_parts: Mapping[str, tuple[int, ...]] | None = None

    @property
    def machines(self) -> tuple[str, ...]:
        """All machines, each once."""
        return tuple(dict.fromkeys((*self.dev, *self.evaluation)))

    def is_dev(self, machine: str, section: int) -> bool:
        """Whether an id or section belongs to the development set."""
        if self.dev_parts is None:
            return machine in self.dev
        return section in self.dev_parts.get(machine, self.dev_parts[""])


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_2020 = _names("ToyCar ToyConveyor fan pump slider valve")
_2021 = _names("ToyCar ToyTrain fan gearbox pump slider valve")
_2022 = _names("ToyCar ToyTrain bearing fan gearbox slider valve")
_SECTIONS = {"": (0, 1, 2)}

YEARS: Mapping[int, Year] = {
    2020: Year(
        dev=_2020,
        evaluation=_2020,
        records=(3678171, 3727685, 3841772),
        dev_parts={"": (0, 2, 4, 6), "ToyCar": (1, 2, 3, 4), "ToyConveyor": (1, 2, 3)},
    ),
    2021: Year(dev=_2021, evaluation=_2021, records=(4562016, 4660992, 4884786), dev_parts=_SECTIONS),
    2022: Year(dev=_2022, evaluation=_2022, records=(6355122, 6462969, 6586456), dev_parts=_SECTIONS),
    2023: Year(
        dev=_2022,
        evaluation=_names("ToyDrone ToyNscale ToyTank Vacuum bandsaw grinder shaker"),
        records=(7882613, 7830345, 7860847),
    ),
    2024: Year(
        dev=_2022,
        evaluation=_names(
            "3DPrinter AirCompressor BrushlessMotor HairDryer HoveringDrone RoboticArm Scanner ToothBrush ToyCircuit"
        ),
        records=(10902294, 11259435, 11363076),
    ),
    2025: Year(
        dev=_2022,
        evaluation=_names(
            "AutoTrash BandSealer CoffeeGrinder HomeCamera Polisher ScrewFeeder ToyPet ToyRCCar"
        ),
        records=(15097779, 15392814, 15519362),
    ),
    2026: Year(
        dev=_names("ToyCar ToyCarEmu bearingEmu fan gearboxEmu sliderEmu valveEmu"),
        evaluation=_names("BlowerDustCollector Sander SewingMachine ToothBrush ToyDrone"),
        records=(19336329, 20151556, 20437238),
    ),
}

_NAME_2020 = re.compile(r"(?:(?P<label>normal|anomaly)_)?id_(?P<section>\d\d)_\d{8}\.wav")
_NAME = re.compile(
    r"section_(?P<section>\d\d)(?:_(?P<domain>source|target))?(?:_(?P<split>train|test))?"
    r"(?:_(?P<label>normal|anomaly))?_\d{4,}(?:_(?P<attributes>.*))?\.wav"
)
# order and words differ between publications: section_00_machine_source_0000_noAttribute, section_00_noise_0001_, ...
_SUPPLEMENTAL = re.compile(
    r"section_(?P<section>\d\d)_(?P<words>[A-Za-z_]+?)_\d{4,}(?:_(?P<attributes>.*))?\.wav"
)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a file's name says; empty where it says nothing. ``section`` is the number of an id or section."""

    section: int
    label: str = ""
    domain: str = ""
    attributes: str = ""


def read_name(name: str, year: int, where: str, domain: str = "") -> Facts:
    """What the name of a clip for training or testing says.

    Args:
        where: the file, for the message.
        domain: what the folder says (``source_test`` of 2021).

    Raises:
        UserError: a name that the year does not have.
    """
    match = (_NAME_2020 if year == 2020 else _NAME).fullmatch(name)
    if match is None:
        example = (
            "normal_id_00_00000000.wav" if year == 2020 else "section_00_source_train_normal_0000_vel_6.wav"
        )
        raise UserError(
            f"{where}: not a file name of DCASE {year}, such as {example}; correct corpus.year or remove the file"
        )
    found = match.groupdict()
    return Facts(
        section=int(found["section"]),
        label=found["label"] or "",
        domain="source" if year == 2020 else found["domain"] or domain,
        attributes=tidy(found.get("attributes")),
    )


def read_supplemental(name: str, where: str) -> tuple[str, Facts]:
    """Role (``machine`` or ``noise``) and facts of a supplemental clip: clean machine sound, or its surroundings.

    Raises:
        UserError: a name that says neither.
    """
    match = _SUPPLEMENTAL.fullmatch(name)
    words = match["words"].split("_") if match else []
    roles = [
        role for role in ("machine", "noise") if role in words or (role == "machine" and "clean" in words)
    ]
    if match is None or len(roles) != 1:
        raise UserError(
            f"{where}: says neither machine nor noise, as in section_00_machine_source_0000_noAttribute.wav; rename "
            "or remove the file"
        )
    facts = Facts(
        section=int(match["section"]),
        label="normal",
        domain="target" if "target" in words else "source",
        attributes=tidy(match["attributes"]),
    )
    return roles[0], facts


def tidy(attributes: str | None) -> str:
    """Attributes as they are compared: empty where there are none."""
    text = (attributes or "").strip("_ ")
    return "" if text == NO_ATTRIBUTE else text


def unit(machine: str, year: int, section: int) -> str:
    """What is scored by itself: a machine; to 2022, each of its ids or sections (``fan/id_00``)."""
    return f"{machine}/{part(year, section)}" if YEARS[year].dev_parts is not None else machine


def part(year: int, section: int) -> str:
    """The id or section as the year writes it."""
    return f"{'id' if year == 2020 else 'section'}_{section:02d}"


def machine_type(unit_name: str) -> str:
    """What is split as a whole between search and confirm: the kind of machine, its emulation (2026) included."""
    return unit_name.partition("/")[0].removesuffix("Emu")


def record(number: int) -> str:
    """Where a set is found."""
    return f"zenodo.org/records/{number}"
