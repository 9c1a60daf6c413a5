"""Everything that can be known to go wrong, found before a second of compute is spent; cheap checks come first.

Each check raises a ``UserError`` of one line and leaves nothing behind. What passes is told in a ``Preflight``,
which ``--dry-run`` prints. Audio is opened here (headers, formats, lengths), not rendered: silence and NaN within a
file are found when the corpus is made, also before any training.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

import search_spaces
from study import cluster, resources
from study.config import StudyConfig, validate
from study.dataset import describe_data
from study.limits import FROZEN
from study.tracking_uri import check, redact
from trainables.data.corpus import Corpus, open_source
from trainables.errors import UserError
from trainables.files import exclusive
from trainables.settings import CorpusConfig, EncoderConfig, to_dict

SPARE_BYTES = 500 << 20  # for checkpoints, records, plots, the tracking database and Ray's logs
FEATURES_PER_S = 16_000  # of the raw wave; no encoder here makes larger features
TINY_EMBEDDING, TINY_TOKENS_PER_S = 768, 2400  # values that the built-in encoder makes of a clip, at most
ENCODER_CHECK = """
import json, sys
from pathlib import Path
from trainables.encoders.encoder import load_encoder
from trainables.errors import UserError
from trainables.settings import CorpusConfig, EncoderConfig, build
encoder, corpus, folder = json.loads(sys.argv[1])
try:
    loaded = load_encoder(build(EncoderConfig, encoder), Path(folder) if folder else None)
    loaded.check_clips(build(CorpusConfig, corpus))
except UserError as error:
    sys.exit(f"refused: {error}")
import torch
with torch.no_grad():
    rate = loaded.backbone.sample_rate_hz
    tokens = loaded.tokens(loaded.features(torch.zeros(1, round(corpus["clip_s"] * rate)))).numel()
backbone = loaded.backbone
print(json.dumps([backbone.num_layers, backbone.num_bands, backbone.source, loaded.embedding_size, tokens]))
"""


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What was found. ``corpus_identity`` changes with any sample, ``files`` are digests of the recordings by name;
    ``notes`` belong under every table; ``data`` is the data set as MLflow lists it (``study/dataset.py``)."""

    corpus_identity: str
    files: Mapping[str, str]
    notes: tuple[str, ...]
    lines: tuple[str, ...]
    machines: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)


def preflight(config: StudyConfig, storage: Path, tracking_uri: str, *, dry_run: bool = False) -> Preflight:
    """Check that this study can run.

    Args:
        storage: absolute folder of results and caches; need not exist yet.
        dry_run: also connect to the Ray cluster, if there is one, to count what it has.

    Raises:
        UserError: for the first thing that cannot work.
    """
    validate(config)
    check_folder(storage)
    room = resources.describe(config.slots, resources.of_machine()) if not cluster.attaches() else ""
    check(tracking_uri)
    source = open_source(config.corpus, storage / "cache" if storage.is_dir() else None)
    num_samples = round(config.corpus.clip_s * config.corpus.sample_rate_hz)
    corpus = Corpus(
        clips=source.clips,
        waves_NT=np.empty((len(source.clips), 0), np.float32),
        roles=source.roles,
        sample_rate_hz=config.corpus.sample_rate_hz,
        digest=source.identity,
        notes=source.notes,
        year=source.year,
    )
    notes, num_mixtures = check_corpus(corpus, config)
    corpus_bytes = 4 * num_samples * len(corpus.clips)
    feature_bytes = 4 * FEATURES_PER_S * config.corpus.clip_s * num_mixtures
    needed = corpus_bytes + min(feature_bytes, config.scoring.feature_cache_gb * 1e9) + SPARE_BYTES
    check_room(storage, needed)
    cache_dir = storage / "cache" if storage.is_dir() else None
    weights = check_encoder(config.encoder, config.corpus, cache_dir)
    needed += target_bytes(config, cache_dir) * sum(map(len, corpus.training()))
    check_room(storage, needed)
    if dry_run and cluster.attaches():
        with cluster.attach_or_start(config.slots, storage) as connected:
            room = connected.text
    roles = corpus.roles
    lines = (
        f"corpus     {config.corpus.kind}: {len(corpus.clips)} clips of {config.corpus.clip_s:g} s; "
        f"{len(roles.train)} machines train, {len(roles.search)} are scored while searching, "
        f"{len(roles.confirm)} confirm",
        f"encoder    {config.encoder.name}{': ' if weights else ''}{weights}",
        f"slots      {room or 'counted when the study attaches to the Ray cluster'}",
        f"storage    {storage} ({needed / 1e9:.1f} GB at most, {_free(storage) / 1e9:.1f} GB free)",
        f"tracking   {redact(tracking_uri)}",
    )
    return Preflight(
        corpus_identity=source.identity,
        files=source.files,
        notes=(*corpus.notes, *notes),
        lines=lines,
        machines=tuple(machine_table(corpus)),
        data=describe_data(corpus, config.corpus),
    )


