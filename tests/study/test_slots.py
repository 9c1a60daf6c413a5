"""Slots on a real Ray: whole studies, failures by real signals, and what is left behind.

Everything that needs Ray shares one local cluster of four logical CPUs. Epochs are waited for, not slept for.
"""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from study.config import SlotsConfig
from study.control import Control
from study.worker import describe, run_job
from tests.processes import NOT_NICE
from trainables.errors import TrialFailed

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
Job = dict[str, Any]
Record = dict[str, Any]


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Job]:
    def make(job_id: str, entry: str, **params: Any) -> Job:
        return {
            "id": job_id,
            "role": "trial",
            "entry": f"toy_trials:{entry}",
            "trial": {"params": params, "seed": 7},
            "cache_dir": str(tmp_path / "cache"),
            "checkpoint_dir": str(tmp_path / job_id),
        }

    return make


# -- the conversation of slot and workers, without Ray ------------------------------------------------------


def record(epoch: int, epochs: int = 3) -> dict[str, Any]:
    return {"epoch": epoch, "epochs": epochs, "done": epoch == epochs, "metrics": {"official": float(epoch)}}


async def joined(num_workers: int = 1, max_restarts: int = 1) -> Control:
    control = Control(max_restarts)
    await control.submit({"id": "a"})
    for rank in range(num_workers):
        await control.join("g1", rank, b"", num_workers)
    return control


def test_an_epoch_waits_for_the_verdict() -> None:
    async def scene() -> None:
        control = await joined()
        assert await control.take("g1", 0, 0) == (1, {"id": "a"})
        told = asyncio.create_task(control.report("g1", 1, 0, record(1)))
        assert (await control.next(0, 1.0))["record"] == record(1)
        assert not told.done()
        assert (await control.next(1, 0.01))["kind"] == "waiting"
        assert await told is True
        told = asyncio.create_task(control.report("g1", 1, 0, record(2)))
        assert (await control.next(1, 1.0))["record"]["epoch"] == 2
        await control.submit({"id": "b"})  # instead of going on: the trial was stopped
        assert await told is False
        assert await control.take("g1", 0, 1) == (2, {"id": "b"})

    asyncio.run(scene())


def test_a_group_takes_over_and_no_epoch_goes_up_twice() -> None:
    async def scene() -> None:
        control = await joined()
        await control.take("g1", 0, 0)
        old = asyncio.create_task(control.report("g1", 1, 0, record(1)))
        await control.next(0, 1.0)
        await control.died("killed")
        await control.join("g2", 0, b"")
        assert await control.take("g2", 0, 0) == (1, {"id": "a"})
        again = asyncio.create_task(control.report("g2", 1, 0, record(1)))
        assert (await control.next(0, 0.01))["kind"] == "waiting"
        assert (await control.next(1, 0.01))["kind"] == "waiting"
        assert await again is True
        assert await control.report("g1", 1, 0, record(2)) is False
        last = asyncio.create_task(control.report("g2", 1, 0, record(3)))
        event = await control.next(1, 1.0)
        assert (event["record"], event["restarts"]) == (record(3), 1)
        assert await last is False
        old.cancel()

    asyncio.run(scene())


def test_a_job_that_kills_its_workers_fails() -> None:
    async def scene() -> None:
        control = await joined(max_restarts=1)
        for group in ("g1", "g2"):
            await control.join(group, 0, b"")
            assert await control.take(group, 0, 0) is not None
            await control.died("worker 0: signal 9")
        await control.join("g3", 0, b"")
        waiting = asyncio.create_task(control.take("g3", 0, 0))
        event = await control.next(0, 1.0)
        assert event["kind"] == "failed"
        assert event["reason"] == "its workers died 2 times (allowed: 1): worker 0: signal 9"
        await control.submit({"id": "b"})
        assert await waiting == (2, {"id": "b"})

    asyncio.run(scene())


