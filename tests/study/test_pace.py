"""A machine that is ten times slower is named, once, and one that is a little slower is not."""

from __future__ import annotations

import random
from typing import Any

from study.pace import ENOUGH, Pace


def epoch(job_id: str, seconds: float | None, host: str | None = None, system: str = "retain") -> Any:
    metrics = {"official": 50.0} if seconds is None else {"train_s": seconds}
    return {"id": job_id, "trial": {"system": system}}, {"metrics": metrics, "host": host}


def test_a_machine_ten_times_slower_is_named_once() -> None:
    pace, draw = Pace(), random.Random(0)
    said = []
    for number in range(20):
        said.append(pace.remark(*epoch(f"t{number:04d}", draw.uniform(1.0, 2.5), "10.0.0.2")))
        said.append(pace.remark(*epoch(f"s{number:04d}", draw.uniform(10.0, 25.0), "10.0.0.3")))
        said.append(pace.remark(*epoch("b-teacher", None)))
    (remark,) = filter(None, said)
    assert remark.startswith("s")
    assert " is slow: training an epoch took " in remark
    assert remark.endswith("; it runs on 10.0.0.3")
    assert said.index(remark) < 4 * ENOUGH


def test_an_epoch_is_compared_with_other_trials_of_its_system_only() -> None:
    pace = Pace()
    for number in range(ENOUGH):
        assert pace.remark(*epoch(f"t{number:04d}", 1.0)) is None
    assert pace.remark(*epoch("t0010", 10.0, system="identify")) is None
    assert pace.remark(*epoch("t0011", 4.0)) is None
    assert (
        pace.remark(*epoch("t0012", 10.0)) == "t0012 is slow: training an epoch took 10 s, that of others 1 s"
    )
