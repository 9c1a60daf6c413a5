"""A study as one frozen value: what is trained, what is searched, on what slots, and how it is confirmed.

``resolve`` puts command-line settings on top of a preset and hands back a value that has passed ``validate``; every
refusal is a ``UserError`` of one line that names key, value, what is allowed and a fix. ``identity`` is the digest of
what makes results differ: more trials, other slots, another name or a moved file continue the same study.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import search_spaces
from search_spaces.joint import SYSTEM
from study.limits import check_limits
from trainables.errors import UserError
from trainables.files import usable_path
from trainables.scoring.evaluation import Evaluation, evaluation
from trainables.settings import (
    CorpusConfig,
    EncoderConfig,
    Scalar,
    ScoringConfig,
    TrainingConfig,
    TrialConfig,
    build,
    digest,
    to_dict,
)
from trainables.settings import check_limits as check_trial


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How the space is searched. ``recipes`` are the published settings tried first; they count as trials.

    A trial is stopped early when it is not among the best ``1 / reduction_factor`` of those that got as far, but
    never before ``grace_epochs``. ``startup_trials`` of each system are drawn at random before TPE has something to
    learn from. ``fixed`` values are not searched: every trial but the recipes has them.
    """

    trials: int = 12
    seed: int = 0
    sampler: str = "tpe"
    startup_trials: int = 8
    grace_epochs: int = 2
    reduction_factor: int = 3
    recipes: tuple[str, ...] = ("paper", "alignment", "tagging", "denoising")
    fixed: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SlotsConfig:
    """``count`` trials at a time, each on ``workers`` processes with these resources (fractions share a device).

    With ``min_workers`` a slot is elastic: it has as many workers as there is room for, from that up to ``workers``.
    A trial fails when its workers died more than ``max_restarts`` times, or when it finishes no epoch for
    ``epoch_timeout_s``; the first epoch of a study includes what the cache holds afterwards.
    With ``system_metrics`` each epoch also tells what its process took of the machine.
    """

    count: int = 2
    workers: int = 1
    min_workers: int | None = None
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    max_restarts: int = 3
    start_timeout_s: float = 600.0
    epoch_timeout_s: float = 10_800.0
    system_metrics: bool = False

    @property
    def least(self) -> int:
        """How many workers a slot has at least."""
        return self.workers if self.min_workers is None else self.min_workers

    @property
    def elastic(self) -> bool:
        return self.least < self.workers

    @property
    def size(self) -> str:
        """How many workers a slot has, in words: ``2``, or ``1 to 2``."""
        return f"{self.least} to {self.workers}" if self.elastic else str(self.workers)


@dataclass(frozen=True, kw_only=True)
class ConfirmConfig:
    """``finalists`` of each system's search and ``recipes``, all trained with ``seeds`` seeds; 0 confirms nothing.

    Several finalists race: those whose ranking is open are trained with more seeds, ``most_seeds`` in all (by default
    twice ``seeds``; ``study/race.py``).
    """

    seeds: int = 3
    most_seeds: int | None = None
    finalists: int = 1
    recipes: tuple[str, ...] = ("paper",)


@dataclass(frozen=True, kw_only=True)
class YardstickConfig:
    """The challenge's own baseline beside teacher and oracle: an autoencoder trained for ``steps`` on every bank
    (``trainables/autoencoder.py``), on the machines of the ``search``, of ``confirm``, of both or of neither.
    """

    search: bool = False
    confirm: bool = False
    steps: int = 200


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """One study, complete. ``name`` and ``preset`` are labels: they change no result.

    ``system`` is one, or several between commas, which are searched together.
    """

    name: str = ""
    preset: str = ""
    system: str = "retain"
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    slots: SlotsConfig = field(default_factory=SlotsConfig)
    confirm: ConfirmConfig = field(default_factory=ConfirmConfig)
    yardstick: YardstickConfig = field(default_factory=YardstickConfig)

    @property
    def evaluation(self) -> Evaluation:
        """What its students are scored on, and beside which references."""
        return evaluation(self.corpus.year, self.scoring.bands_db)

    @property
    def most_seeds(self) -> int:
        """With how many seeds a finalist is confirmed at most."""
        most = 2 * self.confirm.seeds if self.confirm.most_seeds is None else self.confirm.most_seeds
        return most if self.num_finalists > 1 else self.confirm.seeds

    @property
    def num_finalists(self) -> int:
        """How many settings of the search are confirmed at most."""
        return self.confirm.finalists * len(search_spaces.systems_of(self.system))

    def trial(self, params: Mapping[str, Scalar], *, seed: int, split: str = "search") -> TrialConfig:
        """What one trial of this study trains and scores. In a study of several systems ``params`` name theirs."""
        values = dict(params)
        return TrialConfig(
            system=str(values.pop(SYSTEM, self.system)),
            params=values,
            seed=seed,
            split=split,
            corpus=self.corpus,
            encoder=self.encoder,
            training=self.training,
            scoring=self.scoring,
        )


