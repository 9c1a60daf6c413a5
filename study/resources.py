"""Does what the slots ask for exist? CPUs and GPUs of this machine or of a Ray cluster, and the sum that must fit.

``describe`` is arithmetic on a ``Supply``; ``of_machine`` and ``of_cluster`` find one out. Asking for more than
there is, or than an autoscaler can add, is a ``UserError``: a study would otherwise wait for ever. On a cluster the
head's memory is counted too, because the actors that lead the slots stay there (``slots.py``).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainables.errors import UserError

if TYPE_CHECKING:
    from study.config import SlotsConfig

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # the cluster launcher leaves its configuration on the head
UNITS = {"CPU": "slots.cpus_per_worker", "GPU": "slots.gpus_per_worker"}
HEAD = "node:__internal_head__"  # the resource that only a head has
DRIVER_GB, SLOT_GB = 1.0, 0.6  # of the head's memory: the study itself; what leads one slot (measured: 0.55)


@dataclass(frozen=True, kw_only=True)
class Supply:
    """CPUs and GPUs, under Ray's names.

    ``total`` is what is there now, or what an autoscaler can bring it to; ``widest`` the most that one node has.
    ``open_ended`` says that an autoscaler may add nodes of which nothing is known here; ``head_gb`` is the head's
    memory, None where workers share it.
    """

    where: str
    total: Mapping[str, float]
    widest: Mapping[str, float]
    open_ended: bool = False
    head_gb: float | None = None


def describe(slots: SlotsConfig, supply: Supply) -> str:
    """The sum as one line, such as ``2 slots x 1 worker x 1 CPU: 2 of 2 CPUs on this machine``.

    Raises:
        UserError: more than there is, or a worker that fits on no node; with a setting that would fit.
    """
    sums = []
    for unit, key in UNITS.items():
        each = slots.cpus_per_worker if unit == "CPU" else slots.gpus_per_worker
        needed, most = (each * workers * slots.count for workers in (slots.least, slots.workers))
        have, widest = supply.total.get(unit, 0), supply.widest.get(unit, 0)
        if not each:
            continue
        counted = f"{_slots(slots)} x {_count(each, unit)}"
        if not supply.open_ended and needed > have + 1e-9:
            why = f"{counted} is {'at least ' * slots.elastic}{_count(needed, unit)}, {supply.where} has {have:g}"
            raise UserError(f"{key} = {each:g}: {why}; for example {_smaller(slots, unit, have)}")
        if not supply.open_ended and each > widest + 1e-9:
            why = f"no machine of {supply.where} has more than {_count(widest, unit)}"
            raise UserError(f"{key} = {each:g}: {why}; for example --set {key}={widest:g}")
        room = f"of {_count(have, unit)} on {supply.where}"
        if supply.open_ended:
            room = f"needed; {supply.where} has {_count(have, unit)} now and may add nodes"
        sums.append(f"{counted}: {needed:g}{f' to {most:g}' * slots.elastic} {room}")
    if not sums:
        sums.append(f"{_slots(slots)}, none reserved")
    if supply.head_gb is not None:
        sums.append(_on_the_head(slots, supply.head_gb))
    return "; ".join(sums)


def _slots(slots: SlotsConfig) -> str:
    workers = f"{slots.size} worker{'' if slots.workers == 1 else 's'}"
    return f"{_count(slots.count, 'slot')} x {workers}"


def _on_the_head(slots: SlotsConfig, have_gb: float) -> str:
    needed_gb = DRIVER_GB + slots.count * SLOT_GB
    counted = f"{DRIVER_GB:g} GB for the driver and {_count(slots.count, 'slot')} x {SLOT_GB:g} GB"
    if needed_gb > have_gb:
        fitting = max(1, math.floor((have_gb - DRIVER_GB) / SLOT_GB))
        raise UserError(
            f"slots.count = {slots.count}: {counted} is {needed_gb:.1f} GB on the cluster's head, which has "
            f"{have_gb:.1f} GB; for example --set slots.count={fitting}, or a head with more memory"
        )
    return f"{counted}: {needed_gb:.1f} of {have_gb:.1f} GB on the head"


def _smaller(slots: SlotsConfig, unit: str, have: float) -> str:
    if unit == "GPU" and have == 0:
        return "--set slots.gpus_per_worker=0"
    each = slots.cpus_per_worker if unit == "CPU" else slots.gpus_per_worker
    fitting = math.floor(have / (each * slots.least) + 1e-9)
    if fitting:
        return f"--set slots.count={fitting}"
    share = math.floor(100 * have / (slots.count * slots.least)) / 100
    return f"--set {UNITS[unit]}={share:g} (workers then share them)"


def _count(amount: float, unit: str) -> str:
    return f"{amount:g} {unit}{'' if amount <= 1 else 's'}"


def of_machine() -> Supply:
    """What this machine lets this process use: affinity, container quota, visible GPUs."""
    total = {"CPU": float(num_cpus()), "GPU": float(_num_gpus())}
    return Supply(where="this machine", total=total, widest=total)


def num_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Whole CPUs this process may use; a container's quota is rounded up."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        cpus = min(cpus, math.ceil(int(quota) / int(period)))  # "max" is no number: no quota
    with contextlib.suppress(OSError, ValueError):
        quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text()
        period = (cgroup / "cpu/cpu.cfs_period_us").read_text()
        cpus = min(cpus, math.ceil(int(quota) / int(period))) if int(quota) > 0 else cpus
    return max(1, cpus)


def _num_gpus() -> int:
    """As Ray counts them when it starts here."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")
    if manager is None:
        return 0
    visible = manager.get_current_process_visible_accelerator_ids()
    found = manager.get_current_node_num_accelerators()
    return int(found if visible is None else min(found, len(visible)))


