"""Small trials for the tests of slots: each shows one way in which a trial can behave or misbehave.

Entries have the signature of ``trainables.loop.train``. ``trial.params`` says what to do.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainables.errors import TrialFailed
from trainables.files import write_atomically
from trainables.settings import TrialConfig

Record = dict[str, Any]
setting = "as imported"


def _epochs(trial: TrialConfig) -> int:
    return int(trial.params.get("epochs", 3))


def _record(epoch: int, epochs: int, official: float = 50.0, **more: Any) -> Record:
    metrics = {"official": official, "loss": 1.0 / epoch}
    return {"epoch": epoch, "epochs": epochs, "done": epoch == epochs, "metrics": metrics, **more}


def quick(trial: TrialConfig, *, cache_dir: Path, checkpoint_dir: Path) -> Iterator[Record]:
    """``quality`` points more in each epoch."""
    for epoch in range(1, _epochs(trial) + 1):
        time.sleep(float(trial.params.get("epoch_s", 0.0)))
        yield _record(epoch, _epochs(trial), epoch * float(trial.params.get("quality", 1.0)), pid=os.getpid())


def resuming(trial: TrialConfig, *, cache_dir: Path, checkpoint_dir: Path) -> Iterator[Record]:
    """Keeps a checkpoint and goes on from it. Dies by ``signal`` once, while it trains epoch ``dies_in``."""
    checkpoint_dir.mkdir(parents=True, exist_ok=True)
    kept, first = checkpoint_dir / "state.json", 1
    if kept.exists():
        record = json.loads(kept.read_text())
        first = record["epoch"] + 1
        yield record
    for epoch in range(first, _epochs(trial) + 1):
        died = checkpoint_dir / f"died-{epoch}"
        if epoch == trial.params.get("dies_in") and len(list(checkpoint_dir.glob(died.name + "*"))) < int(
            trial.params.get("deaths", 1)
        ):
            (checkpoint_dir / f"{died.name}-{os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        record = _record(epoch, _epochs(trial), first=first, pid=os.getpid())
        write_atomically(kept, json.dumps(record))
        yield record


def raising(trial: TrialConfig, *, cache_dir: Path, checkpoint_dir: Path) -> Iterator[Record]:
    yield _record(1, 3)
    if trial.params.get("named"):
        raise TrialFailed("loss align is nan in epoch 2")
    raise ZeroDivisionError("a toy\nbreaks")


def ending_early(trial: TrialConfig, *, cache_dir: Path, checkpoint_dir: Path) -> Iterator[Record]:
    yield _record(1, 3)


def not_json(trial: TrialConfig, *, cache_dir: Path, checkpoint_dir: Path) -> Iterator[Record]:
    yield _record(1, 3, table=object())


def hungry(trial: TrialConfig, *, cache_dir: Path, checkpoint_dir: Path) -> Iterator[Record]:
    """Wants more memory than the system gives it: 8 GB, when its process may have 1 GB more than it has."""
    import resource

    import torch

    yield _record(1, 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + (1 << 30), hard))
    try:
        torch.ones(8 << 30, dtype=torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    yield _record(2, 3)


def hanging(trial: TrialConfig, *, cache_dir: Path, checkpoint_dir: Path) -> Iterator[Record]:
    yield _record(1, 3)
    threading.Event().wait()


def state() -> dict[str, Any]:
    """What a trial can see of its process."""
    import gc

    import numpy as np
    import torch

    return {
        "random": random.random(),
        "numpy": float(np.random.rand()),
        "torch": float(torch.rand(())),
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "cudnn": [torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic],
        "numpy_errors": np.geterr(),
        "gc": [gc.isenabled(), *gc.get_threshold()],
        "environment": sorted(k for k in os.environ if k.startswith(("LEAK", "PYTHONPATH"))),
        "folder": os.getcwd(),
        "logging": [logging.getLogger().level, logging.root.manager.disable, logging.getLogger("leak").level],
        "handlers": len(logging.getLogger().handlers),
        "warnings": len(warnings.filters),
        "setting": setting,
    }


def leaking(trial: TrialConfig, *, cache_dir: Path, checkpoint_dir: Path) -> Iterator[Record]:
    """Shows the state it was started in, and leaves everything changed."""
    import gc

    import numpy as np
    import torch

    global setting
    seen = state()
    setting = "changed by a trial"
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    torch.autograd.set_detect_anomaly(True, check_nan=False)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = True
    np.seterr(all="ignore")
    gc.disable()
    gc.set_threshold(1)
    os.environ["LEAK"] = "1"
    os.environ.pop("PYTHONPATH", None)
    os.chdir("/")
    logging.getLogger().setLevel(logging.DEBUG)
    logging.getLogger().addHandler(logging.NullHandler())
    logging.getLogger("leak").setLevel(logging.DEBUG)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    yield _record(1, 1, seen=seen)


def averaging(trial: TrialConfig, *, cache_dir: Path, checkpoint_dir: Path) -> Iterator[Record]:
    """Trains under DDP when there are several ranks. Each rank adds its share: wrong ranks, wrong numbers."""
    import torch
    import torch.distributed as dist

    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    checkpoint_dir.mkdir(parents=True, exist_ok=True)
    model: torch.nn.Module = torch.nn.Linear(4, 1)
    if num_ranks > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    for epoch in range(1, _epochs(trial) + 1):
        if rank == trial.params.get("raises_on") and epoch == 2:
            raise TrialFailed(f"rank {rank} has had enough")
        once = checkpoint_dir / "died"
        if rank == trial.params.get("dies_on") and epoch == 2 and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        model.zero_grad()
        model(torch.full((2, 4), float(rank + 1))).sum().backward()
        weight = next(model.parameters())
        assert weight.grad is not None
        if rank:
            yield {"epoch": epoch, "epochs": _epochs(trial), "done": epoch == _epochs(trial)}
        else:
            gradient = float(weight.grad.sum())  # the mean over ranks of 2 * (rank + 1) * 4
            yield _record(epoch, _epochs(trial), gradient, num_ranks=num_ranks, pid=os.getpid())


def growing(trial: TrialConfig, *, cache_dir: Path, checkpoint_dir: Path) -> Iterator[Record]:
    """Adds up over its ranks, however many, with a checkpoint, until there is a file ``enough``.

    Each epoch that is begun is a line in ``begun.txt``, and takes half a second.
    """
    import torch
    import torch.distributed as dist

    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    checkpoint_dir.mkdir(parents=True, exist_ok=True)
    kept, record, enough = checkpoint_dir / "state.json", {"epoch": 0, "done": False}, torch.zeros(())
    if kept.exists():
        record = json.loads(kept.read_text())
        yield record if rank == 0 else {key: record[key] for key in ("epoch", "epochs", "done")}
        if record["done"]:
            return
    for epoch in itertools.count(record["epoch"] + 1):
        if rank == 0:
            with open(checkpoint_dir / "begun.txt", "a") as file:
                file.write(f"{epoch} {num_ranks}\n")
        time.sleep(0.5)
        enough.fill_(float(rank == 0 and (checkpoint_dir / "enough").exists()))
        shown = torch.full((), float(rank + 1))
        if num_ranks > 1:
            dist.all_reduce(shown)
            dist.all_reduce(enough)
        record = {"epoch": epoch, "epochs": epoch, "done": bool(enough)}
        if rank == 0:
            record |= {"metrics": {"official": float(shown)}, "num_ranks": num_ranks}
            write_atomically(kept, json.dumps(record))
        if num_ranks > 1:
            dist.barrier()
        yield record
        if record["done"]:
            return
