"""The sum of what slots ask for against what there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from study import resources
from study.config import SlotsConfig
from study.resources import Supply, describe
from trainables.errors import UserError


def machine(cpus: float = 2, gpus: float = 0) -> Supply:
    total = {"CPU": cpus, "GPU": gpus}
    return Supply(where="this machine", total=total, widest=total)


def slots(count: int = 2, workers: int = 1, cpus: float = 1.0, gpus: float = 0.0) -> SlotsConfig:
    return SlotsConfig(count=count, workers=workers, cpus_per_worker=cpus, gpus_per_worker=gpus)


def test_what_fits_is_told_as_a_sum() -> None:
    assert describe(slots(), machine()) == "2 slots x 1 worker x 1 CPU: 2 of 2 CPUs on this machine"
    text = describe(slots(1, 4, 2, 0.5), machine(8, 2))
    assert text == (
        "1 slot x 4 workers x 2 CPUs: 8 of 8 CPUs on this machine; "
        "1 slot x 4 workers x 0.5 GPU: 2 of 2 GPUs on this machine"
    )


def test_fractions_that_add_up_fit() -> None:
    assert "of 1 CPU on" in describe(slots(10, 1, 0.1), machine(1))


@pytest.mark.parametrize(
    ("asked", "supply", "words"),
    [
        (slots(4), machine(2), ["4 slots x 1 worker x 1 CPU is 4 CPUs", "has 2", "--set slots.count=2"]),
        (slots(2), machine(1), ["slots.cpus_per_worker = 1", "--set slots.count=1"]),
        (slots(1, 4), machine(2), ["--set slots.cpus_per_worker=0.5"]),
        (slots(1, 3), machine(1), ["--set slots.cpus_per_worker=0.33"]),
        (
            slots(2, 1, 1, 1),
            machine(8, 0),
            ["slots.gpus_per_worker = 1", "has 0", "--set slots.gpus_per_worker=0"],
        ),
        (slots(4, 2, 1, 1), machine(99, 4), ["8 GPUs", "has 4", "--set slots.count=2"]),
        (slots(4, 2, 1, 1), machine(99, 1), ["--set slots.gpus_per_worker=0.12"]),
    ],
)
def test_too_much_is_refused_with_what_would_fit(
    asked: SlotsConfig, supply: Supply, words: list[str]
) -> None:
    with pytest.raises(UserError) as refused:
        describe(asked, supply)
    for part in words:
        assert part in str(refused.value)


def test_a_worker_has_to_fit_on_one_node() -> None:
    supply = Supply(
        where="the Ray cluster (4 nodes)", total={"CPU": 32, "GPU": 4}, widest={"CPU": 8, "GPU": 1}
    )
    with pytest.raises(UserError, match=r"no machine of the Ray cluster \(4 nodes\) has more than 1 GPU"):
        describe(slots(1, 2, 1, 2), supply)


def test_an_elastic_slot_needs_its_minimum_and_says_what_it_may_take() -> None:
    asked = SlotsConfig(count=2, workers=3, min_workers=1)
    text = "2 slots x 1 to 3 workers x 1 CPU: 2 to 6 of 4 CPUs on this machine"
    assert describe(asked, machine(4)) == text
    with pytest.raises(
        UserError, match=r"is at least 2 CPUs, this machine has 1; for example --set slots\.count=1"
    ):
        describe(asked, machine(1))


def test_an_autoscaler_of_unknown_size_is_trusted() -> None:
    none = {"CPU": 0.0, "GPU": 0.0}
    supply = Supply(where="the Ray cluster (1 node)", total=none, widest=none, open_ended=True)
    assert "has 0 GPU now and may add nodes" in describe(slots(8, 1, 1, 1), supply)


def test_the_head_holds_what_leads_the_slots() -> None:
    total = {"CPU": 64.0, "GPU": 0.0}
    supply = Supply(where="the Ray cluster (3 nodes)", total=total, widest=total, head_gb=8.0)
    assert describe(slots(8), supply).endswith(
        "1 GB for the driver and 8 slots x 0.6 GB: 5.8 of 8.0 GB on the head"
    )
    with pytest.raises(
        UserError, match=r"slots\.count = 40: .* is 25\.0 GB on the cluster's head, which has 8\.0 GB"
    ):
        describe(slots(40), supply)
    with pytest.raises(UserError, match=r"--set slots\.count=11, or a head with more memory"):
        describe(slots(12), supply)
    assert describe(slots(11), supply)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 4),
        ({"cpu.max": "max 100000\n"}, 4),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ],
)
def test_a_container_quota_counts(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert resources.num_cpus(tmp_path) == expected


LAUNCHER = """
max_workers: 3
head_node_type: head
available_node_types:
  head: {resources: {CPU: 4}, node_config: {}}
  gpu: {resources: {CPU: 8, GPU: 2}, min_workers: 0, max_workers: 10, node_config: {}}
"""


def test_the_launcher_configuration_tells_how_far_a_cluster_grows(tmp_path: Path) -> None:
    path = tmp_path / "bootstrap.yaml"
    path.write_text(LAUNCHER)
    total, widest = resources._growth_limit(path) or ({}, {})
    assert total == {"CPU": 4 + 3 * 8, "GPU": 6}
    assert widest == {"CPU": 8, "GPU": 2}


def test_given_hosts_are_as_many_as_there_will_be(tmp_path: Path) -> None:
    path = tmp_path / "bootstrap.yaml"
    path.write_text("provider: {type: local, head_ip: 10.0.0.1, worker_ips: [10.0.0.2, 10.0.0.3]}")
    assert resources._num_hosts(path) == 3
    path.write_text("provider: {type: aws, region: eu-central-1}")
    assert resources._num_hosts(path) is None
    assert resources._num_hosts(tmp_path / "none.yaml") is None


@pytest.mark.parametrize("text", ["", "nonsense: [", "- a", LAUNCHER.replace("CPU: 8, ", "")])
def test_a_configuration_that_does_not_tell_limits_nothing(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bootstrap.yaml"
    path.write_text(text)
    assert resources._growth_limit(path) is None
    assert resources._growth_limit(tmp_path / "none.yaml") is None


def test_the_sum_is_the_one_that_slots_reserve() -> None:
    from study.slots import slot_resources

    asked = slots(1, 3, 2, 1)
    reserved = slot_resources(asked)
    assert describe(asked, machine(reserved["CPU"], reserved["GPU"]))
    with pytest.raises(UserError):
        describe(asked, machine(reserved["CPU"] - 1, reserved["GPU"]))
    with pytest.raises(UserError):
        describe(asked, machine(reserved["CPU"], reserved["GPU"] - 1))