def machine_table(corpus: Corpus) -> Iterator[str]:
    """Who does what with how many clips: a line for each machine, and one for each kind of noise."""
    parts = [
        (split, label, domain)
        for split, label in (("train", "normal"), ("test", "normal"), ("test", "anomaly"))
        for domain in ("source", "target")
    ]
    count = Counter((c.name, c.split, c.label, c.domain) for c in corpus.clips if c.role == "machine")
    names = list(dict.fromkeys(name for name, *_ in count))
    width = max(map(len, (*names, "machine")))
    titles = ("train normal", "test normal", "test anomaly")
    yield f"{'machine':<{width}}  {'for':<15}  " + "  ".join(f"{title:>13}" for title in titles)
    yield f"{'':<{width}}  {'':<15}  " + "  ".join(["source target"] * 3)
    for name in names:
        roles = [role for role in ("train", "search", "confirm") if name in getattr(corpus.roles, role)]
        cells = [f"{count[name, *part]:6d}" for part in parts]
        pairs = "  ".join(f"{one} {two}" for one, two in zip(cells[::2], cells[1::2], strict=True))
        more = sum(
            n for (machine, split, *_), n in count.items() if (machine, split) == (name, "supplemental")
        )
        yield f"{name:<{width}}  {', '.join(roles):<15}  {pairs}" + (
            f"  + {more} supplemental" if more else ""
        )
    noise = [c for c in corpus.clips if c.role == "noise"]
    for split, use in (("train", "train with"), ("test", "score in")):
        mine = [c for c in noise if c.split == split]
        if mine:
            yield f"noise to {use}: {len(mine)} clips of {len({c.name for c in mine})} environments"


def check_folder(folder: Path) -> None:
    """Files can be written and locked in ``folder``, or it can be made."""
    existing = folder
    while not os.path.lexists(existing):
        existing = existing.parent
    fix = "give --storage a folder of your own"
    if not existing.is_dir():
        raise UserError(f"--storage {folder}: {existing} is a file or a broken link; {fix}")
    try:
        with (
            tempfile.TemporaryDirectory(dir=existing, prefix=".probe-") as probe,
            exclusive(Path(probe) / "lock"),
        ):
            (Path(probe) / "file").write_text("content")
    except OSError as error:
        raise UserError(
            f"--storage {folder}: cannot write and lock files ({error.strerror}); {fix}"
        ) from None


