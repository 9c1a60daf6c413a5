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
import importlib
import os
import signal
import sys
import time
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

BEGUN = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
if sys.path and Path(sys.path[0] or ".").resolve() == ROOT / "study":
    sys.path[0] = str(ROOT)  # run as a script: the project's packages lie one folder up

from study.command import Command, parse  # noqa: E402
from study.driver import handlers_restored, ignore_stops, interrupt, only_driver  # noqa: E402
from study.folder import StudyFolder  # noqa: E402
from study.limits import FROZEN  # noqa: E402
from study.outlet import outlet  # noqa: E402
from study.tracking_uri import scrub  # noqa: E402
from trainables.errors import UserError  # noqa: E402
from trainables.files import no_room  # noqa: E402

if TYPE_CHECKING:
    from study.config import StudyConfig
    from study.probe import Probe
    from study.rendering import Rendering
    from study.search import Search

FLUSH_S, HURRIED_FLUSH_S = 60.0, 5.0  # how long the end of a study waits for MLflow; when interrupted
PACKING_S = (
    5.0  # how long it waits for the best student to be packed, which begins before the report is written
)
TRACKING_PATIENCE_S = (
    120.0  # how long MLflow may wait for the first epoch, whose way to the screen it would lengthen
)


def main(arguments: list[str] | None = None) -> int:
    """Run one study; returns the exit code."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    command = None
    try:
        with handlers_restored():
            command = parse(arguments)
            if command.reproduce is not None:
                from study.reproduce import reproduce

                return reproduce(command.reproduce, command.storage, command.tracking_uri)
            if command.dry_run:
                from study.dryrun import dry_run

                return dry_run(command)
            return run(command)
    except UserError as error:
        print(f"error: {without_secrets(str(error), command)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        from study.provenance import command_line

        print(
            "\ninterrupted: all jobs that ended are kept; to go on, give the same command again:",
            file=sys.stderr,
        )
        print(f"  {command_line()}", file=sys.stderr)
        return 130
    except Exception as error:
        if no_room(error):
            text = without_secrets(" ".join(str(error).split()), command)
            text = text if len(text) <= 300 else f"...{text[-200:]}"  # Ray's quote all that led to them
            fix = (
                "make room, or the folder writable again, and give the same command again: what ended is kept"
            )
            print(f"error: cannot write ({text}); {fix}", file=sys.stderr)
            return 1
        text = without_secrets(traceback.format_exc(), command)
        print(text, file=sys.stderr, end="")
        kept = ""
        if command is not None and command.reproduce is None:
            with contextlib.suppress(OSError):
                command.folder.mkdir(parents=True, exist_ok=True)
                (command.folder / "traceback.txt").write_text(text)
                kept = f"; the traceback is kept in {command.folder / 'traceback.txt'}"
        print(
            f"error: unexpected {type(error).__name__}: "
            f"{without_secrets(' '.join(str(error).split()), command)}{kept}",
            file=sys.stderr,
        )
        return 1


def without_secrets(text: str, command: Command | None) -> str:
    """``text`` without the passwords and tokens of the addresses in use: others' exceptions quote them."""
    from study.trial_store import URL

    given = command.tracking_uri if command else ""
    for uri in filter(None, (given, os.environ.get("MLFLOW_TRACKING_URI"), os.environ.get(URL))):
        text = scrub(text, uri)
    return scrub(text, "://")


def run(command: Command) -> int:
    """The study from preflight to report, with this process as its only driver."""
    from study import trial_store
    from study.preflight import preflight
    from study.provenance import describe, hardware
    from study.rendering import Rendering, render_corpus

    config, folder = command.config, StudyFolder(command.folder)
    print(f"study {config.name}; results in {command.folder}", flush=True)
    checked = preflight(config, command.storage, command.tracking_uri)
    trial_store.check()
    for note in checked.notes:
        print(f"note: {note}", flush=True)
    if config.corpus.kind != "factory":
        render_corpus(command)  # recordings can turn out unusable: nothing is started before that is known
    with only_driver(folder):
        study = describe(config, folder, checked)
        if checked.files:
            folder.write_corpus_files(checked.files)
        search = open_search(command, folder) if folder.study() is not None else None
        if search is not None and nothing_left(command, folder, search):
            print("every job of this study has ended: nothing is left to train", flush=True)
            folder.write_study(study)
            return search_and_report(command, folder, study, search)
        print("starting Ray and the workers, which takes about a minute", flush=True)
        rendering = Rendering(command, over=search is not None and search.over)

        from study.cluster import attach_or_start

        with attach_or_start(config.slots, command.storage) as cluster:
            signal.signal(signal.SIGTERM, interrupt)  # Ray has put its own handler there
            study["hardware"] = hardware()
            folder.write_study(study)
            print(cluster.text, flush=True)
            search = search or open_search(command, folder)
            code = search_and_report(command, folder, study, search, rendering=rendering, own=cluster.own)
            cluster.failed = code != 0
            return code


