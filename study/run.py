"""Create one study, or continue it.

    python study/run.py                                              # laptop: a few minutes on two cores
    python study/run.py --preset stems --set corpus.manifest=FILE    # your own recordings
    ray job submit --working-dir . -- python study/run.py --preset factory --storage /shared/studies

A study is a folder. Every job's outcome is on disk before anything else hears of it, so the same command always
continues, whatever ended the one before. Exit codes: 0 complete and reported, 1 failed, 2 refused before anything
was started, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

BEGUN = time.time()
ROOT = Path(__file__).resolve().parents[1]
if sys.path and Path(sys.path[0] or ".").resolve() == ROOT / "study":
    sys.path[0] = str(ROOT)  # run as a script: the project's packages lie one folder up

from study.command import Command, parse  # noqa: E402
from study.folder import StudyFolder  # noqa: E402
from trainables.errors import UserError  # noqa: E402

if TYPE_CHECKING:
    from study.config import StudyConfig
    from study.summary import Summary

REPORTED_VERSIONS = ("ray", "torch", "torchaudio", "optuna", "mlflow", "numpy", "scikit-learn")
FLUSH_S = 60.0  # how long the end of a study waits for MLflow


def main(arguments: list[str] | None = None) -> int:
    """Run one study; returns the exit code."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    try:
        command = parse(arguments)
        if command.dry_run:
            return dry_run(command)
        with only_driver(command):
            return run(command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: finished trials are kept; give the same command again to continue", file=sys.stderr)
        return 130


def run(command: Command) -> int:
    """The study from preflight to report, with this process as its only driver."""
    from study.preflight import preflight

    config, folder = command.config, StudyFolder(command.folder)
    print(f"study {config.name}; results in {command.folder}", flush=True)
    checked = preflight(config, command.storage, command.tracking_uri)
    study = describe(command, folder, checked.notes)
    corpus = Background(lambda: render_corpus(command))

    from study.cluster import attach_or_start

    with attach_or_start(config.slots, command.storage) as cluster:
        corpus.join()
        folder.write_study(study)
        print(f"{cluster.text}", flush=True)
        return search_and_report(command, folder, study)


def search_and_report(command: Command, folder: StudyFolder, study: dict[str, Any]) -> int:
    """Everything that needs Ray, then the findings."""
    import search_spaces
    from study.agenda import StudyFailed
    from study.confirm import confirm_jobs
    from study.progress import Progress
    from study.report import print_comparison, write_report
    from study.search import Search
    from study.slots import slot_class
    from study.tracking import Tracker, ui_command
    from study.tuning import run_jobs

    config = command.config
    system = search_spaces.load(config.system)
    search = Search(
        config, folder, space=system.space, recipes=system.RECIPES, cache_dir=command.storage / "cache"
    )
    tracker = Tracker(command.tracking_uri, config.name, folder)
    tracker.start(study, f"{config.search.trials} trials of {config.system} on {config.corpus.kind}.")
    done = sum(folder.result(job_id) is not None for job_id in folder.job_ids())
    progress = Progress(expected_jobs(config), num_slots=config.slots.count, begun=BEGUN, done=done)
    if done:
        progress.say(f"continuing: {done} jobs are done already")
    status, code = "FAILED", 1
    try:
        run_jobs(
            config,
            search,
            slot_class(config.slots, storage=command.folder / "slots"),
            before_search=reference_jobs(config, folder, command.storage / "cache"),
            after_search=lambda: confirm_jobs(config, folder),
            listeners=[tracker, progress],
        )
        summary = write_report(folder, config)
        tracker.log_artifacts(summary.files)
        tracker.set_parent(headline(folder), {})
        print_comparison(summary)
        print(f"\nfindings   {command.folder / 'findings.md'}", flush=True)
        status, code = "FINISHED", 0
    except StudyFailed as error:
        print(f"error: the study failed: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)
        tracker.close(FLUSH_S)
    print(f"browse it  {ui_command(command.tracking_uri, command.storage)}", flush=True)
    return code


def reference_jobs(config: StudyConfig, folder: StudyFolder, cache_dir: Path) -> list[dict[str, Any]]:
    """The frozen teacher and the oracle on the search machines: what every trial is measured against."""
    from study.confirm import FROZEN
    from study.search import build_job

    frozen = replace(config, system="frozen")
    return [
        build_job(
            frozen,
            folder,
            job_id=f"b-{name}",
            role="baseline",
            params={"reference": name},
            cache_dir=cache_dir,
            label=f"frozen {name}",
            baseline=name,
        )
        for name in FROZEN
    ]


def expected_jobs(config: StudyConfig) -> int:
    """Jobs of a whole study, if no finalist turns out to be a recipe that is confirmed anyway."""
    from study.confirm import FROZEN

    confirm = config.confirm
    return len(FROZEN) + config.search.trials + confirm.seeds * (len(FROZEN) + len(confirm.recipes) + confirm.finalists)


def headline(folder: StudyFolder) -> dict[str, float]:
    """The best full-length trial's numbers, for the study's own run."""
    from study.confirm import ranking

    ranked = ranking(folder)
    if not ranked:
        return {}
    metrics = (folder.result(ranked[0][1]["id"]) or {"metrics": {}})["metrics"]
    wanted = ("official", "low/official", "mid/official", "high/official", "gap_closed")
    return {f"best/{k}": metrics[k] for k in wanted if metrics.get(k) is not None}


def describe(command: Command, folder: StudyFolder, notes: tuple[str, ...]) -> dict[str, Any]:
    """What ``study.json`` says. Raises UserError if the folder holds another study of that name."""
    from study.config import differences, identity
    from trainables.settings import to_dict

    known, config = folder.study(), command.config
    if known is not None and known["identity"] != identity(config):
        changed = "; ".join(differences(known["config"], config)) or "the content of a file it reads"
        raise UserError(
            f"--name {config.name}: {command.folder} holds another study ({changed}); choose another name or storage"
        )
    words = [sys.executable.rsplit("/", 1)[-1], *sys.argv]
    return {
        "name": config.name,
        "config": to_dict(config),
        "identity": identity(config),
        "command": scrubbed(" ".join(words)),
        "versions": {"python": platform.python_version(), "commit": commit()}
        | {name: version(name) for name in REPORTED_VERSIONS},
        "hardware": {"host": platform.machine(), "cores": os.cpu_count(), "system": platform.system()},
        "notes": list(notes),
        "created": known["created"] if known else datetime.now(UTC).isoformat(timespec="seconds"),
    }


def scrubbed(text: str) -> str:
    """A command line without the passwords of the addresses in it."""
    from study.tracking import redact

    return " ".join(redact(word) if "://" in word else word for word in text.split(" "))


def commit() -> str:
    """The commit of this checkout, with a mark if files differ from it; ``unknown`` outside of git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


class Background:
    """A piece of work beside the start of Ray; ``join`` waits for it and raises what it raised."""

    def __init__(self, work: Any) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Any) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error

    def join(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


def render_corpus(command: Command) -> None:
    """Render the corpus into the cache if it is not there, with a word about it when it takes long."""
    from trainables.data.corpus import open_corpus

    spoke = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal spoke
        if time.monotonic() - spoke > 5:
            spoke = time.monotonic()
            print(f"preparing the corpus: {done} of {total} clips", flush=True)

    open_corpus(command.config.corpus, command.storage / "cache", progress)


@contextlib.contextmanager
def only_driver(command: Command) -> Iterator[None]:
    """Hold the study's lock. The kernel frees it when this process ends, however it ends.

    Raises:
        UserError: another process drives this study; the message names it.
    """
    from study.preflight import check_folder
    from trainables.files import exclusive

    check_folder(command.storage)
    holder = command.folder / "driver.json"
    with exclusive(command.folder / "driver", wait=False) as mine:
        if not mine:
            with contextlib.suppress(OSError, ValueError):
                other = json.loads(holder.read_text())
                raise UserError(
                    f"study {command.config.name} is being run by process {other['pid']} on {other['host']} since "
                    f"{other['since']}; wait for it, or stop it first"
                )
            raise UserError(f"study {command.config.name} is being run by another process; wait for it, or stop it")
        since = datetime.now(UTC).isoformat(timespec="seconds")
        holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n")
        yield


def dry_run(command: Command) -> int:
    """Print the resolved study, its resources and one sampled trial per branch of the space; start nothing."""
    import search_spaces
    from study.preflight import preflight
    from trainables.settings import to_dict

    checked = preflight(command.config, command.storage, command.tracking_uri, dry_run=True)
    print(f"study {command.config.name} (dry run: nothing is started)")
    print("\n".join(checked.lines))
    for note in checked.notes:
        print(f"note       {note}")
    print(json.dumps(to_dict(command.config), indent=1))
    system = search_spaces.load(command.config.system)
    print("\npublished recipes")
    for name, params in system.RECIPES.items():
        mark = "tried first" if name in command.config.search.recipes else "not in search.recipes"
        print(f"  {name} ({mark}): {json.dumps(dict(params))}")
    print("\none sampled trial per branch")
    for label, params in sampled_branches(system, command.config.search.seed):
        print(f"  {label}: {json.dumps(params)}")
    return 0


def sampled_branches(system: Any, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """One random trial for every choice of every ``*_kind``."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    wanted = {(key, kind) for key, kinds in system.BRANCHES.items() for kind in kinds}
    for _ in range(2000):
        params = dict(system.space(study.ask()))
        met = sorted((key, str(params[key])) for key in system.BRANCHES if (key, params[key]) in wanted)
        if met:
            wanted -= set(met)
            yield ", ".join(f"{key}={kind}" for key, kind in met), params
        if not wanted:
            return


if __name__ == "__main__":
    sys.exit(main())