# Cost, speed and labels. Numbers may differ in their last digits with device, threads and batch of scoring.
WITHOUT_EFFECT = (
    "name",
    "preset",
    "slots",
    "confirm",
    "search.trials",
    "training.compile",
    "training.checkpointing",
    "yardstick.search",
    "yardstick.confirm",
    "training.device",
    "training.threads",
    "scoring.batch_size",
    "scoring.feature_cache_gb",
)
# Counted by what they hold: a file may move, and another file under the same path is another study.
PATHS = ("corpus.manifest", "corpus.root", "corpus.ground_truth", "corpus.noise", "encoder.checkpoint")
WORDS = {"corpus.noise": ("auto", "supplemental", "factory")}  # what is no path although paths are allowed


def identity(config: StudyConfig) -> str:
    """Hexadecimal digest of everything that makes results differ: settings, files by their content, and the
    revisions of the built-in corpus and of the evaluation grid."""
    from trainables.data import factory
    from trainables.scoring import grid

    values = _flat(to_dict(config))
    kept = {k: v for k, v in values.items() if not k.startswith(tuple(f"{w}." for w in WITHOUT_EFFECT))}
    kept = {k: v for k, v in kept.items() if k not in WITHOUT_EFFECT}
    kept = {k: _content(Path(v)) if _is_path(k, v) else v for k, v in kept.items()}
    return digest(kept | {"factory": factory.REVISION, "grid": grid.REVISION})


def file_digests(config: StudyConfig | TrialConfig) -> dict[str, str]:
    """Digests of the files and folders that the settings name, by key."""
    groups = {"corpus": to_dict(config.corpus), "encoder": to_dict(config.encoder)}
    return {k: _content(Path(v)) for k, v in _flat(groups).items() if _is_path(k, v)}


def differences(stored: Mapping[str, Any], config: StudyConfig) -> list[str]:
    """What of ``stored`` (a study's JSON form) ``config`` changes, as ``key: before -> now``; no cost, no labels."""
    before, now = _flat(stored), _flat(to_dict(config))
    ignored = tuple(f"{w}." for w in WITHOUT_EFFECT)
    return [
        f"{key}: {json.dumps(before.get(key))} -> {json.dumps(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in WITHOUT_EFFECT and not key.startswith(ignored)
    ]


def _is_path(key: str, value: Any) -> bool:
    return key in PATHS and isinstance(value, str) and value not in WORDS.get(key, ("",))


def _content(path: Path) -> str:
    hasher = hashlib.sha256()
    if path.is_file():
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                hasher.update(block)
    elif path.is_dir():  # official folders: their files are fixed, so names and sizes tell them apart
        for file_path in sorted(p for p in path.rglob("*") if p.is_file()):
            hasher.update(f"{file_path.relative_to(path)} {file_path.stat().st_size}\n".encode())
    else:
        hasher.update(str(path).encode())  # preflight refuses it, and names it better than this could
    return hasher.hexdigest()


