"""Where a slot and its workers meet: jobs and answers go down, records and failures come up.

One small actor per slot, the only thing both sides know of each other. It holds one job at a time and the state
of its conversation, so that a worker group can die and a new one take the same job over:

- every worker group has an id; only the newest one is listened to, what an older one says is answered with "stop";
- a job is given to each rank once per group; more than ``max_restarts`` groups dying on it fail the job;
- a group that makes place for one of another size, or comes back with another size because a node came or went, has
  not died on its job: the new one takes the job over and nothing is counted;
- an epoch goes up once, also if a restarted trial yields it again;
- a rank that fails takes its whole group out of service, because the other ranks may wait for it in a collective
  for ever.

Nothing here imports Ray Train or torch. If this actor is gone, its slot is lost and its workers end.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

Job = Mapping[str, Any]
Event = dict[str, Any]


class Control:
    """An asyncio actor. ``seq`` numbers the jobs; ``group`` names a worker group; ``rank`` counts within it."""

    def __init__(self, max_restarts: int) -> None:
        self._max_restarts = max_restarts
        self._changed = asyncio.Condition()
        self._events: deque[Event] = deque()
        self._seq = 0
        self._job: Job | None = None  # None: nothing to do
        self._takers: list[str] = []  # groups that have had this job
        self._resizes = 0  # how many of them have not died on it
        self._reported = self._allowed = 0  # last epoch that went up, last one the trial may go on after
        self._passed = 0  # last one that a rank of the newest group has gone on after
        self._group: str | None = None  # the newest
        self._num_workers = 0  # in it
        self._leaving: str | None = None  # to make place for a group of another size: begins nothing any more
        self._waiting: set[tuple[str, int]] = set()  # ranks whose epoch is over, by group
        self._broken: str | None = None  # out of service: it gets no job any more
        self._dead: str | None = None  # being restarted, as far as is known
        self._workers: dict[int, bytes] = {}
        self._death = "no reason known"
        self._closed = False
        self._since = time.monotonic()

    # -- the slot's side ------------------------------------------------------------------------------------

    async def submit(self, job: Job) -> None:
        """Give the workers a job. The one before, if it still runs, is told to stop."""
        async with self._changed:
            self._seq += 1
            self._job, self._takers, self._resizes = job, [], 0
            self._reported = self._allowed = self._passed = 0
            self._events.clear()
            self._touch()

    async def next(self, go_on: int, wait_s: float) -> Event:
        """Let the trial go on after epoch ``go_on`` and wait for what happens next.

        Returns:
            ``kind`` is ``record`` (record, idle_s, restarts, num_workers), ``failed`` (reason, traceback), or
            ``waiting`` after ``wait_s`` seconds without either (phase ``running``, or ``starting`` while no worker
            has the job, and for_s: how long since something moved).
        """
        async with self._changed:
            if go_on > self._allowed:
                self._allowed = go_on
                self._touch()
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: self._events), wait_s)
            except TimeoutError:
                running = self._group in self._takers and self._group not in (self._dead, self._broken)
                phase = "running" if running else "starting"
                return {"kind": "waiting", "phase": phase, "for_s": time.monotonic() - self._since}
            return self._events.popleft()

    async def abandon(self) -> list[bytes]:
        """Take the job back from workers that do not answer; returns their handles, to kill them by."""
        async with self._changed:
            self._job = None
            self._events.clear()
            self._broken = self._group
            self._touch()
            return list(self._workers.values())

    async def close(self) -> None:
        """Send the workers home: the running trial stops at its next epoch and no other follows."""
        async with self._changed:
            self._closed, self._job = True, None
            self._touch()

    # -- the workers' side ----------------------------------------------------------------------------------

    async def join(self, group: str, rank: int, worker: bytes, num_workers: int = 1) -> None:
        """A worker of a group of ``num_workers`` has started.

        ``worker`` is its actor handle, pickled: reading it would import Ray Train here.
        """
        async with self._changed:
            if group != self._group:
                resized = self._group is not None and num_workers != self._num_workers
                if self._group in self._takers and (resized or self._group == self._leaving):
                    self._resizes += 1
                self._group, self._num_workers, self._workers, self._passed = group, num_workers, {}, 0
            self._workers[rank] = worker
            self._touch()

    async def take(self, group: str, rank: int, after: int) -> tuple[int, Job] | None:
        """The next job after number ``after``, with its number; None when the worker shall end."""
        async with self._changed:
            while True:
                await self._changed.wait_for(
                    lambda: (
                        self._closed
                        or group != self._group
                        or (self._new(after) and group != self._broken and self._may_begin(group))
                    )
                )
                if self._closed or group != self._group or self._job is None:
                    return None
                if group not in self._takers:
                    self._takers.append(group)
                    self._touch()
                if (num := self._restarts()) <= self._max_restarts:
                    return self._seq, self._job
                self._fail(f"its workers died {num} times (allowed: {self._max_restarts}): {self._death}", "")

    async def report(
        self, group: str, seq: int, rank: int, record: Mapping[str, Any], idle_s: float | None = None
    ) -> bool:
        """An epoch is over. Returns, when it is known, whether the trial goes on; rank 0's record goes up."""
        epoch, done = int(record["epoch"]), bool(record["done"])
        async with self._changed:
            if not self._current(group, seq):
                return False
            if rank == 0 and epoch > self._reported:
                self._reported = epoch
                told = {"record": record, "idle_s": idle_s, "restarts": self._restarts()}
                self._events.append({"kind": "record", **told, "num_workers": self._num_workers})
                if done:
                    self._job = None
                self._touch()
            if done:
                return False
            self._waiting.add((group, rank))
            self._changed.notify_all()
            await self._changed.wait_for(
                lambda: (
                    not self._current(group, seq) or (self._allowed >= epoch and self._may_pass(group, epoch))
                )
            )
            self._waiting.discard((group, rank))
            if group != self._group or seq != self._seq or self._allowed < epoch or self._closed:
                return False
            self._passed = max(self._passed, epoch)
            return True

    async def fail(self, group: str, seq: int, rank: int, reason: str, traceback: str) -> None:
        """A rank's trial has raised. In a group of several the rank must end afterwards, to have it restarted."""
        async with self._changed:
            if self._current(group, seq):
                self._broken = group if self._num_workers > 1 else None
                self._fail(reason, traceback)

    async def others(self, group: str, rank: int) -> list[bytes]:
        """The handles of the other ranks that have joined."""
        return [w for r, w in self._workers.items() if r != rank] if group == self._group else []

    # -- Ray Train's side -----------------------------------------------------------------------------------

    async def leave(self) -> bool:
        """The newest group shall make place for one of another size: it begins no epoch and no job any more.

        Returns:
            Whether it has none under way, so that ending it now costs nothing. Until then, ask again.
        """
        async with self._changed:
            first, self._leaving = self._leaving != self._group, self._group
            at_work = self._job is not None and self._group in self._takers
            if at_work and len(self._waiting & self._ranks()) < self._num_workers:
                return False
            if first or self._dead != self._group:
                self._dead = self._group
                self._touch()
            return True

    async def stay(self) -> None:
        """It shall go on after all."""
        async with self._changed:
            self._leaving = None
            if self._dead == self._group:
                self._dead = None
            self._touch()

    async def died(self, reason: str) -> None:
        """The newest group has ended with an error and is being restarted."""
        async with self._changed:
            if self._group != self._broken:  # else its own rank has ended it, on purpose
                self._death = reason
            self._dead = self._group
            self._touch()

    def _restarts(self) -> int:
        """How many groups have died on this job."""
        return len(self._takers) - 1 - self._resizes

    def _ranks(self) -> set[tuple[str, int]]:
        return {(self._group, rank) for rank in self._workers} if self._group else set()

    def _may_begin(self, group: str) -> bool:
        """A group that is to leave begins no job, unless one of its ranks has: that one would wait for the others."""
        return group != self._leaving or group in self._takers

    def _may_pass(self, group: str, epoch: int) -> bool:
        """The same for the next epoch."""
        return group != self._leaving or epoch <= self._passed

    def _new(self, after: int) -> bool:
        return self._job is not None and self._seq > after

    def _current(self, group: str, seq: int) -> bool:
        return self._job is not None and seq == self._seq and group == self._group

    def _fail(self, reason: str, traceback: str) -> None:
        self._events.append({"kind": "failed", "reason": reason, "traceback": traceback})
        self._job = None
        self._touch()

    def _touch(self) -> None:
        self._since = time.monotonic()
        self._changed.notify_all()


def one_line(error: BaseException) -> str:
    """The words of an error from Ray that say what happened to a process."""
    text = str(getattr(error, "health_check_failure", error))
    for start in ("Worker exit detail:", "The actor is dead because"):
        if start in text:
            text = text[text.index(start) :]
            break
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:297] + "..."
