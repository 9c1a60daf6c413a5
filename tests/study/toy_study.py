"""A study that trains nothing, to be run by real Ray Tune: ``python toy_study.py FOLDER``.

What a slot does follows from files in the folder ``faults`` beside the study, made by the test: ``fail-<job>``
(raises, in the slot's way), ``kill-<job>`` (the slot dies at epoch 3, once), ``nan-<job>``, ``hold-<job>`` (waits at
epoch 2 until the file is gone). Each epoch a slot computes is a line in ``epochs.txt``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ray import tune

EPOCHS = 6
RECIPES = {"alpha": {"x": 0.5}, "beta": {"x": 0.4}}


def space(trial: Any) -> dict[str, Any]:
    return {"x": trial.suggest_float("x", 0.0, 1.0)}


def value(params: dict[str, Any], epoch: int) -> float:
    return 60.0 - 40.0 * abs(params["x"] - 0.5) + epoch


def config(trials: int = 7, seed: int = 0) -> Any:
    from study.config import SearchConfig, SlotsConfig, StudyConfig
    from trainables.settings import TrainingConfig

    search = SearchConfig(
        trials=trials, seed=seed, sampler="random", startup_trials=4, grace_epochs=2, recipes=tuple(RECIPES)
    )
    return StudyConfig(
        training=TrainingConfig(epochs=EPOCHS), search=search, slots=SlotsConfig(count=2, workers=1)
    )


class ToySlot(tune.Trainable):
    """Computes an epoch per step, with a checkpoint; takes the next job by ``reset_config``."""

    def setup(self, config: dict[str, Any]) -> None:
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._take(new_config)
        return True

    def _take(self, config: dict[str, Any]) -> None:
        self.job = config["job"]
        home = Path(self.job["cache_dir"])
        self.faults, self.log = home / "faults", home / "epochs.txt"
        self.checkpoint = Path(self.job["checkpoint_dir"]) / "epoch.json"
        self.epoch = json.loads(self.checkpoint.read_text()) if self.checkpoint.exists() else 0
        self.repeat = self.epoch > 0

    def _fault(self, kind: str, once: bool = False) -> bool:
        path = self.faults / f"{kind}-{self.job['id']}"
        found = path.exists()
        if found and once:
            path.unlink()
        return found

    def step(self) -> dict[str, Any]:
        if not self.repeat:
            self.epoch += 1
            if self.epoch == 3 and self._fault("kill", once=True):
                os.kill(os.getpid(), signal.SIGKILL)
            if self.epoch == 2 and self._fault("fail"):
                return {
                    "done": True,
                    "failed": "RuntimeError: toy\n failure",
                    "traceback": "a\nb\n",
                    "epoch": 1,
                }
            while self.epoch == 2 and self._fault("hold"):
                time.sleep(0.02)
            with open(self.log, "a") as file:
                file.write(f"{self.job['id']} {self.epoch} {os.getpid()}\n")
            self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            partial = self.checkpoint.with_suffix(".partial")
            partial.write_text(json.dumps(self.epoch))
            partial.replace(self.checkpoint)
        self.repeat = False
        done = self.epoch == EPOCHS
        official = float("nan") if self._fault("nan") else value(self.job["params"], self.epoch)
        record = {
            "epoch": self.epoch,
            "epochs": EPOCHS,
            "done": done,
            "metrics": {"official": official, "epoch_s": 0.5},
            "table": [{"machine": "m", "official": official}],
        }
        return {
            "job_id": self.job["id"],
            "role": self.job["role"],
            "epoch": self.epoch,
            "official": official,
            "done": done,
            "failed": None,
            "record": record,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        raise AssertionError("Tune must not save checkpoints of its own")

    def load_checkpoint(self, checkpoint: Any) -> None:
        raise AssertionError("Tune must not restore checkpoints of its own")


def open_search(home: Path, settings: Any) -> Any:
    from study.folder import StudyFolder
    from study.search import Search

    (home / "faults").mkdir(parents=True, exist_ok=True)
    return Search(settings, StudyFolder(home / "toy"), space=space, recipes=RECIPES, cache_dir=home)


def confirm_jobs(search: Any) -> list[dict[str, Any]]:
    """Three jobs that need what the search found."""
    from study.search import build_job

    best = search.study.best_trial
    return [
        build_job(
            search.config,
            search.folder,
            job_id=f"c-best-s{seed}",
            role="confirm",
            params=best.params,
            cache_dir=Path(search.folder.path.parent),
            seed=seed,
            split="confirm",
        )
        for seed in range(3)
    ]


def run(home: Path, listeners: tuple[Any, ...] = (), **settings: Any) -> Any:
    """Run the toy study in ``home`` to its end."""
    from study.tuning import run_jobs

    search = open_search(home, config(**settings))
    run_jobs(
        search.config,
        search,
        tune.with_resources(ToySlot, {"CPU": 0.5}),
        after_search=lambda: confirm_jobs(search),
        listeners=listeners,
    )
    return search


def start_ray() -> None:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    start_ray()
    run(Path(sys.argv[1]))
