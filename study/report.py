"""The findings of a study: ``findings.md``, ``findings.html`` and figures; and several studies side by side.

    python study/report.py quick-1a2b3c4d                     # write the findings again
    python study/report.py quick-1a2b3c4d factory-5e6f7a8b    # side by side: comparison.md, .html and .png

Everything is read from the study folder; a partial study gives a report that says what is missing. Files are replaced
whole, so a crash leaves the report of before. A figure that cannot be drawn is left out and named, never fatal.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

ROOT = Path(__file__).resolve().parents[1]
if sys.path and Path(sys.path[0] or ".").resolve() == ROOT / "study":
    sys.path[0] = str(ROOT)  # run as a script: the project's packages lie one folder up

from study import findings, health, plots, search_plots, setting_plots  # noqa: E402
from study.confirm import FIRST_SEED  # noqa: E402
from study.document import Block, Bullets, Code, Heading, Picture, Table, Text, markdown, page  # noqa: E402
from study.folder import StudyFolder  # noqa: E402
from study.limits import FROZEN  # noqa: E402
from study.outlet import outlet  # noqa: E402
from study.runs import Run, elapsed_s  # noqa: E402
from study.summary import Summary, summarise, text_of  # noqa: E402
from study.tables import confirmed_table, cost_table, paired_table, search_table  # noqa: E402
from trainables.errors import UserError  # noqa: E402
from trainables.files import write_atomically  # noqa: E402
from trainables.settings import to_dict  # noqa: E402

if TYPE_CHECKING:
    from study.config import StudyConfig

logger = logging.getLogger(__name__)

FIGURES: dict[str, plots.Draw] = {
    "bands.png": plots.band_curves,
    "auc.png": plots.auc_curves,
    "heat_map.png": plots.heat_map,
    "machines.png": plots.machine_dots,
    "best_setting.png": setting_plots.best_setting,
    "importance.png": search_plots.importance_bars,
    "parallel.png": search_plots.parallel,
    "pareto.png": search_plots.pareto,
    "history.png": search_plots.history,
}


def assess(folder: StudyFolder, config: StudyConfig) -> Summary:
    """Read a study and say what it found and what to distrust; writes nothing."""
    summary = summarise(folder, config)
    return dataclasses.replace(
        summary, findings=tuple(findings.findings(summary)), checks=tuple(health.health(summary))
    )


def write_report(folder: StudyFolder, config: StudyConfig) -> Summary:
    """Assess the study, write the report into its folder, and return what it says; ``files`` are those written."""
    summary = assess(folder, config)
    drawn, undrawn = _draw(summary, folder.path)
    missing = tuple(f"The figure {name} could not be drawn; the log says why." for name in undrawn)
    summary = dataclasses.replace(
        summary,
        missing=summary.missing + missing,
        files=(folder.path / "findings.md", folder.path / "findings.html", *drawn),
    )
    blocks = document(summary, {path.name: path for path in drawn})
    write_atomically(folder.path / "findings.md", markdown(blocks))
    write_atomically(folder.path / "findings.html", page(f"Findings: {summary.name}", blocks))
    return summary


def _draw(summary: Summary, path: Path) -> tuple[list[Path], list[str]]:
    """Save the figures the study has data for; remove older ones it has none for."""
    drawn, failed = [], []
    with plots.style():
        for name, draw in FIGURES.items():
            (path / name).unlink(missing_ok=True)
            try:
                figure = draw(summary)
                if figure is not None:
                    plots.save(figure, path / name)
                    drawn.append(path / name)
            except Exception:  # weeks of compute must not lack their report for a figure
                logger.exception("%s could not be drawn", name)
                failed.append(name)
    return drawn, failed


# -- the document -----------------------------------------------------------------------------------------------------


def document(summary: Summary, figures: Mapping[str, Path]) -> list[Block]:
    """The whole report. ``figures`` are the files that could be drawn, by name."""

    def picture(name: str, caption: str) -> list[Block]:
        return [Picture(figures[name], caption)] if name in figures else []

    best = summary.methods.get(summary.best_who)
    title = best.title if best else "the best setting"
    recordings = best is not None and any(score.num_recordings for score in best.scores.values())
    blocks: list[Block] = [
        Heading(f"Findings: {summary.name}", 1),
        Heading("Key findings"),
        Bullets(summary.findings, frozenset({0})),
    ]
    if summary.missing:
        blocks += [Heading("What is missing", 3), Bullets(summary.missing)]
    blocks += [Heading("Comparison")]
    if summary.confirmed:
        blocks += [confirmed_table(summary)]
        if any(method.versus_teacher for method in summary.methods.values()):
            blocks += [Heading("Paired differences", 3), paired_table(summary)]
    else:
        blocks += [Text("Nothing was scored on held-out machines, so there is no table of results.")]
    blocks += [Heading("For selection only: the search machines", 3), search_table(summary)]
    if figures.keys() & {"bands.png", "auc.png", "heat_map.png", "machines.png"}:
        blocks += [
            Heading("Where the differences sit"),
            *picture(
                "bands.png",
                f"Official score over SNR bands for each subset, {summary.held_out}, mean of seeds. Bars: 95% interval "
                "of the paired difference to the frozen teacher.",
            ),
            *picture(
                "auc.png", f"AUC and pAUC over SNR bands for each subset, {summary.held_out}, mean of seeds."
            ),
            *picture(
                "heat_map.png",
                f"{title} minus frozen teacher, subset by SNR band, {summary.held_out}, with 95% intervals (paired).",
            ),
            *picture(
                "machines.png",
                f"{title} minus frozen teacher for each held-out machine, mean of seeds. Bars: 95% interval for this "
                f"machine alone, over {'recordings and ' if recordings else ''}seeds.",
            ),
        ]
    if summary.best is not None:
        blocks += [
            Heading("The best setting"),
            Text(f"{summary.best.trial_id}: {findings.explain(summary)}."),
            *picture(
                "best_setting.png",
                "What it trains with, over SNR and over training, as far as its system has such curves; and each of "
                "its values between the ends of what was searched.",
            ),
            Table(("parameter", "value"), tuple((k, _value(v)) for k, v in summary.best.params.items())),
        ]
    blocks += [Heading("What mattered")]
    if summary.importance.reason:
        blocks += [Text(f"{summary.importance.reason[:1].upper()}{summary.importance.reason[1:]}.")]
    blocks += [
        *picture(
            "importance.png",
            "Importance of each parameter, blue where it exceeds chance (one idle parameter in twenty does). Grey "
            "words: the choice that a conditional parameter hangs on.",
        ),
        *picture("parallel.png", "Every trial through its parameters; search machines."),
        Heading("The search"),
        *picture(
            "history.png",
            "Left: trials in order. Right: learning curves and early stopping. Search machines.",
        ),
        *picture(
            "pareto.png",
            f"What {'low SNR costs at high SNR' if summary.low else 'the target domain costs in the source domain'}: "
            "full-length trials, search machines.",
        ),
        Heading("Health checks"),
        Bullets(
            tuple(f"{level}: {text}" for level, text in summary.checks),
            frozenset(i for i, check in enumerate(summary.checks) if check[0] == health.LOOK),
        ),
        Heading("Cost and failures"),
        *_cost(summary),
        *([table] if (table := cost_table(summary)) else []),
        Heading("How it was made"),
        *_provenance(summary),
    ]
    return blocks


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cost(summary: Summary) -> list[Block]:
    rows = []
    for role in ("trial", "baseline", "confirm"):
        runs = [run for run in summary.runs if run.role == role]
        if runs:
            states = [f"{n} {s}" for s in ("finished", "stopped", "failed", "open") if (n := _num(runs, s))]
            rows.append((role, str(len(runs)), ", ".join(states), _hours(runs)))
    rows.append(("all", str(len(summary.runs)), "", _hours(summary.runs)))
    wall = elapsed_s(summary.runs)
    span = (
        f"From the first start to the last end: {wall / 60:.0f} minutes."
        if wall
        else "Start times are not recorded."
    )
    blocks: list[Block] = [Table(("role", "jobs", "ended", "worker-hours"), tuple(rows), (span,))]
    failed = [run for run in summary.runs if run.state == "failed"]
    if failed:
        listed = tuple((r.id, r.label, str(r.epoch), r.reason or "no reason recorded") for r in failed)
        blocks += [Heading("Failures", 3), Table(("job", "what", "last epoch", "reason"), listed)]
    else:
        blocks += [Text("No job failed.")]
    return blocks


def _hours(runs: Sequence[Run]) -> str:
    return f"{sum(run.worker_s for run in runs) / 3600:.3f}"


def _num(runs: list[Run], state: str) -> int:
    return sum(run.state == state for run in runs)


def _provenance(summary: Summary) -> list[Block]:
    study, config = summary.study, summary.config
    versions = study.get("versions") or {}
    workers = sorted({run.num_workers for run in summary.runs if run.duration_s})
    seeds = range(FIRST_SEED, FIRST_SEED + config.confirm.seeds)
    facts = {
        "command": study.get("command"),
        "commit": study.get("commit") or versions.get("commit"),
        "versions": {k: v for k, v in versions.items() if k not in ("commit", "hardware")},
        "hardware": study.get("hardware") or versions.get("hardware"),
        "workers per job": workers,
        "created": study.get("created"),
        "identity": study.get("identity"),
        "seeds": f"search and trials {config.search.seed}; confirmation {', '.join(map(str, seeds)) or 'none'}; "
        f"bootstrap 0; corpus {config.corpus.seed}",
        "scoring": f"back end {config.scoring.backend}"
        + (f", oracle lambda {config.scoring.oracle_lambda:g}" if summary.evaluation.mixed else ""),
    }
    rows = tuple((k, text_of(v) if v else "not recorded") for k, v in facts.items())
    return [
        Table(("fact", "value"), rows),
        Text("Settings:"),
        Code(json.dumps(to_dict(config), indent=1)),
    ]


# -- the command ------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see --help")


def parser() -> argparse.ArgumentParser:
    """The options of ``study/report.py``."""
    made = _Parser(
        prog="study/report.py",
        description="Write the findings of a study again, or put several studies side by side. Studies that were not "
        "measured alike (corpus, split, grid, back end, frozen teacher) are shown in groups and not ranked.",
        epilog="exit codes: 0 written, 2 the command was refused",
        allow_abbrev=False,
    )
    made.add_argument("studies", nargs="+", metavar="STUDY", help="a study's name, or its folder")
    made.add_argument("--storage", metavar="DIR", help="where studies lie (default: as for study/run.py)")
    made.add_argument(
        "--output", metavar="DIR", help="where a comparison goes (default: comparison in the storage folder)"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """One study: write its report. Several: compare them. Returns the exit code."""
    from study.command import storage_folder
    from study.terminal import print_comparison, print_groups

    try:
        given = parser().parse_args(arguments)
        storage = storage_folder(given.storage)
        opened = [open_one(name, storage) for name in dict.fromkeys(given.studies)]
        if len(opened) == 1:
            config, folder = opened[0]
            if config.system == FROZEN:
                from study import probe_report

                found = probe_report.write_report(folder, config)
                probe_report.print_ranking(found)
            else:
                print_comparison(write_report(folder, config))
            print(f"\nfindings   {folder.path / 'findings.md'}")
            return 0
        from study import compare

        for config, _ in opened:
            if config.system == FROZEN:
                raise UserError(
                    f"{config.name}: a probe trains nothing and has no findings to set beside others"
                )
        summaries = [summarise(folder, config) for config, folder in opened]
        groups, files = compare.write(summaries, Path(given.output or storage / "comparison").absolute())
        print_groups(groups)
        print(f"\ncomparison {files[0]}")
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def open_one(name: str, storage: Path) -> tuple[StudyConfig, StudyFolder]:
    """A study by its name in ``storage`` or by its folder. Raises UserError listing the studies there are."""
    from study.student import open_study

    path = Path(name)
    if "/" in name:
        storage, name = path.absolute().parent, path.name
    try:
        return open_study(name, storage)
    except UserError as error:
        raise UserError(str(error).removeprefix("--study ")) from None


if __name__ == "__main__":
    with outlet():
        code = main()
    sys.exit(code)