def check_room(folder: Path, needed_bytes: float) -> None:
    """``folder`` has so much room left."""
    free = _free(folder)
    if free < needed_bytes:
        raise UserError(
            f"--storage {folder}: {free / 1e9:.1f} GB free, this study needs up to {needed_bytes / 1e9:.1f} GB; "
            "make room, or give --storage another disk"
        )


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_corpus(corpus: Corpus, config: StudyConfig) -> tuple[list[str], int]:
    """The corpus has what training and both scorings draw from.

    Returns:
        Sentences about what it lacks without being useless, and the number of mixtures that scoring embeds.

    Raises:
        UserError: nothing to train on, or a scored machine without bank or without queries of both labels.
    """
    from trainables.scoring.grid import KINDS, make_plan

    machines, noises = corpus.training()
    where = f"corpus.kind = {config.corpus.kind!r}"
    if not len(machines) or not len(noises):
        lacking = "normal machine clips" if not len(machines) else "noise clips"
        raise UserError(f"{where}: no {lacking} to train on; add some with split train")
    splits = ["search"] + ["confirm"] * (config.confirm.seeds > 0)
    plans = [
        make_plan(corpus, split=s, seed=config.search.seed, bands_db=config.scoring.bands_db) for s in splits
    ]
    notes = []
    if len({corpus.clips[i].name for i in machines}) == 1:
        notes.append("One machine type trains: tagging machines has a single class and teaches nothing.")
    heard = {corpus.clips[i].kind for i in noises}
    scored = KINDS if corpus.year is None else ()  # recordings are scored in the noise that they hold
    notes += [
        f"No {kind} noise in training: students hear it for the first time when scored."
        for kind in scored
        if kind not in heard
    ]
    return notes, sum(len(plan.clip_R) for plan in plans)


def check_encoder(config: EncoderConfig, corpus: CorpusConfig, cache_dir: Path | None = None) -> str:
    """The encoder can be loaded as configured, and hears clips as short as those of ``corpus``.

    The built-in weights at their last layer can, and hear whatever passes ``limits.py``. Weights that come in another
    form are converted into ``cache_dir`` now.

    Returns:
        Which weights these are, if the encoder says so.
    """
    if _built_in(config):
        return ""
    if config.checkpoint is not None and not Path(config.checkpoint).is_file():
        raise UserError(
            f"encoder.checkpoint = {config.checkpoint!r}: no such file; for example --set encoder.checkpoint=null "
            "for the weights that come along"
        )
    return _loaded(config, corpus, cache_dir)[2]


def _built_in(config: EncoderConfig) -> bool:
    return config.name == "tiny" and config.checkpoint is None and config.layer == 0


def target_bytes(config: StudyConfig, cache_dir: Path | None = None) -> float:
    """Bytes of the teacher's targets for each clip that trains: its embedding, and its tokens where a trial may align
    them. Raises as ``check_encoder``."""
    if _built_in(config.encoder):
        embedding, tokens = TINY_EMBEDDING, TINY_TOKENS_PER_S * config.corpus.clip_s
    else:
        _, _, _, embedding, tokens = _loaded(config.encoder, config.corpus, cache_dir)
    systems = () if config.system == FROZEN else search_spaces.systems_of(config.system)
    aligns_tokens = any("align_level" in search_spaces.load(system).AXES for system in systems)
    return 4 * (embedding + tokens * aligns_tokens)


def encoder_layout(config: EncoderConfig, corpus: CorpusConfig) -> tuple[int, int]:
    """Numbers of layers and of frequency bands of the encoder, which is loaded for it. Raises as ``check_encoder``."""
    return _loaded(config, corpus, None)[:2]


@lru_cache(maxsize=4)
def _loaded(
    config: EncoderConfig, corpus: CorpusConfig, cache_dir: Path | None
) -> tuple[int, int, str, int, int]:
    """Numbers of layers and of frequency bands of the encoder, which weights these are, and how many values a clip's
    embedding and its tokens have.

    That is tried in a process of its own: loading needs PyTorch, which costs seconds and memory that the process
    that drives a study shall not pay.

    Raises:
        UserError: it cannot be loaded as configured, or does not hear clips as short as those of ``corpus``.
    """
    command = [
        sys.executable,
        "-c",
        ENCODER_CHECK,
        json.dumps(to_dict([config, corpus, cache_dir and str(cache_dir)])),
    ]
    path = os.pathsep.join([str(cluster.ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        refused = last.removeprefix("refused: ")
        if refused != last:
            raise UserError(refused)
        raise UserError(
            f"encoder.name = {config.name!r}: cannot be loaded ({last}); run 'make env', then again"
        )
    num_layers, num_bands, source, embedding, tokens = json.loads(done.stdout.splitlines()[-1])
    return num_layers, num_bands, source, embedding, tokens
