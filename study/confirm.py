"""The confirmation stage: who is trained again, with which seeds, on the machines that no trial has seen.

Finalists are chosen from the search trials alone: full-length trials by their last ``official`` on the search
machines. A report is about the best of them: nothing held out had a part in choosing it, so its confirmed score
flatters nobody. Scores on ``confirm`` machines only say whether finalists that race need another seed
(``study/race.py``), and which student is *used* (``winner``): that of the finalist who won, once intervals have parted,
since several seeds on new machines say more than one search trial did. That finalist's confirmed score was picked among
several and may be lucky; the report says so where it is another than its best. While the ranking is open, the search's
choice stands. Asking again gives the same answers.
Jobs come seed by seed, so that a study interrupted half-way holds complete pairs for the seeds it has. A search
extended after its confirmation may name another winner; that one gets names of its own (``c-best-t0031-s0``) and the
earlier jobs stay what they were.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import search_spaces
from search_spaces.joint import SYSTEM
from study.folder import StudyFolder
from study.search import ENTRY, build_job, label_of
from trainables.errors import UserError
from trainables.settings import Scalar

if TYPE_CHECKING:
    from study.cells import Cells
    from study.config import StudyConfig
    from study.race import Race

Job = dict[str, Any]
FROZEN = ("teacher", "oracle")  # references, of which a study has those that its evaluation names
YARDSTICK = "autoencoder"  # the challenge's baseline: who, and the system that trains it
FIRST_SEED = 1000  # confirmation draws what no search trial has drawn


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A search trial that is confirmed.

    name: ``best``, ``best2``, ... by rank; where several systems are searched the best of the others is ``best-adapt``,
    and so on. who: the group its jobs carry (``c-<who>-s<seed>``): its name, or the
    recipe it is. baseline: that recipe's name, else None. official: its score on the search machines, in points.
    """

    name: str
    who: str
    trial_id: str
    official: float
    params: Mapping[str, Scalar]
    baseline: str | None


def ranking(folder: StudyFolder) -> list[tuple[float, Job]]:
    """Full-length search trials with their last ``official``, best first; ties go to the earlier trial."""
    found = []
    for job_id in folder.job_ids():
        job, result = folder.job(job_id), folder.result(job_id)
        if job is None or result is None or job["role"] != "trial" or result["state"] != "finished":
            continue
        records = folder.records(job_id)
        metrics = records[-1]["metrics"] if records else result["metrics"]
        official = metrics.get("official")
        if isinstance(official, int | float) and math.isfinite(official):
            found.append((float(official), job))
    return sorted(found, key=lambda pair: (-pair[0], pair[1]["id"]))


def finalists(config: StudyConfig, folder: StudyFolder) -> list[Finalist]:
    """The ``confirm.finalists`` best search trials of each system, settings that repeat a better one left out.

    A published recipe that ranks among them is one of them, under its own name.
    """
    recipes = {name: dict(params) for name, params in search_spaces.load(config.system).RECIPES.items()}
    chosen: list[Finalist] = []
    for official, job in ranking(folder):
        params = dict(job["params"])
        system = params.get(SYSTEM)
        before = sum(f.params.get(SYSTEM) == system for f in chosen)
        if before >= config.confirm.finalists or any(params == f.params for f in chosen):
            continue
        baseline = job["baseline"] or next((name for name, known in recipes.items() if known == params), None)
        name = f"best{before + 1 if before else ''}"
        name = f"{name}-{system}" if system and chosen else name
        who = baseline or name
        chosen.append(
            Finalist(
                name=name, who=who, trial_id=job["id"], official=official, params=params, baseline=baseline
            )
        )
    if not config.confirm.seeds:
        return chosen
    return [dataclasses.replace(f, who=_free_name(config, folder, f)) for f in chosen]


