"""Anomaly scores of recordings, from the best confirmed student of a finished study.

    python study/score.py --study quick-1a2b3c4d new/*.wav --bank normal/          # your own machine
    python study/score.py --study stems-5e6f7a8b --machine saw new/*.wav           # a machine of the study

Each recording is compared with a bank of normal ones; one JSON line per recording goes to standard output, as soon
as it is known. A recording that cannot be scored becomes a line with ``error`` and the others go on. Nothing is
written. Exit codes: 0 all scored, 1 some could not be, 2 refused before anything was scored.

Shape legend: N clips of the bank, P pieces of a recording, T samples, E embedding.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
if sys.path and Path(sys.path[0] or ".").resolve() == ROOT / "study":
    sys.path[0] = str(ROOT)  # run as a script: the project's packages lie one folder up

from study.command import storage_folder  # noqa: E402
from study.folder import StudyFolder  # noqa: E402
from study.outlet import outlet  # noqa: E402
from trainables.errors import UserError  # noqa: E402

if TYPE_CHECKING:
    import numpy as np

    from study.config import StudyConfig
    from trainables.scoring.neighbours import Bank
    from trainables.settings import CorpusConfig
    from trainables.system import Student

AUDIO = (".wav", ".flac")
BATCH = 64  # pieces embedded at once: memory stays the same however long a recording is
FEW = 10  # pieces of a bank below which a score says little

EXAMPLES = """
what a line holds
  path       the recording, as it was given
  machine    --machine
  score      how anomalous it is: the largest score of its pieces
  usual      below this lie 95% of the bank's own pieces, each scored against the rest of the bank
  backend    how distances to the bank become a score
  pieces     a score for every piece of the length that the study works with; the last one overlaps the one before
  student    the confirmed training whose weights were used
  error      in place of a score: why this recording could not be scored

