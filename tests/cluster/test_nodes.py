"""Nodes that come and go under a study: trials keep their epochs, and each ends once.

The nodes are process groups on this machine (``nodes`` in ``conftest.py``); one dies by the kill of all that belongs to
it. The trials are toys (``tests/study/toy_trials.py``) that add up over their ranks, so that their numbers say how many
took part. That real training gives the same on any number of workers, also when it goes on from another number's
checkpoint, is ``tests/trainables/test_systems.py``.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from study.config import SearchConfig, SlotsConfig, StudyConfig
from study.folder import StudyFolder
from study.search import Search
from tests.cluster.conftest import Nodes
from tests.processes import wait_for

pytestmark = pytest.mark.cluster
RECIPES = {"alpha": {"x": 0.5}, "beta": {"x": 0.4}}  # never stopped early


class Other:
    """An actor of somebody else, which takes a CPU."""


@dataclass
class Study:
    """``trials`` toys on ``slots``, and a story told beside them."""

    home: Path
    slots: SlotsConfig
    trials: int = 1
    errors: list[BaseException] = field(default_factory=list)

    @property
    def folder(self) -> StudyFolder:
        return StudyFolder(self.home / "study")

    @property
    def names(self) -> list[str]:
        return [f"t{number:04d}" for number in range(self.trials)]

    def sizes(self, trial: str) -> list[int]:
        """Ranks that took part in each epoch so far."""
        return [record["num_ranks"] for record in self.folder.records(trial)]

    def enough(self, trial: str) -> None:
        """The trial's next epoch is its last."""
        self.folder.checkpoint_path(trial).mkdir(parents=True, exist_ok=True)
        (self.folder.checkpoint_path(trial) / "enough").touch()

    def begun(self, trial: str) -> list[int]:
        """Every epoch that was begun, in order."""
        lines = (self.folder.checkpoint_path(trial) / "begun.txt").read_text().splitlines()
        return [int(line.split()[0]) for line in lines]

    def run(self, story: Callable[[], None]) -> None:
        """To the end, with ``story`` beside it. Whatever happens in the story, the trials end after it."""
        from study.slots import slot_class
        from study.tuning import run_jobs

        def tell() -> None:
            try:
                story()
            except BaseException as error:
                self.errors.append(error)
            finally:
                for trial in self.names:
                    self.enough(trial)

        def check() -> None:
            if self.errors:
                raise self.errors[0]

        search = SearchConfig(trials=self.trials, sampler="random", recipes=tuple(RECIPES)[: self.trials])
        config = StudyConfig(slots=self.slots, search=search)
        space = lambda trial: {"x": trial.suggest_float("x", 0.0, 1.0)}  # noqa: E731
        entry = "toy_trials:growing"
        toys = Search(config, self.folder, space=space, recipes=RECIPES, cache_dir=self.home, entry=entry)
        beside = threading.Thread(target=tell, daemon=True)
        beside.start()
        run_jobs(config, toys, slot_class(self.slots, storage=self.home / "train"), watch=check)
        beside.join(60)
        check()
        self.optuna = [trial.state.name for trial in toys.study.trials]

    def assert_whole(self) -> None:
        """Every trial has ended once, and has each of its epochs once."""
        assert self.folder.job_ids() == self.names
        assert self.optuna == ["COMPLETE"] * self.trials
        for trial in self.names:
            assert self.folder.result(trial)["state"] == "finished"
            epochs = [record["epoch"] for record in self.folder.records(trial)]
            assert epochs == list(range(1, len(epochs) + 1))
            lines = (self.folder.job_path(trial) / "records.jsonl").read_text().splitlines()
            assert len(lines) == len(epochs)
            twice = [epoch for epoch, times in Counter(self.begun(trial)).items() if times > 1]
            print(json.dumps({"trial": trial, "epochs": len(epochs), "begun twice": twice}))


def test_an_elastic_slot_grows_with_the_cluster_and_survives_its_shrinking(
    nodes: Nodes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    # with no restart allowed, what counts as a failure ends the trial
    study = Study(tmp_path, SlotsConfig(count=1, workers=2, min_workers=1, max_restarts=0))
    taken = nodes.add()
    other = ray.remote(num_cpus=1)(Other).remote()
    ray.get(other.__ray_ready__.remote())
    nodes.add()

    def sizes() -> list[int]:
        return study.sizes("t0000")

    def story() -> None:
        wait_for(
            lambda: len(sizes()) >= 2,
            "two epochs with one worker, where there seemed to be room for two",
            600,
        )
        nodes.kill(taken)
        more = nodes.add()
        wait_for(lambda: sizes().count(2) >= 2, "two epochs with two workers", 600)
        grown = study.begun("t0000")
        assert len(grown) == len(set(grown)), "growing waits for the end of an epoch"
        nodes.kill(more)
        wait_for(lambda: sizes()[-2:] == [1, 1], "two epochs with one worker again", 600)

    study.run(story)
    study.assert_whole()
    told = [(record["num_ranks"], record["metrics"]["official"]) for record in study.folder.records("t0000")]
    assert set(told) == {(1, 1.0), (2, 3.0)}, "ranks that do not take part, or take part twice"
    changes = [size for before, size in zip([0, *sizes()], sizes(), strict=False) if size != before]
    assert changes == [1, 2, 1]
    assert study.folder.result("t0000")["num_workers"] == 1
    assert max(Counter(study.begun("t0000")).values()) <= 2, "a node's death costs the running epoch"
    assert "lost its slot" not in caplog.text
    print(f"workers of the slot: {changes}")


def test_a_trial_goes_on_where_its_node_has_died(
    nodes: Nodes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = Study(tmp_path, SlotsConfig(count=2, workers=1), trials=2)
    names = [nodes.add() for _ in range(3)]

    def busy() -> list[str]:
        """The nodes with a resident worker."""
        return [
            name for name in names if any("RayTrainWorker" in line for line in nodes.processes(name).values())
        ]

    def story() -> None:
        wait_for(lambda: all(len(study.sizes(t)) >= 2 for t in study.names), "two epochs of both trials", 600)
        before = busy()
        assert len(before) == 2
        (spare,) = set(names) - set(before)
        epochs = {trial: len(study.sizes(trial)) for trial in study.names}
        nodes.kill(before[0])
        print(f"epochs {epochs} when {before[0]} of {before} was killed")
        wait_for(lambda: spare in busy(), f"a worker on {spare}", 600)
        epochs = {trial: len(study.sizes(trial)) for trial in study.names}
        further = lambda t: len(study.sizes(t)) >= epochs[t] + 2  # noqa: E731
        wait_for(lambda: all(map(further, study.names)), "two more epochs of both trials", 600)

    study.run(story)
    study.assert_whole()
    times = {trial: Counter(study.begun(trial)) for trial in study.names}
    again = {trial: [e for e, n in counted.items() if n > 1] for trial, counted in times.items()}
    assert sum(map(len, again.values())) <= 1, f"{again} were computed twice instead of the running one alone"
    assert "lost its slot" not in caplog.text