def test_a_failed_rank_takes_its_group_out_of_service() -> None:
    async def scene() -> None:
        control = await joined(num_workers=2)
        for rank in (0, 1):
            await control.take("g1", rank, 0)
        await control.fail("g1", 1, 1, "broken", "...")
        assert (await control.next(0, 1.0))["reason"] == "broken"
        await control.submit({"id": "b"})
        assert (await control.next(0, 0.01))["phase"] == "starting"
        stuck = asyncio.create_task(control.take("g1", 0, 1))
        await asyncio.sleep(0)
        assert not stuck.done()
        await control.join("g2", 0, b"", 2)
        assert await stuck is None
        assert await control.take("g2", 0, 0) == (2, {"id": "b"})

    asyncio.run(scene())


def test_a_group_that_makes_place_for_another_size_ends_its_epoch_first() -> None:
    async def scene() -> None:
        control = await joined(num_workers=2, max_restarts=0)
        for rank in (0, 1):
            await control.take("g1", rank, 0)
        assert await control.leave() is False
        first = asyncio.create_task(control.report("g1", 1, 0, record(1)))
        assert (await control.next(0, 1.0))["num_workers"] == 2
        assert await control.leave() is False, "rank 1 still trains"
        second = asyncio.create_task(control.report("g1", 1, 1, record(1)))
        assert (await control.next(1, 0.01))["phase"] == "running"
        assert await control.leave() is True
        assert not first.done()
        assert not second.done()
        assert (await control.next(1, 0.01))["phase"] == "starting", (
            "bounded by the time that a start may take"
        )
        await control.join("g2", 0, b"", 1)
        assert await control.take("g2", 0, 0) == (1, {"id": "a"})
        again = asyncio.create_task(control.report("g2", 1, 0, record(1)))
        assert (await control.next(1, 0.01))["kind"] == "waiting", "no epoch goes up twice"
        assert await again is True
        assert (await first, await second) == (False, False)
        last = asyncio.create_task(control.report("g2", 1, 0, record(2)))
        event = await control.next(1, 1.0)
        assert (event["num_workers"], event["restarts"]) == (1, 0), "a resize is no failure"
        last.cancel()

    asyncio.run(scene())


def test_a_rank_that_is_late_follows_the_others_before_its_group_leaves() -> None:
    async def scene() -> None:
        control = await joined(num_workers=2)
        await control.take("g1", 0, 0)
        assert await control.leave() is False
        assert await asyncio.wait_for(control.take("g1", 1, 0), 1.0), "rank 0 has begun, and waits for rank 1"
        await control.stay()
        first = asyncio.create_task(control.report("g1", 1, 0, record(1)))
        await control.next(0, 1.0)
        await control.next(1, 0.0)
        assert await first is True
        assert await control.leave() is False
        assert await asyncio.wait_for(control.report("g1", 1, 1, record(1)), 1.0), "rank 0 has begun epoch 2"
        last = [asyncio.create_task(control.report("g1", 1, rank, record(2))) for rank in (0, 1)]
        await control.next(1, 1.0)
        await control.next(2, 0.01)
        assert await control.leave() is True
        assert not any(task.done() for task in last)
        await control.close()
        assert [await task for task in last] == [False, False]

    asyncio.run(scene())


def test_a_group_that_may_stay_goes_on() -> None:
    async def scene() -> None:
        control = await joined()
        await control.take("g1", 0, 0)
        told = asyncio.create_task(control.report("g1", 1, 0, record(1)))
        await control.next(0, 1.0)
        assert await control.leave() is True
        assert (await control.next(1, 0.01))["phase"] == "starting"
        assert not told.done()
        await control.stay()
        assert await told is True
        assert (await control.next(1, 0.01))["phase"] == "running"
        await control.submit({"id": "b"})
        assert await control.leave() is True, "it has not taken the job yet"
        taken = asyncio.create_task(control.take("g1", 0, 1))
        await asyncio.sleep(0)
        assert not taken.done(), "and takes none while it is to leave"
        await control.stay()
        assert await taken == (2, {"id": "b"})

    asyncio.run(scene())