examples
  your own machine, with some minutes of it running normally as the bank:
    python study/score.py --study quick-1a2b3c4d new/*.wav --bank normal/
  the highest scores first:
    python study/score.py --study quick-1a2b3c4d new/*.wav --bank normal/ | jq -s 'sort_by(-.score)[] | {path, score}'
  a machine of the study, with the study's own normal recordings as the bank:
    python study/score.py --study stems-5e6f7a8b --machine saw new/*.wav

exit codes
  0 every recording has a score    1 some have an error instead    2 the command was refused
"""


class _Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        if "required: WAV" in message:
            raise UserError("no recording to score; give them first, and --bank after them")
        raise UserError(f"{message.removeprefix('argument ')}; see --help")


def parser() -> argparse.ArgumentParser:
    """The options of ``study/score.py``."""
    made = _Parser(
        prog="study/score.py",
        usage="python study/score.py --study NAME [--storage DIR] [--machine NAME] WAV... [--bank WAV-or-folder ...]",
        description="Anomaly scores of recordings, from the best confirmed student of a finished study.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("recordings", nargs="+", metavar="WAV", help="recordings to score (wav or flac), or folders of them")
    add("--study", required=True, metavar="NAME", help="the study, as the first line of its output names it")
    add("--storage", metavar="DIR", help="where studies lie (default: as for study/run.py)")
    add("--machine", metavar="NAME", help="which machine of the study it is; with --bank, only a label")
    add(
        "--bank",
        nargs="+",
        action="extend",
        metavar="WAV",
        help="normal recordings to compare with, or folders of them (default: the study's own of --machine)",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Score recordings; returns the exit code."""
    try:
        given = parser().parse_args(arguments)
        paths = list(expand(given.recordings))
        scorer = open_scorer(given.study, storage_folder(given.storage), given.machine, given.bank)
        failed = False
        for path in paths:
            line = scorer.line(path)
            failed |= "error" in line
            print(json.dumps(line, allow_nan=False), flush=True)
        return int(failed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A student, a bank, and what every line says of them."""

    student: Student
    corpus: CorpusConfig
    bank: Bank
    backend: str
    usual: float | None
    facts: dict[str, Any]

    def line(self, path: Path) -> dict[str, Any]:
        """What is said of one recording."""
        from trainables.scoring.backends import score

        try:
            cuts, scores = [], []
            for batch in batches(pieces(path, self.corpus)):
                emb_PE = embed(self.student, [wave_T for _, _, wave_T in batch], self.facts["machine"])
                cuts += [(start_s, end_s) for start_s, end_s, _ in batch]
                scores += score(self.bank, emb_PE, names=[self.backend])[self.backend].tolist()
        except UserError as error:
            return {"path": str(path), "machine": self.facts["machine"], "error": str(error)}
        listed = [
            {"start_s": round(start_s, 3), "end_s": round(end_s, 3), "score": round(value, 4)}
            for (start_s, end_s), value in zip(cuts, scores, strict=True)
        ]
        known = {"score": round(max(scores), 4), "usual": self.usual, "backend": self.backend}
        return {"path": str(path), **self.facts, **known, "pieces": listed}


def open_scorer(study: str, storage: Path, machine: str | None, own_bank: Sequence[str] | None) -> Scorer:
    """Student and bank.

    Raises:
        UserError: no such study, none of its students is confirmed, no such machine, or an unusable bank.
    """
    import numpy as np

    from trainables.scoring.backends import backends, prepare

    config, folder = open_study(study, storage)
    if own_bank:
        waves, is_target = list(own_waves(own_bank, config.corpus)), None
    else:
        machine = require_machine(config, storage / "cache", machine)
        waves, is_target = corpus_waves(config, storage / "cache", machine)
    student, job_id = open_student(config, folder, storage / "cache")
    name = usable_backend(config.scoring.backend)
    emb_NE = np.concatenate([embed(student, batch, machine) for batch in batches(iter(waves))])
    targets = np.zeros(len(emb_NE), bool) if is_target is None else is_target
    bank = prepare(emb_NE, targets, num_bands=student.encoder.num_bands, names=[name])
    if len(waves) < FEW:
        print(
            f"note: a bank of {len(waves)} pieces says little; give more normal recordings", file=sys.stderr
        )
    inner = backends(student.encoder.num_bands)[name].rank(bank.loo)
    inner = inner[np.isfinite(inner)]
    return Scorer(
        student=student,
        corpus=config.corpus,
        bank=bank,
        backend=name,
        usual=round(float(np.quantile(inner, 0.95)), 4) if len(waves) > 1 and len(inner) else None,
        facts={"machine": machine, "study": study, "student": job_id, "bank_pieces": len(waves)},
    )


def open_study(name: str, storage: Path) -> tuple[StudyConfig, StudyFolder]:
    """Configuration and folder of a study. Raises UserError listing the studies there are."""
    from study.config import StudyConfig
    from trainables.settings import build

    folder = StudyFolder(storage / name)
    study = folder.study() if "/" not in name else None
    if study is None:
        found = ", ".join(sorted(path.parent.name for path in storage.glob("*/study.json")))
        there = (
            f"there are {found}"
            if found
            else "there is none; run study/run.py first, or give another --storage"
        )
        raise UserError(f"--study {name}: no such study in {storage}; {there}")
    return build(StudyConfig, study["config"]), folder


def open_student(config: StudyConfig, folder: StudyFolder, cache_dir: Path) -> tuple[Student, str]:
    """The best setting's first confirmed student, and the job that trained it."""
    from study.confirm import student_path
    from trainables.checkpoint import load_checkpoint
    from trainables.encoders.encoder import load_encoder
    from trainables.loop import pick_device
    from trainables.system import find_systems

    path = student_path(config, folder)
    if path is None:
        fix = "run its command again to finish it"
        if not config.confirm.seeds:
            fix = "it was run with confirm.seeds = 0; run its command again with --set confirm.seeds=1"
        raise UserError(f"--study {folder.path.name}: none of its students is confirmed; {fix}")
    with warnings.catch_warnings(action="ignore"):  # a damaged checkpoint is passed over for the one before
        found = load_checkpoint(path)
    job_id, prefix = path.parent.name, "model."
    tensors = found[0] if found else {}
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    params = (folder.job(job_id) or {"params": {}})["params"]
    try:
        encoder = load_encoder(config.encoder, cache_dir)
        student = find_systems()[config.system].student(encoder, params, weights)
    except ValueError:
        raise UserError(f"{path}: holds no sound checkpoint of this study's encoder; put it back") from None
    return student.to(pick_device("auto")).eval(), job_id


def usable_backend(name: str) -> str:
    """The study's back end, unless it looks at all queries together: here each recording stands for itself."""
    from trainables.scoring.backends import DEFAULT, backends

    return DEFAULT if backends()[name].transductive else name


