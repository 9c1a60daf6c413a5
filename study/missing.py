"""What a complete study would have and this one has not, in words.

Nothing here raises for a study that has hardly begun: a report is written at any time, and says what it lacks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from study import confirm
from study.cells import Cells
from study.runs import Run, count

if TYPE_CHECKING:
    from study.config import StudyConfig
    from study.summary import Method


def missing(
    config: StudyConfig,
    runs: tuple[Run, ...],
    methods: Mapping[str, Method],
    chosen: tuple[confirm.Finalist, ...],
) -> list[str]:
    """Sentences, one for each thing."""
    found = []
    grid = config.evaluation
    trials = [run for run in runs if run.role == "trial"]
    running = [run.id for run in trials if run.state == "open"]
    if not trials:
        found.append("No search trial has been started.")
    if running:
        found.append(f"{count(len(running), 'search trial')} not over yet: {', '.join(running)}.")
    if len(trials) < config.search.trials:
        found.append(f"{len(trials)} of {config.search.trials} search trials were started.")
    if trials and not chosen:
        found.append("No search trial ran to its last epoch, so there is no best setting.")
    for who in (*grid.references, *([confirm.YARDSTICK] if config.yardstick.search else [])):
        run = next((run for run in runs if run.id == f"b-{who}"), None)
        if run is None or run.state != "finished":
            found.append(f"The {who} was not scored on the search machines.")
    if not config.confirm.seeds:
        found.append("No confirmation stage (confirm.seeds = 0): nothing was scored on held-out machines.")
    elif chosen:
        measures = [*grid.references, *([confirm.YARDSTICK] if config.yardstick.confirm else [])]
        wanted = [*measures, *config.confirm.recipes, *(f.who for f in chosen)]
        for who in dict.fromkeys(wanted):
            have = methods[who].seeds if who in methods else ()
            lacking = [str(seed) for seed in range(config.confirm.seeds) if seed not in have]
            if lacking:
                title = methods[who].title if who in methods else who
                found.append(f"{title}: seed {', '.join(lacking)} of the confirmation is missing or failed.")
    confirmed = [method.cells for method in methods.values() if method.cells]
    if confirmed:
        subsets = {key[0] for cells in confirmed for key in cells.keys}
        found += [f"The subset {subset} was not scored." for subset in grid.subsets if subset not in subsets]
        scored_bands = {key[1] for cells in confirmed for key in cells.keys}
        found += [f"The SNR band {band} was not scored." for band in grid.bands if band not in scored_bands]
        for metric, domain in (("s_auc", "source"), ("t_auc", "target")):
            if metric in grid.metrics and all(_empty(cells, metric) for cells in confirmed):
                found.append(f"No machine has normal test clips of the {domain} domain: one AUC is left out.")
    return found


def _empty(cells: Cells, metric: str) -> bool:
    index = [i for i, key in enumerate(cells.keys) if key[2] == metric]
    return not any(math.isfinite(x) for x in cells.values_SMK[:, :, index].ravel())