@pytest.mark.parametrize(("num_workers", "restarts"), [(2, 1), (1, 0)])
def test_only_a_death_that_leaves_the_size_as_it_was_is_the_trial_s(num_workers: int, restarts: int) -> None:
    async def scene() -> None:
        control = await joined(num_workers=2)
        await control.take("g1", 0, 0)
        await control.died("its node has gone, or its process")
        await control.join("g2", 0, b"", num_workers)
        await control.take("g2", 0, 0)
        told = asyncio.create_task(control.report("g2", 1, 0, record(1)))
        assert (await control.next(0, 1.0))["restarts"] == restarts
        told.cancel()

    asyncio.run(scene())


# -- one trial in a worker, without Ray ---------------------------------------------------------------------


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(
    ("entry", "params", "reason"),
    [
        ("raising", {}, "ZeroDivisionError: a toy breaks"),
        ("raising", {"named": True}, "loss align is nan in epoch 2"),
        ("ending_early", {}, "it ended after epoch 1 without a record that says done"),
        (
            "not_json",
            {},
            "TypeError: the record of epoch 1 is not plain JSON: Object of type object is not JSON serializable",
        ),
        ("absent", {}, "AttributeError: module 'toy_trials' has no attribute 'absent'"),
    ],
)
def test_a_failure_is_one_line(
    make_job: Callable[..., Job], entry: str, params: dict[str, Any], reason: str
) -> None:
    failure = run_job(make_job("a", entry, **params), lambda record: True)
    assert failure is not None
    assert failure[0] == reason
    assert reason.split(": ")[-1].split()[-1] in failure[1]


@pytest.mark.usefixtures("toys")
def test_a_trial_without_memory_fails_alone(make_job: Callable[..., Job]) -> None:
    reported: list[Record] = []
    failure = run_job(make_job("a", "hungry"), lambda record: not reported.append(record))  # type: ignore[func-returns-value]
    assert failure is not None
    assert failure[0].startswith("out of memory; a smaller training.batch_size needs less (RuntimeError: ")
    assert [r["epoch"] for r in reported] == [1]
    assert run_job(make_job("b", "quick"), lambda record: True) is None


@pytest.mark.parametrize(
    ("error", "out_of_memory"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (ValueError("memory"), False),
        (TrialFailed("loss align is nan in epoch 2"), False),
    ],
)
def test_errors_that_say_there_is_no_memory(error: Exception, out_of_memory: bool) -> None:
    assert describe(error).startswith("out of memory; ") == out_of_memory


@pytest.mark.usefixtures("toys")
def test_each_epoch_tells_what_its_process_takes(make_job: Callable[..., Job]) -> None:
    import ray  # noqa: F401  # brings psutil

    from study.run_text import metrics
    from study.system_metrics import Meter

    records: list[dict[str, Any]] = []
    job = make_job("a", "quick")
    assert run_job(job, lambda record: not records.append(record), Meter().read) is None  # type: ignore[func-returns-value]
    assert records
    for record in records:
        told = {name: value for name, value in metrics(record).items() if name.startswith("system/")}
        assert told["system/process_memory_megabytes"] > 10
        assert told["system/cpu_utilization_percentage"] >= 0
        assert 0 < told["system/system_memory_usage_percentage"] <= 100


@pytest.mark.usefixtures("toys")
def test_nothing_leaks_into_the_next_trial(make_job: Callable[..., Job]) -> None:
    import toy_trials

    seen: list[dict[str, Any]] = []

    def report(record: dict[str, Any]) -> bool:
        seen.append(record["seen"])
        return True

    before = toy_trials.state() | {"random": 0, "numpy": 0, "torch": 0}
    for job_id in "ab":
        assert run_job(make_job(job_id, "leaking"), report) is None
    assert seen[0] == seen[1]
    assert before == toy_trials.state() | {"random": 0, "numpy": 0, "torch": 0}


# -- on Ray -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a local Ray of four CPUs whose processes can import the toys."""
    from study.slots import ray_environment

    path = f"{ROOT}{os.pathsep}{HERE}"
    variables = ray_environment() | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **NOT_NICE}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Ray warns of while it starts is not ours
        for name, value in variables.items():
            patch.setenv(name, value)
        import ray

        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            object_store_memory=100_000_000,
        )
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