def require_machine(config: StudyConfig, cache_dir: Path, machine: str | None) -> str:
    """The machine whose bank is used. Raises UserError listing those that the study scores."""
    from trainables.data.corpus import open_source

    roles = open_source(config.corpus, cache_dir).roles
    scored = list(dict.fromkeys((*roles.search, *roles.confirm)))
    if machine is None and len(scored) == 1:
        return scored[0]
    if machine not in scored:
        asked = (
            "--machine is missing"
            if machine is None
            else f"--machine {machine}: not one that this study scores"
        )
        raise UserError(
            f"{asked}; allowed are {', '.join(scored)}, or give your own normal recordings with --bank"
        )
    return machine


def corpus_waves(config: StudyConfig, cache_dir: Path, machine: str) -> tuple[list[np.ndarray], np.ndarray]:
    """The machine's clean normal training clips, and which of them are of the target domain."""
    import numpy as np

    from trainables.data.corpus import open_corpus

    corpus = open_corpus(config.corpus, cache_dir, now=())
    index = corpus.select(role="machine", name=machine, split="train", label="normal")
    return [corpus.waves_NT[i] for i in index], np.array([corpus.clips[i].domain == "target" for i in index])


def own_waves(given: Sequence[str], corpus: CorpusConfig) -> Iterator[np.ndarray]:
    """Pieces of the user's own normal recordings. Raises UserError for the first that cannot be used."""
    for path in expand(given):
        try:
            for _, _, wave_T in pieces(path, corpus):
                yield wave_T
        except UserError as error:
            raise UserError(f"--bank {error}") from None


def expand(given: Sequence[str]) -> Iterator[Path]:
    """Files as they are, folders as the recordings below them."""
    for path in map(Path, given):
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in AUDIO) if path.is_dir() else [path]
        if not found:
            raise UserError(f"{path}: a folder without {' or '.join(AUDIO)} files; give recordings")
        yield from found


def pieces(path: Path, corpus: CorpusConfig) -> Iterator[tuple[float, float, np.ndarray]]:
    """Start and end in seconds, and wave [T], of pieces of ``clip_s`` that together cover a recording.

    Resampled, mixed down and levelled as the clips of the study are. The last piece ends where the recording does.

    Raises:
        UserError: a file that cannot be read, is shorter than a piece, or is silent in one.
    """
    import numpy as np

    from trainables.data import audio
    from trainables.data.corpus import normalise

    length_s, clip_s = audio.probe(path).duration_s, corpus.clip_s
    if length_s < clip_s - audio.END_TOLERANCE_S:
        raise UserError(
            f"{path}: {length_s:.3f} s long where this study works with {clip_s:g} s; record longer"
        )
    num_samples = round(clip_s * corpus.sample_rate_hz)
    starts = [i * clip_s for i in range(max(1, int((length_s + audio.END_TOLERANCE_S) / clip_s)))]
    if length_s - starts[-1] - clip_s > audio.END_TOLERANCE_S:
        starts.append(length_s - clip_s)
    for start_s in starts:
        end_s = min(start_s + clip_s, length_s)
        name = f"{path} [{start_s:g}-{end_s:g} s]"
        wave_T = audio.read(
            path,
            sample_rate_hz=corpus.sample_rate_hz,
            start_s=start_s,
            end_s=end_s,
            channel=corpus.channel,
            name=name,
        )[:num_samples]
        wave_T = np.pad(wave_T, (0, num_samples - len(wave_T)), mode="edge")
        yield start_s, end_s, normalise(wave_T, name, num_samples)


def batches(items: Iterator[Any]) -> Iterator[list[Any]]:
    """Lists of at most ``BATCH``."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def embed(student: Student, waves: Sequence[np.ndarray], machine: str | None) -> np.ndarray:
    """Embeddings [P, E] of waves of equal length, all of one machine (None: not known)."""
    import numpy as np
    import torch

    device = next(student.parameters()).device
    with torch.inference_mode():
        feature = student.encoder.features(torch.from_numpy(np.stack(waves)).to(device))
        return student.embed(feature, [machine] * len(waves) if machine else []).float().cpu().numpy()


if __name__ == "__main__":
    with outlet():
        code = main()
    sys.exit(code)