def resolve(
    preset: StudyConfig, settings: Sequence[str] = (), *, trials: int | None = None, name: str | None = None
) -> StudyConfig:
    """``preset`` with ``key=value`` settings on top (later ones win), named and validated.

    Values are JSON where the key does not hold text, and text as it is typed where it does (``null`` for none).

    Raises:
        UserError: an unknown key, a value of another type or out of range, or a name that is no safe file name.
    """
    changes: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: expected key=value, for example --set training.epochs=3")
        _assign(changes, key.strip(), text)
    if trials is not None:
        _assign(changes, "search.trials", str(trials))
    if name is not None:
        changes["name"] = name
    if "system" in changes:
        changes["system"] = ",".join(search_spaces.systems_of(changes["system"])) or changes["system"]
    if changes.get("system", preset.system) != preset.system:
        changes = _merge(_recipes_of(changes["system"], preset), changes)
    config = build(StudyConfig, _absolute(_merge(to_dict(preset), changes)))
    validate(config)
    if not config.name:
        config = dataclasses.replace(config, name=f"{config.preset or 'study'}-{identity(config)[:8]}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", config.name):
        raise UserError(
            f"name = {config.name!r}: allowed are up to 80 letters, digits, '.', '_' and '-', the first a letter or "
            "digit; for example --name first-try"
        )
    return config


def _recipes_of(system: str, preset: StudyConfig) -> dict[str, Any]:
    """A preset names recipes of its own system: another system's are all tried, and confirmed as the preset would."""
    if not set(search_spaces.systems_of(system)) <= set(search_spaces.SYSTEMS):
        return {}  # refused with the rest
    recipes = list(search_spaces.load(system).RECIPES)
    confirmed = recipes if len(preset.confirm.recipes) > 1 else search_spaces.papers(system)
    return {"search": {"recipes": recipes}, "confirm": {"recipes": confirmed}}


def _absolute(values: dict[str, Any]) -> dict[str, Any]:
    """Paths that mean the same in every process and from every folder the command is given in."""
    for key in PATHS:
        group, _, name = key.partition(".")
        path = values[group].get(name)
        if _is_path(key, path):
            values[group][name] = _usable_path(key, path)
    return values


def _usable_path(key: str, text: str) -> str:
    """``text`` absolute. Raises UserError where no file can have that name, or this one may not be read."""
    with usable_path(f"{key} = {text[:200]!r}: cannot be read"):
        path = os.path.abspath(Path(text).expanduser())
        if Path(path).is_file():
            open(path, "rb").close()
    return path


def _assign(changes: dict[str, Any], key: str, text: str) -> None:
    """Put ``key=text`` into the nested ``changes``, read as what the key holds."""
    if key == "preset":
        raise UserError(f"--set preset={text}: a preset is chosen with --preset {text}")
    cls: Any = StudyConfig
    parts = key.split(".")
    for depth, part in enumerate(parts):
        fields = _fields(cls)
        if part not in fields:
            raise _unknown(key, part, ".".join(parts[:depth]), fields)
        cls = fields[part]
        if issubclass(typing.get_origin(cls) or object, Mapping):
            break  # its names are free; ``build`` looks at the rest
        if not dataclasses.is_dataclass(cls) and depth + 1 < len(parts):
            raise UserError(f"{key}: {'.'.join(parts[: depth + 1])} is one value and has no keys below it")
    value = _read(text, cls)
    for part in reversed(parts):
        value = {part: value}
    changes.update(_merge(changes, value))


def _fields(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _unknown(key: str, part: str, group: str, allowed: Mapping[str, Any]) -> UserError:
    known = [k for k, _ in all_keys()]
    near = [k for k in known if k.endswith(f".{part}")] or difflib.get_close_matches(
        key, known, n=1, cutoff=0.0
    )
    names = sorted(f"{group}.{name}" if group else name for name in allowed if name != "preset")
    return UserError(
        f"{key}: unknown key; did you mean {' or '.join(near)}? Allowed here: {', '.join(names)}"
    )


def all_keys(cls: Any = StudyConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that --set takes, with its type."""
    for name, hint in _fields(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from all_keys(hint, f"{prefix}{name}.")
        elif f"{prefix}{name}" != "preset":
            yield f"{prefix}{name}", hint


def _read(text: str, hint: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if str in options:
        return None if text == "null" and type(None) in options else text
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        value = text
    if typing.get_origin(hint) is tuple and isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = _merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, below in value.items():
        flat.update(
            _flat(below, f"{prefix}{key}.") if isinstance(below, Mapping) else {f"{prefix}{key}": below}
        )
    return flat


def validate(config: StudyConfig) -> None:
    """Every value within its range, and every pair that must fit fits. Raises UserError for the first that does not."""
    check_limits(config)
    check_trial(config.trial({}, seed=config.search.seed))  # would refuse itself when it starts
