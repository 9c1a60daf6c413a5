"""From the end of one trial to the first training step of the next: warm slots, and Ray's documented pattern.

    python tests/bench/turnaround.py        # about three minutes; one JSON line

Both sides run the same small PyTorch trial, one at a time, on one Ray that is started for it. A trial writes down when
its first step begins and when its last one is over; what lies between two trials is turnaround. Ray's pattern is a
Tune function that calls ``TorchTrainer.fit`` for every trial.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from study.config import SlotsConfig

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

WARM_TRIALS, PATTERN_TRIALS = 12, 3  # a trial of the pattern costs half a minute


def steps(stamps: Path) -> float:
    """A model, an optimizer and a few steps, as small as they come; returns the last loss."""
    import torch

    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _stamp(stamps, "first step")
    for _ in range(5):
        loss = model(torch.ones(8, 64)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _stamp(stamps, "end")
    return float(loss.detach())


def _stamp(stamps: Path, what: str) -> None:
    with stamps.open("a") as file:
        file.write(json.dumps([what, time.time()]) + "\n")


def gaps(stamps: Path) -> list[float]:
    """Seconds from the end of each trial to the first step of the next."""
    lines = [json.loads(line) for line in stamps.read_text().splitlines()]
    ends = [at for what, at in lines if what == "end"]
    starts = [at for what, at in lines if what == "first step"]
    return [start - end for end, start in zip(ends, starts[1:], strict=False)]


def warm_trial(trial: Any, *, cache_dir: Path, checkpoint_dir: Path) -> Iterator[dict[str, Any]]:
    """A trial of one epoch, as slots run them; only rank 0 keeps the time."""
    import torch.distributed as dist

    rank = dist.get_rank() if dist.is_initialized() else 0
    loss = steps(cache_dir / (f"stamps-{rank}" if rank else "stamps"))
    yield {"epoch": 1, "epochs": 1, "done": True, "metrics": {"official": 50.0 + loss}}


def warm(folder: Path, slots: SlotsConfig) -> list[float]:
    """Gaps on a slot: the real search, slots and folder, and a trial that hardly trains."""
    from study.config import SearchConfig, StudyConfig
    from study.folder import StudyFolder
    from study.search import Search
    from study.slots import slot_class
    from study.tuning import run_jobs
    from trainables.settings import TrainingConfig

    config = StudyConfig(
        training=TrainingConfig(epochs=1),
        search=SearchConfig(trials=WARM_TRIALS, sampler="random", grace_epochs=1, recipes=()),
        slots=slots,
    )
    search = Search(
        config,
        StudyFolder(folder / "study"),
        space=lambda trial: {"x": trial.suggest_float("x", 0, 1)},
        recipes={},
        cache_dir=folder,
        entry="turnaround:warm_trial",
    )
    run_jobs(config, search, slot_class(config.slots, storage=folder / "slots"))
    return gaps(folder / "stamps")


def pattern(folder: Path, at_once: int = 1) -> list[float]:
    """Gaps of the documented pattern, one worker a trial."""
    from ray import train, tune
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    def loop(config: dict[str, Any]) -> None:
        train.report({"loss": steps(Path(config["stamps"]))})

    def trial(config: dict[str, Any]) -> None:
        TorchTrainer(
            loop,
            train_loop_config=config,
            scaling_config=train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1 / at_once}),
            run_config=train.RunConfig(
                name=f"trial-{tune.get_context().get_trial_id()}",
                storage_path=str(folder / "train"),
                callbacks=[TuneReportCallback()],
            ),
        ).fit()

    tune.Tuner(
        tune.with_resources(trial, {"CPU": 0.1}),  # what its trainer asks for comes on top
        param_space={"x": tune.uniform(0, 1), "stamps": str(folder / "stamps")},
        tune_config=tune.TuneConfig(num_samples=PATTERN_TRIALS, max_concurrent_trials=at_once),
        run_config=tune.RunConfig(storage_path=str(folder / "tune"), verbose=0),
    ).fit()
    return gaps(folder / "stamps")


def main() -> int:
    from study.cluster import attach_or_start
    from study.config import SlotsConfig

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("warm1", "warm2", "pattern"):
            (folder / part).mkdir()
        with attach_or_start(SlotsConfig(count=1), folder):
            found = {
                f"warm{n}": warm(folder / f"warm{n}", SlotsConfig(count=1, workers=n, cpus_per_worker=1 / n))
                for n in (1, 2)
            }
            found["pattern"] = pattern(folder / "pattern")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
