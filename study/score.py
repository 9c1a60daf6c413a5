"""Anomaly scores of recordings, from the best confirmed student of a finished study.

    python study/score.py --study quick-1a2b3c4d new/ --bank normal/               # your own machine
    python study/score.py --study stems-5e6f7a8b --machine saw 'new/*.wav'         # a machine of the study
    inotifywait -mqe close_write --format %w%f in/ | python study/score.py --study quick-1a2b3c4d - --bank normal/
    python study/score.py --study quick-1a2b3c4d --register                        # as a model in MLflow

Each recording is compared with a bank of normal ones; one JSON line per recording goes to standard output, as soon
as it is known. A recording that cannot be scored becomes a line with ``error`` and the others go on. Memory does not
grow with their number. Exit codes: 0 all scored, 1 some could not be, 2 refused before anything was scored.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

ROOT = Path(__file__).resolve().parents[1]
if sys.path and Path(sys.path[0] or ".").resolve() == ROOT / "study":
    sys.path[0] = str(ROOT)  # run as a script: the project's packages lie one folder up

from study.command import storage_folder  # noqa: E402
from study.outlet import outlet  # noqa: E402
from study.recordings import expand  # noqa: E402
from trainables.errors import UserError  # noqa: E402

if TYPE_CHECKING:
    from study.detector import Detector

FEW = 10  # pieces of a bank below which a score says little
FIRST_WORD_S, WORD_S, FRAME_S = (
    10.0,
    60.0,
    0.5,
)  # progress: into a file after, then every; on a terminal every
STDIN = "-"

EXAMPLES = """
what a line holds
  path          the recording, as it was given
  score         how anomalous it is: the largest score of its pieces
  threshold     above this lies the share --false-alarm-rate of normal pieces: from a gamma distribution of the scores
                of the bank's own pieces, each scored against the bank's other recordings
  anomalous     whether the score is above the threshold; a recording of many pieces has as many chances to be, so
                give a lower rate for long ones
  nearest       the normal recording of the bank that sounds most like its worst piece, and where in it
  distance      how far that is
  threshold_from  gamma; quantile, where a gamma distribution does not describe the scores; none of a bank too small
  backend       how distances to the bank become a score
  pieces        a score for every piece of the length that the study works with; the last one overlaps the one before
  study, student, machine    which training gave the weights, and --machine
  error         in place of a score: why this recording could not be scored

examples
  your own machine, with some minutes of it running normally as the bank:
    python study/score.py --study quick-1a2b3c4d new/ --bank normal/
  the highest scores first:
    python study/score.py --study quick-1a2b3c4d new/ --bank normal/ | jq -s 'sort_by(-.score)[] | {path, score}'
  a machine of the study, with the study's own normal recordings as the bank, names of recordings from another program:
    find new -name '*.wav' | python study/score.py --study stems-5e6f7a8b --machine saw -
  the same as a model in MLflow; with --bank and --machine of your own machine:
    python study/score.py --study quick-1a2b3c4d --register

exit codes
  0 every recording has a score    1 some have an error instead    2 the command was refused
