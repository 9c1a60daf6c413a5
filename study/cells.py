"""The scores that estimates are made of: cells of held-out machines, by seed, as tables hold them.

Shape legend: S seeds, M machines, K cells of one seed and machine, B draws of recordings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from study.redrawn import Redrawn, redraw
from trainables.scoring.evaluation import CELLS


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Scores in points, values_SMK, NaN where a cell does not exist (no target domain, a machine not scored).

    ``keys`` are (subset, band, metric), and of recordings the id or section as well. ``harmonic`` is how the cells of
    a seed are averaged. ``redrawn`` are the same cells with recordings drawn again, where queries were kept.
    """

    seeds: tuple[int, ...]
    machines: tuple[str, ...]
    keys: tuple[tuple[str, ...], ...]
    values_SMK: np.ndarray
    harmonic: bool = True
    redrawn: Redrawn | None = None

    def where(
        self, *, subset: str | None = None, band: str | None = None, metric: str | None = None
    ) -> Cells:
        """The cells of one subset, one band, one metric, or several of these."""
        wanted = (subset, band, metric)
        keep = [
            i
            for i, key in enumerate(self.keys)
            if all(w in (None, part) for w, part in zip(wanted, key, strict=False))
        ]
        keys = tuple(self.keys[i] for i in keep)
        return replace(self, keys=keys, **self._part(slice(None), slice(None), keep))

    def of_seeds(self, seeds: Iterable[int]) -> Cells:
        """The cells of these seeds, which it has."""
        seeds = tuple(seeds)
        rows = [self.seeds.index(seed) for seed in seeds]
        return replace(self, seeds=seeds, **self._part(rows, slice(None), slice(None)))

    def only(self, machine: str) -> Cells:
        """The cells of one machine."""
        index = self.machines.index(machine)
        return replace(self, machines=(machine,), **self._part(slice(None), [index], slice(None)))

    def _part(self, seeds: Any, machines: Any, keys: Any) -> dict[str, Any]:
        """The values of some seeds, machines or keys."""
        drawn = self.redrawn
        if drawn is not None:
            drawn = Redrawn(
                values_BSMK=drawn.values_BSMK[:, seeds][:, :, machines][..., keys],
                num_recordings_M=drawn.num_recordings_M[machines],
                num_strata_M=drawn.num_strata_M[machines],
            )
        return {"values_SMK": self.values_SMK[seeds][:, machines][..., keys], "redrawn": drawn}


Tables = Mapping[int, Sequence[Mapping[str, Any]]]


def gather(tables: Tables, backend: str, queries: Tables | None = None) -> Cells:
    """The cells of one method from its tables of scores by seed, for one scoring back end.

    ``queries`` holds what each query scored (``StudyFolder.queries``), by that back end or not at all.
    """
    rows = [(seed, row) for seed, table in tables.items() for row in table if row["backend"] == backend]
    seeds = tuple(sorted({seed for seed, _ in rows}))
    machines = tuple(dict.fromkeys(machine_of(row) for _, row in rows))
    keys = tuple(dict.fromkeys(_key(row, metric) for _, row in rows for metric in CELLS if metric in row))
    values = np.full((len(seeds), len(machines), len(keys)), np.nan)
    place = {key: i for i, key in enumerate(keys)}
    for seed, row in rows:
        for metric in CELLS:
            if row.get(metric) is not None:
                at = place[_key(row, metric)]
                values[seeds.index(seed), machines.index(machine_of(row)), at] = row[metric]
    harmonic = all(row.get("year") != 2020 for _, row in rows)
    cells = Cells(seeds=seeds, machines=machines, keys=keys, values_SMK=values, harmonic=harmonic)
    kept = {
        seed: [row for row in some if row["backend"] == backend] for seed, some in (queries or {}).items()
    }

    def found_at(seed: int, row: Mapping[str, Any], metric: str) -> tuple[int, int, int] | None:
        key, machine = _key(row, metric), machine_of(row)
        if seed not in seeds or machine not in machines or key not in place:
            return None
        return seeds.index(seed), machines.index(machine), place[key]

    return replace(cells, redrawn=redraw(kept, found_at, values)) if any(kept.values()) else cells


def machine_of(row: Mapping[str, Any]) -> str:
    """The machine that a row counts for: of a recording's ``fan/id_00``, the fan."""
    name = str(row["machine"])
    return name.partition("/")[0] if "year" in row else name


def _key(row: Mapping[str, Any], metric: str) -> tuple[str, ...]:
    section = str(row["machine"]).partition("/")[2:] if "year" in row else ()
    return (row["subset"], row["band"], metric, *section)
