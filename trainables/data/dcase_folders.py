"""What lies in the folders of a DCASE year: every file with what its name, its table and its label say of it.

Folders are looked for where the archives unpack and where the baseline keeps them. Nothing is decoded. What the year's
score needs and is not there is a ``UserError`` with the record that holds it and the place where it is expected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainables.data.corpus import Clip
from trainables.data.dcase_labels import Labels, read_attributes, read_labels
from trainables.data.dcase_names import YEARS, Facts, part, read_name, read_supplemental, record, unit
from trainables.errors import UserError
from trainables.settings import CorpusConfig

TESTS = ("test", "source_test", "target_test")


@dataclass(frozen=True, kw_only=True)
class File:
    """A clip's file, and whether it is of the development set."""

    clip: Clip
    path: Path
    dev: bool


class Listing:
    """What lies below a root."""

    def __init__(self, config: CorpusConfig) -> None:
        assert config.year is not None
        self.year, self.root = config.year, Path(str(config.root))
        self.facts = YEARS[self.year]
        unknown = [name for name in config.machines if name not in self.facts.machines]
        if unknown:
            raise UserError(
                f"corpus.machines: DCASE {self.year} has no {unknown[0]!r}; allowed are "
                f"{', '.join(self.facts.machines)}"
            )
        self.wanted = config.machines or self.facts.machines
        self.labels: Labels = {}
        if config.ground_truth is not None:
            self.labels = read_labels(config.ground_truth, self.year)

    def read(self) -> tuple[list[File], list[str], list[File], list[str]]:
        """Clips for banks and queries, a note on files without labels, supplemental clips, and their note.

        Raises:
            UserError: a machine or one of its folders is missing, or a file's name is none of the year's.
        """
        self._refuse_strangers()
        folders = {name: self._folders(name) for name in self.wanted}
        self._require(folders)
        files, supplements = [], []
        mute: Counter[str] = Counter()
        seen: dict[tuple[str, str, str], Path] = {}
        for machine, found in folders.items():
            attributes = self._attributes(found)
            for folder in found:
                for place, path in _wavs(folder, ("train", *self._tests(folder))):
                    twin = seen.setdefault((machine, place, path.name), path)
                    if twin != path:
                        raise UserError(
                            f"{self._origin(path)}: is there twice, also as {self._origin(twin)}; remove one copy of "
                            "the set"
                        )
                    facts = self._look(machine, place, path, attributes)
                    if place != "train" and not (facts.label and facts.domain):
                        mute[machine] += 1
                        continue
                    files.append(self._file(machine, path, facts, "train" if place == "train" else "test"))
                for _, path in _wavs(folder, ("supplemental",)):
                    role, facts = read_supplemental(path.name, self._origin(path))
                    supplements.append(self._file(machine, path, facts, "supplemental", role))
        self._require_whole(files, mute)
        without = [name for name in self.wanted if mute[name]]
        notes = []
        if without:
            notes.append(
                f"No labels for {sum(mute.values())} test clips of {', '.join(without)}: they are left out; "
                "corpus.ground_truth takes the evaluator's files."
            )
        partial = []
        if len(self.wanted) < len(self.facts.machines):
            partial.append(
                f"Only {len(self.wanted)} of {len(self.facts.machines)} machines of DCASE {self.year} are used "
                "(corpus.machines): the scores are not those of the challenge."
            )
        return files, [*partial, *self._absent(files)], supplements, notes

    def _absent(self, files: Sequence[File]) -> Iterator[str]:
        """Sentences about ids or sections of the development set that are not there."""
        if self.facts.dev_parts is None:
            return
        there = {file.clip.name for file in files}
        for machine in self.wanted:
            parts = self.facts.dev_parts.get(machine, self.facts.dev_parts[""])
            gone = [part(self.year, n) for n in parts if unit(machine, self.year, n) not in there]
            if gone:
                yield f"{machine}: no {', '.join(gone)}; the scores are not those of the challenge."

    def _places(self) -> list[Path]:
        inner = ("", "dev_data", "dev_data/raw", "eval_data", "eval_data/raw")
        return [self.root / base / place for base in ("", f"dcase{self.year}t2") for place in inner]

    def _refuse_strangers(self) -> None:
        """A machine of another year in these places: names and sections of years are too alike to tell otherwise."""
        for place in self._places():
            for folder in sorted(place.iterdir()) if place.is_dir() else ():
                years = [str(year) for year, facts in YEARS.items() if folder.name in facts.machines]
                if years and folder.name not in self.facts.machines and (folder / "train").is_dir():
                    raise UserError(
                        f"corpus.year = {self.year}: {folder} is a machine of {', '.join(years)}; correct the year, or "
                        "move the folder away"
                    )

    def _folders(self, machine: str) -> list[Path]:
        found = []
        for place in self._places():
            for name in (f"{machine}_r2", machine):  # archives that replaced a faulty one (2026)
                folder = place / name
                if any((folder / inner).is_dir() for inner in ("train", "test_rename", *TESTS)):
                    found.append(folder)
                    break
        return found

    def _require(self, folders: dict[str, list[Path]]) -> None:
        there = [name for name, found in folders.items() if found]
        numbers = self.facts.records
        for name, found in folders.items():
            only_eval = name not in self.facts.dev
            if found or (only_eval and not any(n in there for n in self.facts.evaluation)):
                continue
            if only_eval:
                where = f"{record(numbers[1])} (train) and {record(numbers[2])} (test)"
            else:
                where = record(numbers[0])
            chosen = [n for n in there if n != name]
            some = f", or use some machines only: --set corpus.machines={','.join(chosen)}" if chosen else ""
            raise UserError(
                f"corpus.root = {str(self.root)!r}: no {name}/train of DCASE {self.year}; it is in {where}; unpack "
                f"it so that {self.root / ('eval_data' if only_eval else 'dev_data') / name / 'train'} is there{some}"
            )

    def _tests(self, folder: Path) -> tuple[str, ...]:
        """The folders of test clips; the baseline's copies with labelled names take the place of the plain ones."""
        return ("test_rename",) if (folder / "test_rename").is_dir() else TESTS

    def _look(self, machine: str, place: str, path: Path, attributes: dict[str, str]) -> Facts:
        domain = place.removesuffix("_test") if place in TESTS[1:] else ""
        facts = read_name(path.name, self.year, self._origin(path), domain)
        if self.facts.dev_parts is None and facts.section:
            raise UserError(
                f"{self._origin(path)}: section {facts.section:02d}, where machines of DCASE {self.year} have only "
                "section 00; correct corpus.year"
            )
        if place == "train":
            if facts.label == "anomaly" or not facts.domain:
                raise UserError(
                    f"{self._origin(path)}: a clip for training is normal and of one domain; remove the file"
                )
            facts = replace(facts, label="normal")
        elif not facts.label:
            facts = self.labels.get((machine, path.name), facts)
        return replace(facts, attributes=facts.attributes or attributes.get(path.name, ""))

    def _attributes(self, folders: list[Path]) -> dict[str, str]:
        tables = [path for folder in folders for path in sorted(folder.glob("attributes_*.csv"))]
        return {name: text for path in tables for name, text in read_attributes(path).items()}

    def _file(self, machine: str, path: Path, facts: Facts, split: str, role: str = "machine") -> File:
        clip = Clip(
            role=role,
            name=unit(machine, self.year, facts.section),
            split=split,
            recording=self._origin(path),
            origin=self._origin(path),
            kind="stationary" if role == "noise" else "",
            label=facts.label,
            domain=facts.domain,
            section=part(self.year, facts.section),
            attributes=facts.attributes,
        )
        return File(clip=clip, path=path, dev=self.facts.is_dev(machine, facts.section))

    def _origin(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    def _require_whole(self, files: Sequence[File], mute: Counter[str]) -> None:
        """Every unit has a bank, and those with test clips all that the year's score needs."""
        units: dict[str, list[File]] = {}
        for file in files:
            units.setdefault(file.clip.name, []).append(file)
        for name, mine in units.items():
            have = {(f.clip.split, f.clip.label, f.clip.domain) for f in mine}
            domains = ("source",) if self.year == 2020 else ("source", "target")
            needed = [("train", "normal", "source")]
            machine, dev = name.partition("/")[0], mine[0].dev
            if any(split == "test" for split, _, _ in have) or (dev and not mute[machine]):
                needed += [("test", "normal", domain) for domain in domains]
                needed += [("test", "anomaly", domain) for domain in (domains if self.year == 2021 else ())]
                if not any(label == "anomaly" for _, label, _ in have):
                    needed.append(("test", "anomaly", "source"))
            lacking = [item for item in needed if item not in have]
            if lacking:
                split, label, domain = lacking[0]
                numbers = self.facts.records
                source = numbers[0] if dev else numbers[1 if split == "train" else 2]
                kind = f"{domain} {label}" if self.year != 2020 else label
                raise UserError(
                    f"{name}: no {kind} clips in {split} below {self.root}, which the score of DCASE {self.year} "
                    f"needs; unpack them from {record(source)}"
                )


def _wavs(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, Path]]:
    for name in names:
        if (folder / name).is_dir():
            for path in sorted((folder / name).iterdir()):
                if path.suffix.lower() == ".wav" and not path.name.startswith("."):
                    yield name, path
