"""Sizes of elastic groups, on the real coordinator of Ray Train without a Ray: nodes are what a test says they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

Nodes = dict[str, float]


class Handle:
    """An object as if it were an actor: calls are made at once, and ``ray.get`` gives back what it gets."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._actor, name))


class Control:
    """A slot's other side. ``at_rest`` is whether its group has no epoch under way."""

    def __init__(self) -> None:
        self.at_rest, self.asked = False, False

    def leave(self) -> bool:
        self.asked = True
        return self.at_rest

    def stay(self) -> None:
        self.asked = False


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    """CPUs by node, to be changed by the test, and a way to make slots that wish for them."""
    import ray
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        _AutoscalingCoordinatorActor,
    )
    from ray.train import ScalingConfig

    from study import elastic

    monkeypatch.setattr(ray, "get", lambda value, timeout=None: value)
    monkeypatch.setattr(elastic, "LOOK_S", 0.0)
    nodes: Nodes = {}
    coordinator = _AutoscalingCoordinatorActor(
        send_resources_request=lambda bundles, **_: None,
        get_cluster_nodes=lambda: [
            {"NodeID": name, "Alive": True, "Resources": {"CPU": cpus}} for name, cpus in nodes.items()
        ],
    )

    def slot(name: str, least: int, most: int, cpus: float = 1.0) -> Any:
        scaling = ScalingConfig(num_workers=(least, most), resources_per_worker={"CPU": cpus})
        policy = elastic.Elastic(scaling, Handle(Control()))
        policy._requester_id = name
        policy._coordinator_client = SimpleNamespace(_autoscaling_coordinator=Handle(coordinator))
        policy._send_resource_request()
        return policy

    return SimpleNamespace(nodes=nodes, slot=slot, tick=coordinator._tick)


def started(policy: Any) -> int:
    """The size of the group that a slot without one starts; 0: it waits."""
    return getattr(policy.make_decision_for_non_running_worker_group(), "num_workers", 0)


def resized(policy: Any, size: int) -> int:
    """The size that a running group of ``size`` gets; 0: it stays."""
    decision = policy.make_decision_for_running_worker_group(SimpleNamespace(num_workers=size), None)
    return getattr(decision, "num_workers", 0)


def test_every_minimum_comes_before_anything_beyond_one(cluster: Any) -> None:
    cluster.nodes["head"] = 2.0
    first, second = cluster.slot("a", 1, 4), cluster.slot("b", 1, 4)
    assert (started(first), started(second)) == (1, 1)
    cluster.nodes["more"] = 2.0
    cluster.tick()
    first._control._actor.at_rest = True
    assert (resized(first, 1), resized(second, 1)) == (3, 0)
    third = cluster.slot("c", 1, 4)
    assert started(third) == 1
    assert resized(first, 3) == 2, "what goes beyond a minimum makes place for one"


def test_below_the_minimum_a_slot_waits(cluster: Any) -> None:
    cluster.nodes["head"] = 1.0
    slot = cluster.slot("a", 2, 4)
    assert started(slot) == 0
    cluster.nodes["more"] = 9.0
    assert started(slot) == 4


def test_a_group_is_replaced_between_epochs_only(cluster: Any) -> None:
    cluster.nodes["head"] = 1.0
    slot = cluster.slot("a", 1, 2)
    control = slot._control._actor
    assert started(slot) == 1
    assert resized(slot, 1) == 0
    assert not control.asked
    cluster.nodes["more"] = 1.0
    cluster.tick()
    assert resized(slot, 1) == 0
    assert control.asked, "it is to leave when its epoch is over"
    del cluster.nodes["more"]
    cluster.tick()
    assert resized(slot, 1) == 0
    assert not control.asked, "the node has gone again: it may stay"
    cluster.nodes["more"] = 1.0
    cluster.tick()
    control.at_rest = True
    assert resized(slot, 1) == 2


def test_a_size_that_does_not_start_is_not_tried_again_in_the_same_room(cluster: Any) -> None:
    cluster.nodes["head"] = 3.0
    slot = cluster.slot("a", 1, 3)
    slot._control._actor.at_rest = True
    assert [started(slot) for _ in range(4)] == [3, 2, 1, 1]
    assert resized(slot, 1) == 0
    cluster.nodes["head"] = 2.0
    cluster.tick()
    assert resized(slot, 1) == 2


def test_it_is_tried_again_on_another_node(cluster: Any) -> None:
    cluster.nodes |= {"head": 1.0, "taken": 1.0}
    slot = cluster.slot("a", 1, 2)
    slot._control._actor.at_rest = True
    assert [started(slot), started(slot), resized(slot, 1)] == [2, 1, 0]
    cluster.nodes["other"] = cluster.nodes.pop("taken")
    cluster.tick()
    assert resized(slot, 1) == 2


def test_it_is_tried_again_later(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.nodes["head"] = 2.0
    slot = cluster.slot("a", 1, 2)
    slot._control._actor.at_rest = True
    assert [started(slot), started(slot), resized(slot, 1)] == [2, 1, 0]
    monkeypatch.setattr("study.elastic.REFUSED_S", 0.0)
    assert resized(slot, 1) == 2


def test_shares_of_a_cpu_add_up(cluster: Any) -> None:
    cluster.nodes["head"] = 1.0
    assert started(cluster.slot("a", 1, 20, cpus=0.1)) == 10