def of_cluster() -> Supply:
    """What the connected cluster has, and what it can grow to as far as that can be known from here."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    head_gb = next((node.get("memory", 0) / 1e9 for node in nodes if HEAD in node), None)
    where = f"the Ray cluster ({_count(len(nodes), 'node')})"
    total = {unit: sum(float(node.get(unit, 0)) for node in nodes) for unit in UNITS}
    widest = {unit: max((float(node.get(unit, 0)) for node in nodes), default=0.0) for unit in UNITS}
    limit = _growth_limit()
    if limit is None:
        hosts = _num_hosts()
        growing = _has_autoscaler() if hosts is None else len(nodes) < hosts
        head_gb = head_gb if growing or len(nodes) > 1 else None
        return Supply(where=where, total=total, widest=widest, open_ended=growing, head_gb=head_gb)
    grown, grown_widest = limit
    return Supply(
        where=f"{where[:-1]} now, as the autoscaler can grow it)",
        total={u: max(total[u], grown[u]) for u in UNITS},
        widest={u: max(widest[u], grown_widest[u]) for u in UNITS},
        head_gb=head_gb,
    )


def _num_hosts(path: Path = BOOTSTRAP) -> int | None:
    """Of a cluster on given hosts, how many there are; None for any other."""
    import yaml

    try:
        provider = yaml.safe_load(path.expanduser().read_text())["provider"]
        return 1 + len(provider["worker_ips"]) if provider["type"] == "local" else None
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        return None


def _growth_limit(path: Path = BOOTSTRAP) -> tuple[dict[str, float], dict[str, float]] | None:
    """From the launcher's configuration, if this is the head of such a cluster: total and widest node at most."""
    import yaml

    try:
        config = yaml.safe_load(path.expanduser().read_text())
        types = dict(config["available_node_types"])
        head = types.pop(config["head_node_type"])["resources"]
        workers = [node["resources"] for node in types.values() for _ in range(node.get("max_workers", 0))]
        room = config.get("max_workers", len(workers))
    except (OSError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None
    if not all("CPU" in node for node in (head, *workers)):
        return None  # left for the provider to fill in, so not known here
    most = {unit: sorted((node.get(unit, 0) for node in workers), reverse=True)[:room] for unit in UNITS}
    return (
        {unit: float(head.get(unit, 0) + sum(most[unit])) for unit in UNITS},
        {unit: float(max([head.get(unit, 0), *most[unit]])) for unit in UNITS},
    )


def _has_autoscaler() -> bool:
    """Whether something adds nodes. Without an autoscaler Ray reports each node as a type of its own."""
    import json

    import ray
    from ray.experimental.internal_kv import _internal_kv_get

    types: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # a report of another version: then nothing is known
        report = json.loads(_internal_kv_get("__autoscaling_status") or "{}")
        types = report.get("autoscaler_report", {}).get("node_type_mapping") or {}
    if not types:
        with contextlib.suppress(Exception):
            from ray.autoscaler.v2.sdk import get_cluster_status

            status = get_cluster_status(ray.get_runtime_context().gcs_address)
            types = {n.node_id: n.ray_node_type_name for n in (*status.active_nodes, *status.idle_nodes)}
    return any(not name.startswith("node_") for name in types.values())
