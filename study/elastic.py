"""How many workers an elastic slot has: from ``slots.min_workers`` up to ``slots.workers``, as nodes come and go.

Ray Train's own rule sets room aside for the most that a group may have, for whoever asks first, so that a second slot
could wait for ever; and it ends a group in the middle of an epoch. Here every slot's minimum comes before anything
that goes beyond a minimum, and a group that trains is replaced when its epoch is over (``Control.leave``): its trial
goes on in the new one from there. New nodes are noticed within half a minute. A size that does not start after all,
because others use the cluster too, is not tried again for ten minutes, or until there is room elsewhere. The controller
of Ray Train runs this; what it overrides is internal to Ray 2.60.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import ResourceRequestPriority
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    AUTOSCALING_REQUESTS_EXPIRE_TIME_S,
    AUTOSCALING_REQUESTS_GET_TIMEOUT_S,
)

LOOK_S = 1.0  # pace at which what is set aside is looked at
REFUSED_S = 600.0  # for so long a size that did not start is not tried again
ASK_S = 20.0  # pace at which the wish is renewed; it expires after AUTOSCALING_REQUESTS_EXPIRE_TIME_S


class Elastic(ElasticScalingPolicy):
    """The size of one slot's group. ``control`` is the slot's ``Control``."""

    def __init__(self, scaling_config: ScalingConfig, control: Any) -> None:
        super().__init__(scaling_config)
        self._control = control
        self._looked = self._asked = float("-inf")
        self._possible: int | None = None  # workers for which there is room; None: not known
        self._nodes = frozenset[str]()  # on which this room is
        self._leaving = False
        self._starting: int | None = None  # size of a group that has been ordered and was not seen yet
        # a size that did not start, the room that there seemed to be, and when
        self._refused: tuple[int, tuple[int, frozenset[str]], float] | None = None

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start a group of the size that there is room for, now that there is none."""
        self._ask()
        self._leaving = False
        possible = self._look(fresh=True)
        if possible is not None and self._starting is not None:
            self._refused = self._starting, (possible, self._nodes), time.monotonic()
            self._starting = None
        possible = self._believable(possible)
        if possible is None or possible < self.scaling_config.min_workers:
            time.sleep(LOOK_S)  # Ray Train asks again at once
            return NoopDecision()
        self._starting = possible
        return self._get_resize_decision(possible)

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Replace a group of another size than there is room for, once it has no epoch under way."""
        self._ask()
        self._starting = None
        size, possible = worker_group_state.num_workers, self._believable(self._look())
        if possible is None or possible in (size, 0) or possible < self.scaling_config.min_workers:
            if self._leaving:
                self._leaving = False
                self._control.stay.remote()
            return NoopDecision()
        self._leaving = True
        try:
            if not ray.get(self._control.leave.remote(), timeout=AUTOSCALING_REQUESTS_GET_TIMEOUT_S):
                return NoopDecision()
        except ray.exceptions.RayError:
            return NoopDecision()  # on a busy machine; asked again
        self._starting = possible
        return self._get_resize_decision(possible)

    def _believable(self, possible: int | None) -> int | None:
        """``possible``, less where a group of that size could not be started in the same room."""
        if possible is None or self._refused is None:
            return possible
        size, room, when = self._refused
        if room != (possible, self._nodes) or time.monotonic() - when > REFUSED_S:
            self._refused = None
            return possible
        return max(self.scaling_config.min_workers, min(possible, size - 1))

    # -- what Ray's coordinator sets aside --------------------------------------------------------------------

    def _ask(self) -> None:
        if time.monotonic() - self._asked >= ASK_S:
            self._send_resource_request()

    def _send_resource_request(self) -> None:
        """Also called by Ray Train when it starts. Between them the wishes are as many as the group may have."""
        self._asked = time.monotonic()
        least, most = self.scaling_config.min_workers, self.scaling_config.max_workers
        wishes = {
            self._requester_id: (least, ResourceRequestPriority.HIGH),
            self._beyond: (most - least, ResourceRequestPriority.MEDIUM),
        }
        each = self.scaling_config._resources_per_worker_not_none
        for name, (number, priority) in wishes.items():
            self._autoscaling_coordinator.request_resources.remote(
                requester_id=name,
                resources=[each] * number,
                expire_after_s=AUTOSCALING_REQUESTS_EXPIRE_TIME_S,
                priority=priority,
            )

    def _cancel_resource_request(self) -> None:
        if self._coordinator_client is not None:
            for name in (self._requester_id, self._beyond):
                self._autoscaling_coordinator.cancel_request.remote(name)

    @property
    def _beyond(self) -> str:
        return f"{self._requester_id}-beyond"

    def _look(self, *, fresh: bool = False) -> int | None:
        """For how many workers room is set aside. ``fresh`` has Ray look at its nodes first, as it does every 20 s."""
        if time.monotonic() - self._looked < LOOK_S and not fresh:
            return self._possible
        self._looked, self._possible = time.monotonic(), None
        ask = self._autoscaling_coordinator.get_reserved_resources
        try:
            reserved = ray.get(
                [ask.remote(self._requester_id, fresh), ask.remote(self._beyond)],
                timeout=AUTOSCALING_REQUESTS_GET_TIMEOUT_S,
            )
        except ray.exceptions.RayError:
            return None  # on a busy machine; asked again
        each = self.scaling_config._resources_per_worker_not_none
        self._possible = sum(count(node, each) for wish in reserved for node in wish.values())
        self._nodes = frozenset(name for wish in reserved for name in wish)
        return self._possible


def count(node: dict[str, float], each: dict[str, float]) -> int:
    """How many workers fit into what a node has. Sums of fractions may be a little short."""
    return min(
        (int(node.get(unit, 0.0) / amount + 1e-6) for unit, amount in each.items() if amount), default=0
    )