class Handle:
    """A slot driven by hand, as Tune would do it."""

    def __init__(self, trainable: Any) -> None:
        self.trainable, self.actor = trainable, None

    def start(self, job: Job) -> None:
        import ray

        if self.actor is None:
            self.actor = ray.remote(num_cpus=0)(self.trainable).remote({"job": job})
        else:
            assert ray.get(self.actor.reset.remote({"job": job}))

    def step(self) -> dict[str, Any]:
        import ray

        assert self.actor is not None
        return dict(ray.get(self.actor.train.remote()))

    def run(self, job: Job) -> list[dict[str, Any]]:
        self.start(job)
        results = [self.step()]
        while not results[-1]["done"]:
            results.append(self.step())
        return results

    def stop(self) -> None:
        import ray

        if self.actor is not None:
            ray.get(self.actor.stop.remote())
            self.kill()

    def kill(self) -> None:
        import ray

        if self.actor is not None:
            ray.kill(self.actor)


def left_behind(address: str) -> list[str]:
    """Actors and placement groups that are alive, apart from the one service that Ray keeps for a cluster."""
    from ray.util.state import list_actors, list_placement_groups

    actors = list_actors(address=address, filters=[("state", "!=", "DEAD")], limit=1000)
    groups = list_placement_groups(address=address, filters=[("state", "!=", "REMOVED")], limit=1000)
    names = [a.class_name for a in actors if a.class_name != "_AutoscalingCoordinatorActor"]
    return names + [f"placement group {g.state}" for g in groups]


