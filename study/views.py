"""What MLflow's pages show of a study first: named views with columns, order, filter and charts.

MLflow's own default columns are fixed in its pages (Created, Dataset, Duration, Source, Models), and no setting of an
experiment changes them. What it does offer are views that are saved with an experiment: they stand in the menu Views
of its runs and open by a link. A study saves the ones below, and its description begins with links to them. The
layout of a view belongs to MLflow and may change with its version: a browser test opens each
(``tests/study/test_pages.py``). Pure functions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import search_spaces

TAG = "mlflow.sharedViewState."
NESTED, RANKING, CONFIRMED = "trials", "ranking", "confirmed"
TITLES = {
    NESTED: "All runs, nested",
    RANKING: "Trials, best first",
    CONFIRMED: "Confirmations, best first",
}
FILTERS = {
    RANKING: "tags.role = 'trial'",
    CONFIRMED: "tags.role = 'confirm'",
}
BEST_FIRST = {"orderByKey": "metrics.`official`", "orderByAsc": False}
SCORES = ("official", "low/official", "gap_closed")
WIDTHS = {"official": 85, "low/official": 95, "gap_closed": 90, "duration": 80, "state": 80, "system": 75}
KIND_WIDTH, NAME_WIDTH, CREATED_WIDTH = 120, 220, 140  # pixels: all columns fit a page of 1500


def kinds(system: str) -> tuple[str, ...]:
    """What a trial of ``system``, or of several, chooses first, such as ``lambda_kind``; of a probe, where it reads."""
    if not set(search_spaces.systems_of(system)) <= set(search_spaces.SYSTEMS):
        return ("encoder.layer", "encoder.pooling")
    return tuple(kind for kind in search_spaces.load(system).BRANCHES if kind != "system")


def columns(system: str) -> list[str]:
    """The columns of every view in order, as MLflow's pages name them. Duration is always shown there."""
    return [
        "tags.`system`",
        *(f"params.`{kind}`" for kind in kinds(system)),
        *(f"metrics.`{score}`" for score in SCORES),
        "duration",
        "tags.`state`",
    ]


def saved_views(system: str, created_ms: int) -> dict[str, str]:
    """The tags of an experiment that hold its views. They come in the menu as they come here."""
    shown = columns(system)
    fixed = ["attributes.`Run Name`", "runDateAndNestInfo"]
    widths = {name: WIDTHS.get(_bare(name), KIND_WIDTH) for name in shown}
    state: dict[str, Any] = {
        "selectedColumns": [name for name in shown if name != "duration"],
        "columnOrder": [*fixed, *shown],
        "columnWidths": {fixed[0]: NAME_WIDTH, fixed[1]: CREATED_WIDTH, **widths},
        "runsHiddenMode": "FIRST_20_RUNS",
        "isAccordionReordered": True,
        "compareRunSections": [{"uuid": "study", "name": "The study", "display": True, "isReordered": True}],
        "compareRunCharts": charts(kinds(system)),
    }
    tags = {}
    for number, (view, title) in enumerate(TITLES.items()):
        only = {"searchFilter": FILTERS[view], **BEST_FIRST} if view in FILTERS else {}
        at = created_ms - number  # the menu puts the newest first
        envelope = {"name": title, "createdAt": at, "updatedAt": at, "state": json.dumps({**state, **only})}
        tags[TAG + view] = json.dumps(envelope)
    return tags


def charts(choices: Sequence[str]) -> list[dict[str, Any]]:
    """Four charts: the search's objective over epochs and at its end, low against high SNR, and what was chosen."""
    low, high = ({"key": f"{band}/official", "type": "METRIC"} for band in ("low", "high"))
    chosen = {"selectedParams": list(choices), "selectedMetrics": ["low/official", "official"]}
    cards: list[tuple[str, dict[str, Any]]] = [
        ("LINE", {"metricKey": "official", "xAxisKey": "step"}),
        ("SCATTER", {"xaxis": high, "yaxis": low}),
        ("PARALLEL", {**chosen, "showAllRuns": True}),
        ("BAR", {"metricKey": "low/official"}),
    ]
    return [
        {
            "uuid": f"study-{number}",
            "type": kind,
            "runsCountToCompare": 100,
            "metricSectionId": "study",
            "deleted": False,
            "isGenerated": False,
            **card,
        }
        for number, (kind, card) in enumerate(cards)
    ]


def link(experiment_id: str, view: str, *, as_charts: bool = False) -> str:
    """The address of a view below the server's own. MLflow's pages open on another kind of work unless told."""
    mode = "&compareRunsMode=CHART" if as_charts else ""
    return f"#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={view}{mode}"


def links(experiment_id: str) -> str:
    """One line of Markdown that leads to the views."""
    found = [f"[{title}]({link(experiment_id, view)})" for view, title in TITLES.items()]
    return " · ".join([*found, f"[Charts]({link(experiment_id, RANKING, as_charts=True)})"])


def _bare(name: str) -> str:
    return name.partition("`")[2].rstrip("`") or name