"""


class _Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see --help")


def parser() -> argparse.ArgumentParser:
    """The options of ``study/score.py``."""
    made = _Parser(
        prog="study/score.py",
        usage="python study/score.py --study NAME [--storage DIR] [--machine NAME] [--false-alarm-rate R]\n"
        "                             WAV... [--bank WAV...]\n"
        "       python study/score.py --study NAME --register [--machine NAME] [--tracking-uri URI] [--bank WAV...]",
        description="Anomaly scores of recordings, from the best confirmed student of a finished study.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    what = "recordings to score (wav or flac), folders of them, patterns, or - for a list on standard input"
    add("recordings", nargs="*", metavar="WAV", help=what)
    add("--study", required=True, metavar="NAME", help="the study, as the first line of its output names it")
    add("--storage", metavar="DIR", help="where studies lie (default: as for study/run.py)")
    add("--machine", metavar="NAME", help="which machine of the study it is; with --bank, only a label")
    add(
        "--bank",
        nargs="+",
        action="extend",
        metavar="WAV",
        help="normal recordings to compare with, folders or patterns (default: the study's own of --machine)",
    )
    add(
        "--false-alarm-rate",
        type=float,
        default=0.1,
        metavar="R",
        help="share of normal pieces that may be called anomalous (default: %(default)s)",
    )
    add(
        "--register", action="store_true", help="put the student into MLflow's model registry; scores nothing"
    )
    add("--tracking-uri", metavar="URI", help="with --register: which MLflow (default: as for study/run.py)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Score recordings, or register a student; returns the exit code."""
    try:
        given = parser().parse_args(arguments)
        if given.register:
            return _register(given)
        return _score(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _score(given: argparse.Namespace) -> int:
    from trainables.scoring.threshold import check_rate

    check_rate(given.false_alarm_rate, "--false-alarm-rate")
    if not given.recordings:
        raise UserError("no recording to score; give them first, and --bank after them")
    listed = STDIN in given.recordings
    total = None if listed else sum(1 for _ in expand(given.recordings))  # refuses an empty folder, too
    detector, machine = open_detector(given.study, storage_folder(given.storage), given.machine, given.bank)
    with contextlib.suppress(AttributeError):  # names of files need not be UTF-8
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    progress = Progress(total)
    for path in recordings(given.recordings, sys.stdin):
        if isinstance(path, UserError):
            line = {"machine": machine, **detector.facts, "error": str(path)}
        else:
            line = {"path": str(path), **detector.line(path, machine, given.false_alarm_rate)}
        progress.clear()
        print(json.dumps(line, allow_nan=False), flush=True)
        progress.count(failed="error" in line)
        if getattr(sys.stdout, "silent", False):
            break  # nobody reads on
    progress.clear()
    if not progress.done:
        print("note: the list on standard input was empty", file=sys.stderr)
    return int(progress.failed > 0)


def recordings(given: Iterable[str], listed: TextIO) -> Iterator[Path | UserError]:
    """The recordings that were asked for, one by one; of a list what cannot be used comes as its error."""
    for name in given:
        if name != STDIN:
            yield from expand([name])
            continue
        for line in listed:
            named = line.rstrip("\r\n")
            try:
                yield from expand([named] if named else [])
            except UserError as error:
                yield error


class Progress:
    """How far it is, on standard error: on a terminal always up to date, into a file only when it takes long."""

    def __init__(self, total: int | None) -> None:
        self.done, self.failed, self._total = 0, 0, total
        self._begun = self._said = time.monotonic()
        self._live = (
            sys.stderr.isatty() and not sys.stdout.isatty()
        )  # else the lines themselves are the progress
        self._silent = sys.stdout.isatty()
        self._shown = False

    def count(self, *, failed: bool) -> None:
        """One more recording."""
        self.done, self.failed = self.done + 1, self.failed + failed
        now = time.monotonic()
        first = self._said == self._begun
        if now - self._said < (FRAME_S if self._live else FIRST_WORD_S if first else WORD_S) or self._silent:
            return
        self._said = now
        print(
            f"\r{self.text(now)}" if self._live else self.text(now),
            end="" if self._live else "\n",
            file=sys.stderr,
        )
        sys.stderr.flush()
        self._shown = self._live

    def text(self, now: float) -> str:
        """``120 of 340 recordings, 2 with errors, 8.3 a second``."""
        of = "" if self._total is None else f" of {self._total}"
        wrong = f", {self.failed} with errors" if self.failed else ""
        return f"{self.done}{of} recordings{wrong}, {self.done / (now - self._begun):.1f} a second"

    def clear(self) -> None:
        """Take what a terminal shows away, to print something else or to end."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = False


def open_detector(
    study: str, storage: Path, machine: str | None, own: Sequence[str] | None
) -> tuple[Detector, str | None]:
    """The study's student with one bank, and the machine that it is of (None: not said).

    Raises:
        UserError: no such study, none of its students is confirmed, no such machine, or an unusable bank.
    """
    from study.packaging import add_bank, new_detector
    from study.student import open_study, require_machine

    config, folder = open_study(study, storage)
    cache_dir = storage / "cache"
    if not own:
        machine = require_machine(config, cache_dir, machine)
    detector = new_detector(config, folder, cache_dir)
    number = add_bank(detector, config, cache_dir, machine, own)
    if number < FEW:
        print(f"note: a bank of {number} pieces says little; give more normal recordings", file=sys.stderr)
    return detector, machine


def _register(given: argparse.Namespace) -> int:
    from study.packaging import register_now

    if given.recordings:
        raise UserError(f"{given.recordings[0]}: --register scores nothing; leave recordings out")
    storage = storage_folder(given.storage)
    with contextlib.redirect_stdout(sys.stderr):  # whatever libraries have to say
        said = register_now(given.study, storage, given.machine, given.bank, given.tracking_uri)
    print(said)
    return 0


if __name__ == "__main__":
    with outlet():
        code = main()
    sys.exit(code)
