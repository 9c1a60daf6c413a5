"""What a trial is made of, as frozen values, and how such values are read, written and identified.

Every setting of the project is a frozen keyword-only dataclass. ``build`` reads one from plain JSON-like
data and refuses unknown keys and wrong types with a ``UserError`` that names the key, what is allowed and
the nearest valid key; ``check_limits`` refuses numbers out of range; ``to_dict`` writes a setting back; ``digest``
is its identity. Nothing here touches files.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import operator
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trainables.errors import UserError

T = TypeVar("T")
Scalar = str | int | float | bool | None
Band = tuple[float, float]
TRAINING_RANGE_DB = (-15.0, 20.0)  # below, nothing of the machine is left; above, nothing of the noise


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Where machine clips and noise come from.

    ``kind`` is ``factory`` (built in, made from ``seed``), ``stems`` (clean machine and noise files listed by
    ``manifest``) or ``dcase`` (the official folders of ``year`` under ``root``). Clips are ``clip_s`` seconds
    at ``sample_rate_hz``. ``clips_per_machine`` scales the factory: the number of source normals in a bank.
    ``channel`` of a file with several is ``first``, ``mean`` or ``last``. ``allow_outside`` lets a manifest name
    files that are not below its own folder (absolute paths, ``..``, links that lead out).

    Of ``dcase`` alone: ``machines`` are those used, all of the year when empty; ``ground_truth`` is the file or
    folder with the labels of the evaluation set; ``noise`` to train with is ``auto`` (the year's own where it has
    any, else the factory's), ``supplemental``, ``factory``, a folder of wav files, or a stems manifest.
    """

    kind: str = "factory"
    seed: int = 0
    clip_s: float = 2.0
    sample_rate_hz: int = 16_000
    clips_per_machine: int = 48
    manifest: str | None = None
    root: str | None = None
    year: int | None = None
    machines: tuple[str, ...] = ()
    ground_truth: str | None = None
    noise: str = "auto"
    channel: str = "first"
    allow_outside: bool = False


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The self-supervised encoder that is both the frozen teacher and the student's start.

    ``layer`` counts transformer blocks from 1 (the last one when 0). ``pooling`` is ``bands`` (mean over time,
    frequency bands kept) or ``mean`` (mean over all tokens). ``dtype`` is what teacher and student compute their
    tokens in; weights stay float32.
    """

    name: str = "tiny"
    checkpoint: str | None = None
    layer: int = 0
    pooling: str = "bands"
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long and how a student is trained. ``batch_size`` is global: ranks share it evenly.

    What is scored and saved is the mean of the student's weights over its last ``1 / (1 - ema_decay)`` steps or so
    (exponential moving average); 0 scores the weights of the last step.

    ``compile`` makes faster code of the encoder's blocks: a minute at first, and a C++ compiler is needed.
    ``checkpointing`` computes the activations of blocks again in the backward pass instead of keeping them: for a big
    encoder a fraction of the memory, for a third more time.

    ``adapt_on_bank`` (systems ``adapt`` and ``identify``) lets a student also learn from the bank of the machines it is
    scored on, which are normal training clips; its scores then say nothing about new machines.
    ``anchor_in_denominator`` (``identify``) is a habit of the code published with CLP-SCF: in the contrast an example
    is also compared with itself.
    """

    epochs: int = 6
    steps_per_epoch: int = 40
    batch_size: int = 32
    weight_decay: float = 0.01
    warmup_fraction: float = 0.1
    ema_decay: float = 0.99
    precision: str = "float32"
    compile: bool = False
    checkpointing: bool = False
    adapt_on_bank: bool = False
    anchor_in_denominator: bool = False
    device: str = "auto"
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How an epoch is judged: SNR bands in dB, the back end whose ``official`` is the objective, and cost.

    ``margin_at_test`` (``identify``) is a habit of the code published with CLP-SCF: the margin of training stays on
    when the likelihood of an identity is taken.
    """

    bands_db: Mapping[str, Band] = field(
        default_factory=lambda: {"low": (-10.0, 0.0), "mid": (0.0, 15.0), "high": (15.0, 30.0)}
    )
    backend: str = "knn1_domain_z"
    oracle_lambda: float = 0.5
    machines_early: int = 0
    batch_size: int = 256
    feature_cache_gb: float = 2.0
    margin_at_test: bool = False


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """One trial, complete: the same value trained twice on one machine gives the same numbers.

    ``params`` are the sampled values under their search-space names. ``split`` says which machines are scored:
    ``search`` while choosing, ``confirm`` once at the end.
    """

    system: str = "retain"
    params: Mapping[str, Scalar] = field(default_factory=dict)
    seed: int = 0
    split: str = "search"
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)


# least and largest value of a trial's numbers; corpora and encoders check their own
LIMITS: Mapping[str, Band] = {
    "training.epochs": (1, 1e6),
    "training.steps_per_epoch": (1, 1e9),
    "training.batch_size": (1, 1e6),
    "training.weight_decay": (0, 1e3),
    "training.warmup_fraction": (0, 1),
    "training.ema_decay": (0, 0.9999),
    "training.threads": (1, 1e4),
    "scoring.oracle_lambda": (0, 1),
    "scoring.machines_early": (0, 1e6),
    "scoring.batch_size": (1, 1e6),
    "scoring.feature_cache_gb": (0, 1e6),
}
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "split": ("search", "confirm"),
    "training.precision": ("float32", "bfloat16"),
}


def check_limits(trial: TrialConfig) -> None:
    """Refuse numbers and names that no trial can use.

    Raises:
        UserError: a value outside ``LIMITS`` or ``OPTIONS``, no SNR band, or a band whose ends are not in order.
    """
    for key, (low, high) in LIMITS.items():
        value = operator.attrgetter(key)(trial)
        if not low <= value <= high:
            raise UserError(f"{key} = {value}: allowed are {low:g} to {high:g}")
    for key, allowed in OPTIONS.items():
        value = operator.attrgetter(key)(trial)
        if value not in allowed:
            raise UserError(f"{key} = {value!r}: allowed are {', '.join(allowed)}")
    if not trial.scoring.bands_db:
        raise UserError("scoring.bands_db = {}: at least one band is needed, for example low: [-10, 0]")
    for name, (low, high) in trial.scoring.bands_db.items():
        if not low <= high or not math.isfinite(high - low):
            raise UserError(
                f"scoring.bands_db.{name} = [{low:g}, {high:g}]: expected [lowest, highest] in dB"
            )


def build(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Make a ``cls`` from plain data; keys left out keep their defaults.

    Raises:
        UserError: a key that ``cls`` does not have, or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in data.items():
        path = f"{where}.{key}" if where else key
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise UserError(
                f"{path}: unknown key; did you mean {near[0]!r}? Allowed: {', '.join(sorted(known))}"
            )
        values[key] = _convert(hints[key], value, path)
    return cls(**values)


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"{path} = {value!r}: expected a group of settings, for example {path}.KEY=VALUE")
        return build(hint, value, path)  # type: ignore[arg-type]
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        exact = [a for a in options if typing.get_origin(a) is None and type(value) is a]
        for option in exact + options:
            try:
                return _convert(option, value, path)
            except UserError:
                continue
        raise UserError(f"{path} = {value!r}: expected {_spell(hint)}")
    if hint is Any:
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{path} = {value!r}: expected a list such as [1, 2]")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
        if len(value) != len(args):
            raise UserError(f"{path} = {value!r}: expected {len(args)} values, got {len(value)}")
        return tuple(
            _convert(a, item, f"{path}[{i}]") for i, (a, item) in enumerate(zip(args, value, strict=True))
        )
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{path} = {value!r}: expected a mapping of {_spell(args[1])} by name")
        return {str(k): _convert(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{path} = {value!r}: expected {_spell(hint)}, got {type(value).__name__}")
    if hint is float and not math.isfinite(value):
        raise UserError(f"{path} = {value}: expected a finite number")
    return value


def _spell(hint: Any) -> str:
    args = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_spell(a) for a in args)
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(hint, str(hint))


def to_dict(value: Any) -> Any:
    """The plain JSON-like form of a setting; ``build`` reads it back to an equal value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: to_dict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_dict(v) for v in value]
    return value


def digest(value: Any, length: int = 12) -> str:
    """The identity of a setting: hexadecimal SHA-256 of its JSON form with sorted keys."""
    text = json.dumps(to_dict(value), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]
