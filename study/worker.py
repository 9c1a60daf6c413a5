"""The resident side of a slot: a Ray Train worker that runs trial after trial in one warm process.

``resident`` is the training function of the worker group and lives as long as the slot. Each trial starts from the
same process state (``pristine.py``).

A trial that raises is reported and the next one follows. In a group of several workers, and when the GPU does not
work any more, the worker ends with ``GroupBroken`` instead and Ray Train restarts the group.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from study.pristine import pristine
from study.system_metrics import Meter
from trainables.errors import TrialFailed, UserError
from trainables.settings import TrialConfig, build

Record = dict[str, Any]
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "Unable to allocate")
PING_S = 5.0  # a rank whose process does not answer for so long is taken for dead


class GroupBroken(RuntimeError):
    """This group of workers cannot go on; Ray Train shall start another one."""


def resident(config: Mapping[str, Any]) -> None:
    """Take jobs from ``config["control"]`` until there are no more (Ray Train's training function).

    ``config["gpus_per_worker"]`` decides how ranks talk to each other: NCCL needs a whole GPU for each.
    ``config["system_metrics"]`` says whether each record tells what the process takes of its machine.
    """
    import ray
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    context, control = ray.train.get_context(), config["control"]
    rank, num_ranks = context.get_world_rank(), context.get_world_size()
    group = uuid.uuid4().hex
    if num_ranks > 1:
        group = broadcast_from_rank_zero(group)
    handle = ray.cloudpickle.dumps(ray.get_runtime_context().current_actor)
    ray.get(control.join.remote(group, rank, handle, num_ranks))
    host = ray.util.get_node_ip_address()
    print(f"rank {rank} of {num_ranks} on {host}", flush=True)  # into Ray's logs
    import torch  # takes seconds, which shall not count as the first trial's

    gc.freeze()  # collecting garbage after each trial then takes a hundredth of the time
    if num_ranks > 1:
        _connect(rank, num_ranks, nccl=config["gpus_per_worker"] >= 1)
    measure = Meter().read if config["system_metrics"] else dict
    seq, idle_since = 0, None
    while (taken := ray.get(control.take.remote(group, rank, seq))) is not None:
        seq, job = taken
        idle_s = None if idle_since is None else time.monotonic() - idle_since

        def report(record: Record, seq: int = seq, idle_s: float | None = idle_s) -> bool:
            nonlocal idle_since
            idle_since = time.monotonic()  # if this epoch is the last one
            record = {**record, "host": host}
            return bool(ray.get(control.report.remote(group, seq, rank, record, idle_s)))

        failure = run_job(job, report, measure)
        if failure is None:
            continue
        if not all(_alive(other) for other in ray.get(control.others.remote(group, rank))):
            raise GroupBroken(f"rank {rank} noticed that another one has died: {failure[0]}")
        ray.get(control.fail.remote(group, seq, rank, *failure))
        if num_ranks > 1:  # the others may wait in a collective, for ever
            raise GroupBroken(f"the trial failed on rank {rank}: {failure[0]}")
        _require_working_gpu()
    if num_ranks > 1:
        torch.distributed.destroy_process_group()


def run_job(
    job: Mapping[str, Any],
    report: Callable[[Record], bool],
    measure: Callable[[], dict[str, float]] = dict,
) -> tuple[str, str] | None:
    """Run one trial; ``report`` takes each record and says whether the trial goes on. What ``measure`` reads joins the
    metrics of each.

    Returns:
        None, or why the trial failed: one line, and the traceback.
    """
    module, _, function = job["entry"].partition(":")
    failure = None
    try:
        train = getattr(importlib.import_module(module), function)  # first, so that its names can be put back
    except Exception as error:
        return _failure(error)
    with pristine(seed=int(job["trial"].get("seed", 0)), package=module.partition(".")[0]):
        try:
            trial = build(TrialConfig, job["trial"])
            folders = {key: Path(job[key]) for key in ("cache_dir", "checkpoint_dir")}
            _report_all(train(trial, **folders), report, measure)
        except (Exception, SystemExit) as error:
            failure = _failure(error)
    return failure


def _failure(error: BaseException) -> tuple[str, str]:
    text = "".join(traceback.format_exception(error))
    traceback.clear_frames(error.__traceback__)  # they hold models and batches
    return describe(error), text


def _report_all(
    records: Iterator[Record], report: Callable[[Record], bool], measure: Callable[[], dict[str, float]]
) -> None:
    done, epoch = False, 0
    try:
        for record in records:
            epoch, done = record["epoch"], record["done"]
            try:
                record = json.loads(json.dumps(record))
            except (TypeError, ValueError) as error:
                raise TypeError(f"the record of epoch {epoch} is not plain JSON: {error}") from error
            if readings := measure():
                record["metrics"].update(readings)
            if not report(record) or done:
                return
    finally:
        if hasattr(records, "close"):
            records.close()
    raise TrialFailed(f"it ended after epoch {epoch} without a record that says done")


def describe(error: BaseException) -> str:
    """One line that says why a trial failed."""
    text = " ".join(str(error).split())
    if isinstance(error, TrialFailed | UserError):
        return text
    if isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY):
        return (
            f"out of memory; a smaller training.batch_size needs less ({type(error).__name__}: {text[:300]})"
        )
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__


def _connect(rank: int, num_ranks: int, nccl: bool) -> None:
    """Set torch.distributed up for this group, once for all its trials."""
    import ray
    import torch.distributed as dist
    from ray.train.collective import broadcast_from_rank_zero

    address, host = None, ray.util.get_node_ip_address()
    # Left alone, Gloo listens where the host's name leads, which on many machines is the loopback.
    if interface := _interface(host):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if rank == 0:  # the store takes a free port itself: nobody can take it in between
        store = dist.TCPStore(host, 0, num_ranks, is_master=True, wait_for_workers=False)
        address = [host, store.port]
    host, port = broadcast_from_rank_zero(address)
    if rank:
        store = dist.TCPStore(host, port, num_ranks, is_master=False)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if nccl else "gloo", store=store, rank=rank, world_size=num_ranks
    )


def _interface(address: str) -> str | None:
    """The network interface that has this address."""
    import psutil  # comes with Ray

    for name, found in psutil.net_if_addrs().items():
        if any(one.address == address for one in found):
            return str(name)
    return None


def _alive(worker: bytes) -> bool:
    """Whether the process of a pickled actor handle answers. When a rank dies, a collective fails in the others."""
    import ray

    try:
        ray.get(ray.cloudpickle.loads(worker).__ray_ready__.remote(), timeout=PING_S)
    except Exception:
        return False
    return True


def _require_working_gpu() -> None:
    """An illegal access leaves a process without a GPU for good; out of memory does not."""
    import torch

    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device="cuda").add_(1).item()
        except RuntimeError as error:
            raise GroupBroken(f"the GPU does not work any more after a failed trial: {error}") from error
