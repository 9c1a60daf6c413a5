"""The range of every setting, and the pairs of settings that must fit each other.

A rule is a key, a test and the words for what passes it; the words and an example that would pass make the message.
Nothing here opens a file or imports more than names: what depends on data, machines or servers is preflight's.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from trainables.encoders import ENCODERS
from trainables.errors import UserError

if TYPE_CHECKING:
    from study.config import StudyConfig

Rule = tuple[str, Callable[[Any], bool], str, Any]
DCASE_YEARS = range(2020, 2027)
FROZEN = "frozen"  # the system that trains nothing: a probe (study/probe.py)
SEEDS = 2**31  # what every random generator in use takes


def between(key: str, low: float, high: float, example: Any) -> Rule:
    return key, lambda value: low <= value <= high, f"{_plain(low)} to {_plain(high)}", example


def _plain(number: float) -> str:
    return f"{number:,}".replace(",", "_")  # a form that --set reads as well


def one_of(key: str, options: tuple[Any, ...]) -> Rule:
    return key, lambda value: value in options, ", ".join(map(str, options)), options[0]


RULES: tuple[Rule, ...] = (
    one_of("corpus.kind", ("factory", "stems", "dcase")),
    between("corpus.seed", 0, SEEDS, 0),
    between("corpus.clip_s", 0.5, 30, 2.0),
    one_of("corpus.sample_rate_hz", (16_000,)),  # what every encoder here hears; files are resampled to it
    between("corpus.clips_per_machine", 8, 10_000, 48),
    one_of("encoder.pooling", ("bands", "mean")),
    one_of("encoder.name", tuple(ENCODERS)),
    one_of("encoder.dtype", ("float32", "bfloat16")),
    between("encoder.layer", 0, 1_000, 0),
    between("training.epochs", 1, 10_000, 6),
    between("training.steps_per_epoch", 1, 1_000_000, 40),
    between("training.batch_size", 2, 65_536, 32),
    between("training.weight_decay", 0, 10, 0.01),
    between("training.warmup_fraction", 0, 0.9, 0.1),
    between("training.ema_decay", 0, 0.9999, 0.99),
    one_of("training.precision", ("float32", "bfloat16")),
    between("training.threads", 1, 1_024, 1),
    (
        "training.device",
        lambda v: v in ("auto", "cpu", "cuda", "mps") or v.startswith("cuda:"),
        "auto, cpu, cuda, mps",
        "auto",
    ),
    between("scoring.oracle_lambda", 0, 1, 0.5),
    between("scoring.machines_early", 0, 10_000, 0),
    between("scoring.batch_size", 1, 65_536, 256),
    between("scoring.feature_cache_gb", 0, 10_000, 2.0),
    between("search.trials", 1, 1_000_000, 12),
    between("search.seed", 0, SEEDS, 0),
    one_of("search.sampler", ("tpe", "random")),
    between("search.startup_trials", 0, 1_000_000, 8),
    between("search.grace_epochs", 1, 10_000, 2),
    between("search.reduction_factor", 2, 100, 3),
    between("slots.count", 1, 10_000, 2),
    between("slots.workers", 1, 10_000, 1),
    between("slots.cpus_per_worker", 0, 1_024, 1.0),
    between("slots.gpus_per_worker", 0, 64, 1.0),
    between("slots.max_restarts", 0, 1_000, 3),
    between("slots.start_timeout_s", 1, 86_400, 600.0),
    between("slots.epoch_timeout_s", 1, 10_000_000, 10_800.0),
    between("confirm.seeds", 0, 1_000, 3),
    between("confirm.finalists", 1, 1_000, 1),
    between("yardstick.steps", 1, 10_000_000, 200),
)


def check_limits(config: StudyConfig) -> None:
    """Raises UserError for the first setting of ``config`` that cannot be used."""
    for key, passes, words, example in RULES:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        if not passes(value):
            raise refusal(
                key,
                value,
                f"allowed is {words}" if "," not in words else f"allowed are {words}",
                key,
                example,
            )
    for problem in _misfits(config):
        raise problem


def refusal(key: str, value: Any, why: str, fix_key: str, fix: Any) -> UserError:
    """One line: what is wrong with ``key``, and a setting that would do."""
    shown = fix if isinstance(fix, str) else json.dumps(fix, separators=(",", ":"))
    return UserError(f"{key} = {value!r}: {why}; for example --set {fix_key}={shown}")


def _misfits(config: StudyConfig) -> Iterator[UserError]:
    import search_spaces
    from trainables.scoring.backends import backends

    corpus, training, search, slots = config.corpus, config.training, config.search, config.slots
    systems = search_spaces.systems_of(config.system)
    if config.system != FROZEN and not (systems and set(systems) <= set(search_spaces.SYSTEMS)):
        several = f"[{','.join(search_spaces.SYSTEMS)}]"
        why = f"allowed: {', '.join((*search_spaces.SYSTEMS, FROZEN))}, or several to search across them: {several}"
        yield refusal("system", config.system, why, "system", "retain")
    if corpus.kind == "stems" and not corpus.manifest:
        yield refusal(
            "corpus.manifest",
            None,
            "corpus.kind = 'stems' needs the CSV that lists your recordings",
            "corpus.manifest",
            "my/manifest.csv",
        )
    if corpus.kind == "dcase" and not corpus.root:
        why = "corpus.kind = 'dcase' needs the folder that holds the unpacked archives"
        yield refusal("corpus.root", None, why, "corpus.root", "my/dcase2023")
    if corpus.kind == "dcase" and corpus.year not in DCASE_YEARS:
        yield refusal(
            "corpus.year",
            corpus.year,
            f"allowed are {DCASE_YEARS[0]} to {DCASE_YEARS[-1]}",
            "corpus.year",
            2023,
        )
    unread = {
        "manifest": "stems",
        **dict.fromkeys(("root", "year", "ground_truth", "machines", "noise"), "dcase"),
    }
    for key, kind in unread.items():
        value = getattr(corpus, key)
        if value not in (None, (), "auto") and corpus.kind != kind:
            yield refusal(
                f"corpus.{key}", value, f"corpus.kind = {corpus.kind!r} does not read it", "corpus.kind", kind
            )
    if not 1 <= slots.least <= slots.workers:
        why = f"allowed is 1 to slots.workers = {slots.workers}, or null for always so many"
        yield refusal("slots.min_workers", slots.min_workers, why, "slots.min_workers", 1)
    elif any(training.batch_size % size for size in range(slots.least, slots.workers + 1)):
        # so that any size that a slot takes on trains on the same batches
        common = math.lcm(*range(slots.least, slots.workers + 1))
        fitting = training.batch_size // common * common or common
        why = f"slots.workers = {slots.size} cannot share it evenly"
        fix = ("slots.min_workers", None) if fitting > 65_536 else ("training.batch_size", fitting)
        yield refusal("training.batch_size", training.batch_size, why, *fix)
    if slots.elastic and not slots.cpus_per_worker and not slots.gpus_per_worker:
        why = "slots.min_workers needs workers that take a CPU or a GPU, or there is always room"
        yield refusal("slots.cpus_per_worker", slots.cpus_per_worker, why, "slots.cpus_per_worker", 1)
    if search.grace_epochs > training.epochs:
        why = f"allowed is 1 to training.epochs = {training.epochs}"
        yield refusal("search.grace_epochs", search.grace_epochs, why, "search.grace_epochs", training.epochs)
    if search.trials < len(search.recipes):
        why = f"{len(search.recipes)} search.recipes are tried first and count as trials"
        yield refusal("search.trials", search.trials, why, "search.trials", len(search.recipes))
    if slots.gpus_per_worker > 1 and slots.gpus_per_worker % 1:
        yield refusal(
            "slots.gpus_per_worker",
            slots.gpus_per_worker,
            "above one GPU only whole ones can be given",
            "slots.gpus_per_worker",
            1,
        )
    known = backends()
    if config.scoring.backend not in known:
        why = f"allowed are {', '.join(known)}"
        near = difflib.get_close_matches(config.scoring.backend, known, n=1, cutoff=0.0)[0]
        yield refusal("scoring.backend", config.scoring.backend, why, "scoring.backend", near)
    most = config.confirm.most_seeds
    if most is not None and not config.confirm.seeds <= most <= 1_000:
        why = f"allowed is confirm.seeds = {config.confirm.seeds} to 1_000, or null for twice as many"
        yield refusal("confirm.most_seeds", most, why, "confirm.most_seeds", config.confirm.seeds)
    yield from _band_misfits(config)
    if config.system == FROZEN:
        if config.confirm.seeds:
            why = "system = 'frozen' trains nothing that could be confirmed"
            yield refusal("confirm.seeds", config.confirm.seeds, why, "confirm.seeds", 0)
        if search.recipes:
            why = "system = 'frozen' trains nothing, so it has no recipes"
            yield refusal("search.recipes", list(search.recipes), why, "search.recipes", [])
        return
    yield from _fixed_misfits(config)
    recipes = search_spaces.load(config.system).RECIPES
    for key, chosen in (("search.recipes", search.recipes), ("confirm.recipes", config.confirm.recipes)):
        if len(set(chosen)) != len(chosen) or not set(chosen) <= set(recipes):
            why = f"allowed are, each once: {', '.join(recipes)}"
            yield refusal(key, list(chosen), why, key, next(iter(recipes)))


def _fixed_misfits(config: StudyConfig) -> Iterator[UserError]:
    import search_spaces

    spaces = [search_spaces.load(system) for system in search_spaces.systems_of(config.system)]
    for name, value in config.search.fixed.items():
        axes = [space.AXES[name] for space in spaces if name in space.AXES]
        known = sorted({known for space in spaces for known in space.AXES})
        if not axes:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            fix = next(space.AXES[near] for space in spaces if near in space.AXES).example
            why = f"{config.system} does not search it; allowed are {', '.join(known)}"
            yield refusal(f"search.fixed.{name}", value, why, f"search.fixed.{near}", fix)
        for axis in axes:
            if not axis.holds(value):
                why = f"allowed is what is searched: {axis.allowed}"
                yield refusal(f"search.fixed.{name}", value, why, f"search.fixed.{name}", axis.example)


def _band_misfits(config: StudyConfig) -> Iterator[UserError]:
    bands, names = config.scoring.bands_db, ("low", "mid", "high")
    for name in sorted(bands.keys() ^ set(names)):
        why = "the bands are low, mid and high, all three"
        yield refusal(f"scoring.bands_db.{name}", bands.get(name), why, "scoring.bands_db.low", [-10, 0])
    for name in names:
        low, high = bands[name]
        if not -60 <= low < high <= 60:
            why = "allowed is [from, to] in dB, from below to, both within -60 and 60"
            yield refusal(f"scoring.bands_db.{name}", [low, high], why, f"scoring.bands_db.{name}", [-10, 0])
