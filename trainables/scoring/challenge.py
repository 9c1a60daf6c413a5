"""The challenge's yearly scoring rules, under the names the field's toolkit uses.

Since 2020 the rule has changed twice. Cells are named ``<section>_<pair>_<metric>`` on a scale of 0..1: ``s``
and ``t`` hold one domain's normals against the anomalies of the same domain, ``smix`` and ``tmix`` one
domain's normals against all anomalies, ``mix`` everything. A cell whose normals or anomalies do not exist is
left out; an official score that needs such a cell raises ``UserError``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import ArrayLike

from trainables.errors import UserError
from trainables.scoring.metrics import arithmetic_mean, as_labels, auc, domain_scores, harmonic_mean, pauc

YEARS = tuple(range(2020, 2027))
# The 2020 machines do not share their split of ids: challenge description, data set section.
_SECTIONS_2020 = {
    "ToyCar": ((1, 2, 3, 4), (5, 6, 7)),
    "ToyConveyor": ((1, 2, 3), (4, 5, 6)),
}
_CELLS = {
    2020: ("s_auc", "s_pauc"),
    2021: ("s_auc", "t_auc", "s_pauc", "t_pauc"),
    2022: ("smix_auc", "tmix_auc", "mix_pauc"),
}


def section_cells(scores_N: ArrayLike, is_anomaly_N: ArrayLike, is_target_N: ArrayLike) -> dict[str, float]:
    """Every cell of one section that can be computed, named ``<pair>_<metric>``, 0..1."""
    scores = np.asarray(scores_N, dtype=np.float64)
    is_anomaly = as_labels(is_anomaly_N, len(scores), "is_anomaly")
    is_target = as_labels(is_target_N, len(scores), "is_target")
    everything = np.ones_like(is_target)
    normals = {"s": ~is_target, "t": is_target}
    pairs = {
        "s": (normals["s"], normals["s"]),
        "t": (normals["t"], normals["t"]),
        "smix": (normals["s"], everything),
        "tmix": (normals["t"], everything),
        "mix": (everything, everything),
    }
    if not is_target.any():  # 2020 had one domain; the toolkit then names no mixtures
        pairs = {"s": pairs["s"]}
    cells = {}
    for pair, (normal_pool, anomaly_pool) in pairs.items():
        keep = np.where(is_anomaly, anomaly_pool, normal_pool)
        labels = is_anomaly[keep]
        if not labels.any() or labels.all():
            continue
        cells[f"{pair}_auc"] = auc(scores[keep], labels)
        if pair in ("s", "t", "mix"):
            cells[f"{pair}_pauc"] = pauc(scores[keep], labels)
    return cells


def official_2020(cells: Mapping[int, Mapping[str, float]]) -> float:
    """Arithmetic mean over ids of AUC and pAUC. ``cells`` holds ``section_cells`` by section."""
    return arithmetic_mean(_pick(cells, 2020))


def official_2021(cells: Mapping[int, Mapping[str, float]]) -> float:
    """Harmonic mean over sections of AUC and pAUC of each domain on its own."""
    return harmonic_mean(_pick(cells, 2021))


def official_2022(cells: Mapping[int, Mapping[str, float]]) -> float:
    """Harmonic mean over sections of each domain's AUC against all anomalies and the pAUC of all clips.

    The rule of every year since 2022 (overview of 2025, equations 2 to 4).
    """
    return harmonic_mean(_pick(cells, 2022))


def year_scores(
    scores_N: ArrayLike, is_anomaly_N: ArrayLike, is_target_N: ArrayLike, year: int | None
) -> dict[str, float | None]:
    """The cells and ``official`` of one scored unit (machine, id or section) by the rule of ``year``, in points.

    2020: ``s_auc`` and ``pauc``. 2021: ``s_auc``, ``t_auc``, ``s_pauc`` and ``t_pauc``, each domain on its own.
    Since 2022, and for mixtures made here (None): ``domain_scores``.

    Raises:
        UserError: a cell that the rule of 2021 needs lacks normals or anomalies; or as ``domain_scores``.
    """
    if year == 2021:
        cells = section_cells(scores_N, is_anomaly_N, is_target_N)
        _pick({0: cells}, 2021)
        points: dict[str, float | None] = {name: 100 * cells[name] for name in _CELLS[2021]}
        return {**points, "official": 100 * official_2021({0: cells})}
    found = domain_scores(scores_N, is_anomaly_N, is_target_N)
    if year != 2020:
        return found
    kept = {name: found[name] for name in ("s_auc", "pauc")}
    return {**kept, "official": arithmetic_mean(v for v in kept.values() if v is not None)}


def combine(cells: Iterable[float], year: int | None) -> float:
    """``official`` over cells of many units: their harmonic mean, in 2020 the arithmetic one."""
    return arithmetic_mean(cells) if year == 2020 else harmonic_mean(cells)


def challenge_metrics(
    scores_N: ArrayLike,
    is_anomaly_N: ArrayLike,
    is_target_N: ArrayLike,
    section_N: ArrayLike,
    *,
    year: int,
    machine: str,
) -> dict[str, float]:
    """All cells of one machine and its official score of that year, under the toolkit's names, 0..1.

    Before 2023 a machine has ``dev_official<yy>`` and ``eval_official<yy>``, each over the sections of that
    split that are present; from 2023 each section has ``<section>_official<yy>``.

    Raises:
        UserError: a year without a known rule, or an official score that lacks one of its cells.
    """
    if year not in YEARS:
        raise UserError(f"year = {year}: expected one of {YEARS[0]} to {YEARS[-1]}")
    scores, is_anomaly = np.asarray(scores_N), np.asarray(is_anomaly_N)
    is_target, section = np.asarray(is_target_N), np.asarray(section_N)
    lengths = {"is_anomaly": is_anomaly, "is_target": is_target, "section": section}
    for name, labels in lengths.items():
        if labels.shape != scores.shape:
            raise UserError(
                f"{name} of shape {labels.shape}: expected one value for each of {len(scores)} scores"
            )
    cells = {}
    for number in np.unique(section).tolist():
        keep = section == number
        cells[int(number)] = section_cells(scores[keep], is_anomaly[keep], is_target[keep])
    named = {f"{number}_{cell}": value for number, group in cells.items() for cell, value in group.items()}
    rule = {2020: official_2020, 2021: official_2021}.get(year, official_2022)
    splits: dict[str, tuple[int, ...]]
    if year >= 2023:
        splits = {str(number): (number,) for number in cells}
    elif year == 2020:
        dev, evaluation = _SECTIONS_2020.get(machine, ((0, 2, 4, 6), (1, 3, 5)))
        splits = {"dev": dev, "eval": evaluation}
    else:
        splits = {"dev": (0, 1, 2), "eval": (3, 4, 5)}
    for split, numbers in splits.items():
        present = {number: cells[number] for number in numbers if number in cells}
        if present:
            named[f"{split}_official{year % 100}"] = rule(present)
    return named


def _pick(cells: Mapping[int, Mapping[str, float]], year: int) -> list[float]:
    wanted = _CELLS[year]
    missing = [f"{number}_{cell}" for number, group in cells.items() for cell in wanted if cell not in group]
    if missing:
        raise UserError(
            f"the official score of {year} needs {missing[0]}, which has no normals or no anomalies; "
            "score both domains of every section"
        )
    return [group[cell] for group in cells.values() for cell in wanted]
