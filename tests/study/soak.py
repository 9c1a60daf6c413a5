"""Many short real trials through two slots, with a fault every minute: ``python tests/study/soak.py [--trials 200]``.

Faults, in an order that the seed decides: a worker, a slot's actor or a controller of Ray Train is killed, a worker is
frozen for a while, MLflow's database is locked by somebody else. Halfway the driver is killed, and the same command
goes on. Memory and open files of every process are read every few seconds. At the end every trial must be accounted
for, three of them give the same numbers when they run undisturbed, and the script prints how each kind of process
fared. Exit code 1: something was lost, or grew.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from tests.processes import NOT_NICE  # noqa: E402
from tests.study.conftest import SMALL, TinyStudy, cleaned_up  # noqa: E402
from tests.study.test_faults import assert_accounted_for, processes  # noqa: E402
from tests.study.test_odd_machines import assert_comes_out_again  # noqa: E402

KINDS = {"slot": "Slot", "control": "Control", "controller": "TrainController", "worker": "RayTrainWorker"}
SAMPLE_S = 5.0
WARM_S, WARM_TRIALS = 60.0, 5  # after which a process has imported and allocated what it needs
MOST_GROWTH = 0.05  # share of its memory that a process may grow by for 100 trials
MOST_FILES = 20  # more open files at the end of a life than after its warm-up


@dataclass
class Life:
    """What was read of one process: age in s, trials of the study that had ended, MB, open files."""

    kind: str
    began: float
    samples: list[tuple[float, int, float, int]] = field(default_factory=list)

    def warm(self) -> list[tuple[float, int, float, int]]:
        return [s for s in self.samples if s[0] >= WARM_S and s[1] - self.samples[0][1] >= WARM_TRIALS]

    def growth(self) -> float | None:
        """MB for 100 trials, by the line through the samples; None for a life too short to tell."""
        warm = self.warm()
        if len(warm) < 10 or warm[-1][1] - warm[0][1] < 20:
            return None
        return 100 * statistics.linear_regression([s[1] for s in warm], [s[2] for s in warm]).slope


class Watch(threading.Thread):
    """Reads every process of the study until it is told to stop."""

    def __init__(self, study: TinyStudy) -> None:
        super().__init__(daemon=True)
        self.study, self.over, self.driver = study, threading.Event(), 0
        self.lives: dict[tuple[int, str], Life] = {}

    def run(self) -> None:
        while not self.over.wait(SAMPLE_S):
            with contextlib.suppress(OSError):
                self.read()

    def read(self) -> None:
        ended = num_ended(self.study)
        found = {(pid, kind) for kind, title in KINDS.items() for pid in processes(self.study, title)}
        for pid, kind in found | {(self.driver, "driver")}:
            with contextlib.suppress(OSError):  # a process that has ended meanwhile
                life = self.lives.setdefault((pid, kind), Life(kind, time.monotonic()))
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                files = len(os.listdir(f"/proc/{pid}/fd"))
                age = time.monotonic() - life.began
                life.samples.append((age, ended, pages * os.sysconf("SC_PAGE_SIZE") / 1e6, files))


def num_ended(study: TinyStudy) -> int:
    return sum(1 for _ in (study.folder.path / "jobs").glob("t*/result.json"))


def killed(title: str) -> Callable[[TinyStudy, random.Random], None]:
    def fault(study: TinyStudy, rng: random.Random) -> None:
        if found := sorted(processes(study, title)):
            os.kill(rng.choice(found), signal.SIGKILL)

    return fault


def frozen(study: TinyStudy, rng: random.Random) -> None:
    if found := sorted(processes(study, "RayTrainWorker")):
        victim = rng.choice(found)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGSTOP)
            time.sleep(10)
            os.kill(victim, signal.SIGCONT)


def locked(study: TinyStudy, rng: random.Random) -> None:
    database = sqlite3.connect(study.storage / "mlflow.db", timeout=5)
    with contextlib.suppress(sqlite3.OperationalError):  # it is being written, which is as good
        database.execute("BEGIN EXCLUSIVE")
        time.sleep(25)
        database.rollback()
    database.close()


FAULTS: dict[str, Callable[[TinyStudy, random.Random], None]] = {
    "a worker was killed": killed("RayTrainWorker"),
    "a slot was killed": killed("Slot"),
    "a controller was killed": killed("TrainController"),
    "a worker was frozen for 10 s": frozen,
    "MLflow's database was locked for 25 s": locked,
}


def soak(study: TinyStudy, args: argparse.Namespace, log: Path) -> tuple[Watch, Counter[str], int]:
    """Run the study to its end under faults; returns what was read, how often each fault was injected, and trials.

    The driver is killed halfway. When time is up it is told to stop, and only what it had begun is brought to an end.
    """
    rng, done, watch = random.Random(args.seed), Counter[str](), Watch(study)
    order = (what for _ in itertools.count() for what in rng.sample(sorted(FAULTS), len(FAULTS)))
    watch.start()
    trials, began, halfway = args.trials, time.monotonic(), False
    due = began + args.every
    while True:
        with open(log, "a") as said:
            driver = subprocess.Popen(
                [sys.executable, "study/run.py", *study.arguments("--trials", str(trials))],
                cwd=ROOT,
                env=study.environment,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        watch.driver, at = driver.pid, num_ended(study)
        study.wait_for(lambda a=at, d=driver: num_ended(study) > a or d.poll() is not None, "a trial", 900)
        while driver.poll() is None:
            time.sleep(0.5)
            spent = (time.monotonic() - began) / (60 * args.minutes)
            if not halfway and (2 * num_ended(study) >= trials or spent > 0.5):
                halfway = True
                driver.kill()
                done["the driver was killed"] += 1
            elif trials == args.trials and spent > 1:
                driver.terminate()
                driver.wait()
                trials = len(list((study.folder.path / "jobs").glob("t*/job.json")))
                done["the driver was told to stop"] += 1
            elif time.monotonic() > due:
                due = time.monotonic() + args.every
                what = next(order)
                print(f"{num_ended(study)} trials have ended; {what}", flush=True)
                FAULTS[what](study, rng)
                done[what] += 1
        if driver.wait() == 0:
            break
        if driver.returncode not in (-signal.SIGKILL, 130):
            raise SystemExit(f"the study ended with {driver.returncode}: {log}")
    watch.over.set()
    watch.join()
    return watch, done, trials


def table(lives: list[Life], trials: int) -> tuple[list[str], bool]:
    """A line for each kind of process, of its longest life; and whether anything grew.

    What comes after the last trial, the report and its figures, is left out.
    """
    lines, grown = [], False
    for life in lives:
        life.samples = [s for s in life.samples if s[1] < trials]
    for kind in ("driver", *KINDS):
        of_kind = [life for life in lives if life.kind == kind and life.warm()]
        if not of_kind:
            continue
        longest = max(of_kind, key=lambda life: life.samples[-1][1] - life.samples[0][1])
        first, last = longest.warm()[0], longest.warm()[-1]
        slopes = [g for life in of_kind if (g := life.growth()) is not None]
        most_files = max(life.warm()[-1][3] - life.warm()[0][3] for life in of_kind)
        slope = statistics.median(slopes) if slopes else float("nan")
        grown |= slope > MOST_GROWTH * first[2] or most_files > MOST_FILES
        lines.append(
            f"{kind:<11} {len(of_kind):3d} processes; longest: {last[0]:5.0f} s, {last[1] - first[1]:4d} trials, "
            f"{first[2]:6.1f} to {last[2]:6.1f} MB, {first[3]:3d} to {last[3]:3d} files; "
            f"median growth for 100 trials {slope:+.1f} MB"
        )
    return lines, grown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no more trials begin")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two faults")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "soak.json", help="what was read")
    args = parser.parse_args()
    changed = ("slots.count=2", f"training.epochs={args.epochs}", "confirm.seeds=0")
    settings = [word for setting in (*SMALL, *changed) for word in ("--set", setting)]
    ray_folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    storage = Path(tempfile.mkdtemp(prefix="soak-"))
    with cleaned_up(TinyStudy(storage, ray_folder, settings=tuple(settings), variables=NOT_NICE)) as study:
        began = time.monotonic()
        watch, done, trials = soak(study, args, storage / "said.txt")
        took_s = time.monotonic() - began
        args.output.parent.mkdir(parents=True, exist_ok=True)
        read = [vars(life) | {"pid": pid} for (pid, _), life in watch.lives.items()]
        args.output.write_text(json.dumps(read))
        lines, grown = table([life for life in watch.lives.values() if life.samples], trials)
        print(f"{trials} trials in {took_s / 60:.1f} min, {done.total()} faults:")
        print("\n".join([*(f"  {number} x {what}" for what, number in done.items()), *lines]), flush=True)
        assert_accounted_for(study, trials=trials)
        for number in random.Random(args.seed).sample(range(trials), 3):
            assert_comes_out_again(study, f"t{number:04d}")
    print("all accounted for; three run again gave the same numbers")
    shutil.rmtree(storage)
    return int(grown)


if __name__ == "__main__":
    sys.exit(main())