def assert_nothing_left(address: str) -> None:
    """A process takes a moment to be gone after it was told to go."""
    import time

    deadline = time.monotonic() + 90
    while (left := left_behind(address)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


def epochs(results: list[dict[str, Any]]) -> list[int]:
    return [r["epoch"] for r in results if not r["failed"]]


@pytest.mark.slow
def test_a_study(cluster: str, make_job: Callable[..., Job], tmp_path: Path) -> None:
    """Tune, ASHA, two slots: all kinds of trials, one after the other in the same two workers."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    from study.slots import slot_class

    told: dict[str, list[dict[str, Any]]] = {}

    class Listen(tune.Callback):
        def on_trial_result(self, result: dict[str, Any], **info: Any) -> None:
            told.setdefault(result["job_id"], []).append(dict(result))

    jobs = [make_job(f"good{i}", "quick", quality=9.0 - i) for i in range(6)]
    jobs[2:2] = [make_job("breaks", "raising"), make_job("dies", "resuming", dies_in=3)]
    jobs.append(make_job("hungry", "hungry"))
    jobs += [make_job("first", "leaking"), make_job("second", "leaking")]
    results = tune.Tuner(
        slot_class(SlotsConfig(), storage=tmp_path / "train"),
        param_space={"job": tune.grid_search(jobs)},
        tune_config=tune.TuneConfig(
            metric="official",
            mode="max",
            scheduler=ASHAScheduler(time_attr="epoch", max_t=3, grace_period=1, reduction_factor=2),
            max_concurrent_trials=2,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(tmp_path),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            callbacks=[Listen()],
            verbose=0,
        ),
    ).fit()
    assert results.num_errors == 0
    assert sorted(told) == sorted(job["id"] for job in jobs)
    whole = [i for i in range(6) if epochs(told[f"good{i}"]) == [1, 2, 3]]
    assert whole, "which one depends on the slot that is up first; that one is compared with nobody"
    assert min(len(told[f"good{i}"]) for i in range(6)) == 1, "nothing was stopped early"
    assert told["breaks"][-1]["failed"] == "ZeroDivisionError: a toy breaks"
    assert "ZeroDivisionError" in told["breaks"][-1]["traceback"]
    assert told["hungry"][-1]["failed"].startswith("out of memory; ")
    assert epochs(told["dies"]) == [1, 2, 3]
    assert told["dies"][-1]["restarts"] == 1
    assert told["dies"][-1]["record"]["first"] == 3, "the trial began anew instead of going on"
    assert told["first"][0]["record"]["seen"] == told["second"][0]["record"]["seen"]
    slots = {r["pid"] for results in told.values() for r in results}
    workers = {r["record"]["pid"] for rs in told.values() for r in rs if "pid" in (r.get("record") or {})}
    assert (len(slots), len(workers)) == (2, 3), (
        "one worker died and was replaced; no other process was started"
    )
    idle = [r["idle_s"] for rs in told.values() for r in rs[:1] if r.get("idle_s") is not None]
    assert sorted(idle)[len(idle) // 2] < 1.0  # measured: 0.02
    assert_nothing_left(cluster)
    assert not list((tmp_path / "train").glob("*"))


@pytest.mark.slow
def test_two_ranks(cluster: str, make_job: Callable[..., Job], tmp_path: Path) -> None:
    """A slot of two workers that train together, through failures of one of them."""
    from study.slots import slot_class

    slot = Handle(slot_class(SlotsConfig(workers=2), storage=tmp_path / "train"))
    try:
        good = slot.run(make_job("good", "averaging"))
        assert [(r["epoch"], r["official"], r["record"]["num_ranks"]) for r in good] == [
            (e, 12.0, 2) for e in (1, 2, 3)
        ]
        slot.start(make_job("stopped", "averaging"))
        assert slot.step()["epoch"] == 1
        again = slot.run(make_job("again", "averaging"))
        assert epochs(again) == [1, 2, 3]
        assert again[0]["record"]["pid"] == good[0]["record"]["pid"]

        failed = slot.run(
            make_job("raises", "averaging", raises_on=1)
        )  # rank 0 waits for it in an all-reduce
        assert (epochs(failed), failed[-1]["failed"]) == ([1], "rank 1 has had enough")
        killed = slot.run(make_job("killed", "averaging", dies_on=1))
        assert epochs(killed) == [1, 2, 3]
        assert [r["restarts"] for r in killed] == [0, 1, 1]
        assert {r["official"] for r in killed} == {12.0}
    finally:
        slot.stop()
    assert_nothing_left(cluster)


@pytest.mark.slow
def test_one_rank_that_hangs_and_one_that_always_dies(
    cluster: str, make_job: Callable[..., Job], tmp_path: Path
) -> None:
    from study.slots import slot_class

    slot = Handle(slot_class(SlotsConfig(max_restarts=0, epoch_timeout_s=3.0), storage=tmp_path / "train"))
    try:
        hung = slot.run(make_job("hangs", "hanging"))
        assert (epochs(hung), hung[-1]["failed"]) == ([1], "no epoch finished within 3 s")
        died = slot.run(make_job("dies", "resuming", dies_in=2, deaths=9))
        assert epochs(died) == [1]
        assert died[-1]["failed"].startswith("its workers died 1 times (allowed: 0): worker 0: ")
        assert epochs(slot.run(make_job("good", "quick"))) == [1, 2, 3]
        slot.start(make_job("unfinished", "hanging"))
        assert slot.step()["epoch"] == 1
        slot.actor.train.remote()  # until the worker hangs, so that nobody can be sent home
    finally:
        slot.kill()
    assert_nothing_left(cluster)


@pytest.mark.slow
def test_workers_that_find_no_place(cluster: str, make_job: Callable[..., Job], tmp_path: Path) -> None:
    import ray

    from study.slots import SlotLost, slot_class

    wanting = SlotsConfig(workers=2, cpus_per_worker=3.0, start_timeout_s=2.0)
    slot = Handle(slot_class(wanting, storage=tmp_path / "train"))
    slot.start(make_job("good", "quick"))
    try:
        with pytest.raises(SlotLost) as lost:
            slot.step()
        assert isinstance(lost.value, ray.exceptions.RayTaskError)
        reason = str(lost.value).strip().splitlines()[-1]
        assert "asked for 2 x {CPU 3}; the cluster has {CPU 4}, free {CPU 4}" in reason
    finally:
        slot.stop()
    assert_nothing_left(cluster)