def confirm_jobs(config: StudyConfig, folder: StudyFolder, *, entry: str = ENTRY) -> list[Job]:
    """All jobs of the confirmation stage, seed by seed; none without seeds or without a finished trial.

    With several finalists these are the jobs so far: asked again when they have ended, it adds those of the next seed
    while the race is open.

    Raises:
        UserError: ``confirm.recipes`` names a recipe that the system does not have.
    """
    if not config.confirm.seeds:
        return []
    recipes = search_spaces.load(config.system).RECIPES
    for name in config.confirm.recipes:
        if name not in recipes:
            raise UserError(f"confirm.recipes: {name!r} is no recipe; allowed are {', '.join(recipes)}")
    chosen = finalists(config, folder)
    if not chosen:
        return []
    cache_dir = folder.path.absolute().parent / "cache"
    frozen = dataclasses.replace(config, system="frozen")

    def job(who: str, seed: int, **rest: Any) -> Job:
        return build_job(
            rest.pop("config", config),
            folder,
            job_id=job_name(who, seed),
            role="confirm",
            cache_dir=cache_dir,
            seed=FIRST_SEED + seed,
            split="confirm",
            entry=entry,
            **rest,
        )

    def reference_jobs(seed: int) -> list[Job]:
        return [
            job(who, seed, config=frozen, params={"reference": who}, label=f"frozen {who}")
            for who in config.evaluation.references
        ]

    def finalist_job(finalist: Finalist, seed: int) -> Job:
        label = f"{finalist.name}: {label_of(finalist.params)}"
        made = job(finalist.who, seed, params=finalist.params, label=label, baseline=finalist.baseline)
        return {**made, "source": finalist.trial_id}

    jobs = []
    for seed in range(config.confirm.seeds):
        jobs += reference_jobs(seed)
        if config.yardstick.confirm:
            jobs.append(job(YARDSTICK, seed, **yardstick(config)))
        for who in config.confirm.recipes:
            label = f"{who}: {label_of(recipes[who])}"
            jobs.append(job(who, seed, params=recipes[who], label=label, baseline=who))
        jobs += [finalist_job(f, seed) for f in chosen if f.who not in config.confirm.recipes]
    if len(chosen) < 2:
        return jobs
    from study.race import run_race

    scored = finalist_cells(config, folder, chosen)
    for seed in range(config.confirm.seeds, config.most_seeds):
        race = run_race(scored, first=config.confirm.seeds, most=config.most_seeds, until=seed)
        if race.num_seeds < seed or race.decided:
            break
        jobs += reference_jobs(seed)
        jobs += [finalist_job(f, seed) for f in chosen if f.who in race.open]
    return jobs


def race_of(config: StudyConfig, folder: StudyFolder, chosen: Sequence[Finalist]) -> Race:
    """Where the race of the finalists stands."""
    from study.race import run_race

    cells = finalist_cells(config, folder, chosen)
    return run_race(cells, first=config.confirm.seeds, most=config.most_seeds)


def finalist_cells(config: StudyConfig, folder: StudyFolder, chosen: Sequence[Finalist]) -> dict[str, Cells]:
    """What each finalist's confirmed seeds scored."""
    from study.cells import gather

    most = config.most_seeds
    cells = {}
    for finalist in chosen:
        jobs = {seed: job_name(finalist.who, seed) for seed in range(most)}
        ended = {s: job for s, job in jobs.items() if (folder.result(job) or {}).get("state") == "finished"}
        tables, queries = (
            {s: read(job) for s, job in ended.items()} for read in (folder.table, folder.queries)
        )
        cells[finalist.who] = gather(tables, config.scoring.backend, queries)
    return cells


def yardstick(config: StudyConfig) -> dict[str, Any]:
    """What makes a job of either stage one of the challenge's autoencoder."""
    return {
        "config": dataclasses.replace(config, system=YARDSTICK),
        "params": {"steps": config.yardstick.steps},
        "label": "DCASE autoencoder",
    }


def job_name(who: str, seed: int) -> str:
    """The id of a confirmation job."""
    return f"c-{who}-s{seed}"


def read_name(job_id: str) -> tuple[str, int] | None:
    """Who and seed of a confirmation job's id, None for other ids."""
    match = re.fullmatch(r"c-(.+)-s(\d+)", job_id)
    return (match[1], int(match[2])) if match else None


def winner(config: StudyConfig, folder: StudyFolder, chosen: Sequence[Finalist]) -> Finalist | None:
    """Whose student is used: the finalist who won a race that is decided, else the search's best."""
    if len(chosen) > 1 and config.confirm.seeds:
        race = race_of(config, folder, chosen)
        if race.decided:
            return next(f for f in chosen if f.who == race.open[0])
    return chosen[0] if chosen else None


def student_path(config: StudyConfig, folder: StudyFolder) -> Path | None:
    """The checkpoint of the winner's first confirmed seed, None if there is none. No score chooses among seeds."""
    won = winner(config, folder, finalists(config, folder))
    if won is None or not config.confirm.seeds:
        return None
    for seed in range(config.confirm.seeds):
        result = folder.result(job_name(won.who, seed))
        if result is not None and result["state"] == "finished":
            return folder.checkpoint_path(job_name(won.who, seed))
    return None


def _free_name(config: StudyConfig, folder: StudyFolder, finalist: Finalist) -> str:
    """The finalist's own name unless jobs of another setting have taken it."""
    if finalist.baseline:
        return finalist.who
    for job_id in folder.job_ids():
        named, job = read_name(job_id), folder.job(job_id)
        if named and named[0] == finalist.name and job is not None and job["params"] != finalist.params:
            return f"{finalist.name}-{finalist.trial_id}"
    return finalist.name
