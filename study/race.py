"""The race of the finalists: seeds are spent where the ranking is still open.

Every finalist is confirmed with ``confirm.seeds`` seeds. After these, and after every further seed, the leader (best
mean official score on the held-out machines) is held against each other finalist still in the race, paired over the
seeds and machines both have (``study/statistics.py``: machines and seeds are resampled together). A finalist that is
behind by an interval without zero leaves. The interval's level is corrected for the number of comparisons that the
race can make at most, finalists and looks alike (Bonferroni), so that the chance of dropping the true best at all stays
below 5%. The race is over when one is left or ``confirm.most_seeds`` are spent. Only confirmed scores are read,
and the same files always give the same decisions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from study import statistics
from study.cells import Cells
from study.statistics import Estimate


@dataclass(frozen=True, kw_only=True)
class Left:
    """A finalist that left the race after ``num_seeds`` seeds, ``behind`` the leader by that difference (negative)."""

    who: str
    leader: str
    num_seeds: int
    behind: Estimate


@dataclass(frozen=True, kw_only=True)
class Race:
    """Where a race stands: who is still in it, the leader first, and who left; ``num_seeds`` were looked at."""

    open: tuple[str, ...]
    left: tuple[Left, ...]
    num_seeds: int

    @property
    def decided(self) -> bool:
        return len(self.open) < 2


def run_race(finalists: Mapping[str, Cells], *, first: int, most: int, until: int | None = None) -> Race:
    """The race as far as the finalists' cells go, or ``until`` that number of seeds.

    Args:
        finalists: the confirmed cells of each finalist.
        first: seeds before the first look.
        most: seeds at the last look.
    """
    racing, left, looked = list(finalists), list[Left](), 0
    level = 1 - (1 - statistics.LEVEL) / max(1, (len(racing) - 1) * (most - first + 1))
    for num_seeds in range(first, (most if until is None else until) + 1):
        if len(racing) < 2 or any(not _has(finalists[who], num_seeds) for who in racing):
            break
        looked = num_seeds
        cells = {who: _until(finalists[who], num_seeds) for who in racing}
        leader = max(racing, key=lambda who: _mean(cells[who]))
        for who in [who for who in racing if who != leader]:
            behind = statistics.difference(cells[who], cells[leader], level=level)
            if behind is not None and behind.below_zero:
                racing.remove(who)
                left.append(Left(who=who, leader=leader, num_seeds=num_seeds, behind=behind))
        racing.sort(key=lambda who: -_mean(cells[who]))
    return Race(open=tuple(racing), left=tuple(left), num_seeds=looked)


def _has(cells: Cells, num_seeds: int) -> bool:
    return set(range(num_seeds)) <= set(cells.seeds)


def _until(cells: Cells, num_seeds: int) -> Cells:
    return cells.of_seeds(range(num_seeds))


def _mean(cells: Cells) -> float:
    estimate = statistics.mean(cells)
    return estimate.mean if estimate is not None else 0.0