def open_search(command: Command, folder: StudyFolder) -> Search | Probe:
    """The study's search or probe, as far as it has come."""
    import search_spaces
    from study.search import Search

    cache_dir = command.storage / "cache"
    if command.config.system == FROZEN:
        from study.probe import Probe

        return Probe(command.config, folder, cache_dir=cache_dir)
    system = search_spaces.load(command.config.system)
    return Search(command.config, folder, space=system.space, recipes=system.RECIPES, cache_dir=cache_dir)


def nothing_left(command: Command, folder: StudyFolder, search: Search | Probe) -> bool:
    """Whether every job of the study has ended, so that neither Ray nor workers are needed."""
    from study.confirm import confirm_jobs

    jobs = [*first_jobs(command, folder), *confirm_jobs(command.config, folder)]
    return search.over and all(folder.result(job["id"]) is not None for job in jobs)


def search_and_report(
    command: Command,
    folder: StudyFolder,
    study: dict[str, Any],
    search: Search | Probe,
    *,
    rendering: Rendering | None = None,
    own: bool = False,
) -> int:
    """Everything that needs Ray (one of this study's ``own``, or a cluster), unless there is no ``rendering`` to train
    on, then the findings."""
    from search_spaces import systems_of
    from study.agenda import StudyFailed
    from study.packaging import Packing
    from study.tracking import Tracker

    config = command.config
    if rendering:
        importlib.import_module("study.tuning")  # heavy, and the tracker's thread imports as well
    patience_s = TRACKING_PATIENCE_S if rendering else 0.0
    tracker = Tracker(command.tracking_uri, config.name, folder, patience_s=patience_s)
    what = f"{config.search.trials} trials of {' and '.join(systems_of(config.system))}"
    if config.system == FROZEN:
        what = f"Every layer, pooling and back end of the frozen encoder {config.encoder.name}"
    tracker.start(study, f"{what} on {config.corpus.kind}.")
    status, code, flush_s = "FAILED", 1, FLUSH_S
    packing, student = Packing(config, folder, command.storage / "cache"), None
    try:
        if rendering:
            run_all_jobs(command, folder, search, tracker, rendering, own)
        packing.start()
        report(command, folder, tracker)
        print(f"\nfindings   {command.folder / 'findings.md'}", flush=True)
        student = packing.result(PACKING_S)
        status, code = "FINISHED", 0
    except StudyFailed as error:
        print(f"error: the study failed: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        ignore_stops()  # what follows takes seconds, and cut short it would leave processes behind
        status, flush_s = "KILLED", HURRIED_FLUSH_S
        raise
    finally:
        packing.stop()
        tracker.finish(status)
        if student:
            tracker.log_model(student)
        tracker.close(flush_s)
    print(f"browse it  {browser_command(command)}", flush=True)
    if code == 0 and config.confirm.seeds:
        print(f"use it     {packing.command} new/ --bank normal/", flush=True)
        if packing.problem:
            print(
                f"note: the best student is not in MLflow yet ({packing.problem}); {packing.command} --register"
            )
    return code


def report(command: Command, folder: StudyFolder, tracker: Any) -> None:
    """Write the findings, give them to MLflow, and print the comparison."""
    if command.config.system == FROZEN:
        from study import probe_report

        found = probe_report.write_report(folder, command.config)
        tracker.log_artifacts(found.files)
        tracker.set_parent(*probe_report.headline(found))
        print(flush=True)
        probe_report.print_ranking(found)
        return
    from study.report import write_report
    from study.terminal import print_comparison

    summary = write_report(folder, command.config)
    tracker.log_artifacts(summary.files)
    tracker.set_parent(headline(folder), {})
    print(flush=True)
    print_comparison(summary)


def run_all_jobs(
    command: Command,
    folder: StudyFolder,
    search: Search | Probe,
    tracker: Any,
    rendering: Rendering,
    own: bool,
) -> None:
    """References, trials and confirmations on warm slots. Raises StudyFailed if no trial works.

    The slots start while the corpus is still being made. Their workers wait for what they need of it, and if it cannot
    be made, the run ends with that error before a job has.
    """
    from study.confirm import confirm_jobs
    from study.probe import Probe
    from study.progress import Progress
    from study.resources import num_cpus
    from study.slots import num_up, slot_class
    from study.tuning import run_jobs

    config = command.config
    earlier = [
        (job, result)
        for job_id in folder.job_ids()
        if (job := folder.job(job_id)) is not None and (result := folder.result(job_id)) is not None
    ]
    expected = {"frozen trial": len(search.jobs)} if isinstance(search, Probe) else expected_jobs(config)
    progress = Progress(expected, num_slots=config.slots.count, begun=BEGUN, earlier=earlier)
    if earlier:
        progress.say(f"going on: {len(earlier)} jobs have ended already")

    slots = command.folder / "slots"

    def after_search() -> list[dict[str, Any]]:
        rendering.hold_out()
        jobs = confirm_jobs(config, folder)
        progress.confirming(jobs)
        return jobs

    run_jobs(
        config,
        search,
        slot_class(config.slots, storage=slots),
        before_search=first_jobs(command, folder),
        after_search=after_search,
        listeners=[tracker, progress, rendering],
        watch=rendering.check,
        start_at_once=max(1, num_cpus() // 2),
        # On a cluster the demand of all slots has to be seen at once, to have the nodes for them started.
        num_up=(lambda: num_up(slots)) if own else None,
    )


def first_jobs(command: Command, folder: StudyFolder) -> list[dict[str, Any]]:
    """What every trial is measured against, on the search machines: the references, then the challenge's baseline."""
    from study.confirm import YARDSTICK, yardstick
    from study.search import build_job

    jobs = reference_jobs(command, folder)
    if command.config.yardstick.search:
        made: dict[str, Any] = {"role": "baseline", "baseline": YARDSTICK, **yardstick(command.config)}
        made |= {"job_id": f"b-{YARDSTICK}", "cache_dir": command.storage / "cache"}
        jobs.append(build_job(made.pop("config"), folder, **made))
    return jobs


def reference_jobs(command: Command, folder: StudyFolder) -> list[dict[str, Any]]:
    """The frozen references on the search machines: what every trial is measured against."""
    from study.search import build_job

    if command.config.system == FROZEN:
        return []  # a probe has nothing else to be measured against
    frozen = replace(command.config, system="frozen")
    return [
        build_job(
            frozen,
            folder,
            job_id=f"b-{name}",
            role="baseline",
            params={"reference": name},
            cache_dir=command.storage / "cache",
            label=f"frozen {name}",
            baseline=name,
        )
        for name in command.config.evaluation.references
    ]


def expected_jobs(config: StudyConfig) -> dict[str, int]:
    """Jobs of a whole study by kind (``study/progress.py``), if no finalist is a recipe that is confirmed anyway."""
    confirm, references, yardstick = config.confirm, config.evaluation.references, config.yardstick
    beside = {
        "yardstick baseline": int(yardstick.search),
        "yardstick confirm": confirm.seeds * yardstick.confirm,
    }
    return {
        "frozen baseline": len(references),
        "trial": config.search.trials,
        "frozen confirm": confirm.seeds * len(references),
        "confirm": confirm.seeds * (len(confirm.recipes) + config.num_finalists),
        **{kind: number for kind, number in beside.items() if number},
    }


def headline(folder: StudyFolder) -> dict[str, float]:
    """The best full-length trial's numbers, for the study's own run."""
    from study.confirm import ranking

    ranked = ranking(folder)
    if not ranked:
        return {}
    metrics = (folder.result(ranked[0][1]["id"]) or {"metrics": {}})["metrics"]
    wanted = ("official", "low/official", "mid/official", "high/official", "gap_closed")
    return {f"best/{k}": metrics[k] for k in wanted if metrics.get(k) is not None}


def browser_command(command: Command) -> str:
    """What opens MLflow's pages for this study."""
    from study.tracking import ui_command

    usual = command.storage == ROOT / "runs" and command.tracking_uri.startswith("sqlite:")
    return (
        "make ui"
        if usual and Path(sys.prefix) == ROOT / ".venv"
        else ui_command(command.tracking_uri, command.storage)
    )


if __name__ == "__main__":
    with outlet():
        code = main()
        if code == 130:
            ignore_stops()  # Ray's and Python's own ends print tracebacks otherwise
    sys.exit(code)
