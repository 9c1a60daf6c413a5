"""The one training loop: any system, in one process or under DDP, one record per epoch.

    for record in train(trial, cache_dir=Path("runs/cache"), checkpoint_dir=None): ...

All randomness of an epoch follows from (seed, epoch), and batches are drawn whole and then shared out over the
ranks: the same trial gives the same numbers whether it ran through or was continued from its checkpoint, and up to
rounding on any number of workers. The checkpoint of an epoch is on disk before its record is yielded; a trial that
is started again first yields the record its checkpoint holds. A loss that is not finite ends it as ``TrialFailed``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainables.cache import Materials, mixture_features, prepare
from trainables.checkpoint import load_checkpoint, pack_optimizer, save_checkpoint, unpack_optimizer
from trainables.encoders.encoder import load_encoder
from trainables.errors import TrialFailed, UserError
from trainables.retain import Draw, Retain
from trainables.scoring.grid import Row, score_plan, summarise
from trainables.settings import TrialConfig

SYSTEMS = {"retain": Retain}
CLIP_NORM = 1.0
Record = dict[str, Any]


def train(trial: TrialConfig, *, cache_dir: Path, checkpoint_dir: Path | None = None) -> Iterator[Record]:
    """Train and score one trial.

    Args:
        cache_dir: where corpora, teacher targets and features are shared.
        checkpoint_dir: where this trial's checkpoints go; None keeps none.

    Yields:
        One record per epoch: epoch, epochs, done, metrics (points, losses, seconds), and the table of scores
        whenever all machines were scored. Ranks other than 0 yield epoch, epochs and done alone.

    Raises:
        UserError: settings or inputs that cannot be used.
        TrialFailed: the loss is no longer finite.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = pick_device(trial.training.device)
    torch.set_num_threads(trial.training.threads)
    begun = time.perf_counter()
    materials = prepare(trial, cache_dir, device)
    prepare_s = time.perf_counter() - begun
    if trial.system == "frozen":
        yield reference_record(trial, materials)
        return
    run = _Run(trial, materials, device, rank, world)
    first = run.restore(checkpoint_dir)
    if first is not None:
        yield first
    for epoch in range(run.epoch + 1, trial.training.epochs + 1):
        begun = time.perf_counter()
        metrics = run.train_epoch(epoch)
        trained = time.perf_counter()
        table = run.score(epoch)
        if rank == 0:
            scored = summarise(table, trial.scoring.backend)
            metrics |= scored | {"gap_closed": gap_closed(scored, materials.reference, table, trial.scoring.backend)}
            metrics["train_s"], metrics["scoring_s"] = trained - begun, time.perf_counter() - trained
            metrics["prepare_s"], prepare_s = prepare_s, 0.0
            metrics["examples_per_s"] = trial.training.steps_per_epoch * trial.training.batch_size / metrics["train_s"]
            metrics["epoch_s"] = time.perf_counter() - begun
        record = run.record(epoch, metrics, table)
        run.save(checkpoint_dir, record)
        yield record


def pick_device(name: str) -> torch.device:
    """``auto`` is this process's GPU when there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return torch.device(name)


def reference_record(trial: TrialConfig, materials: Materials) -> Record:
    """The one record of a system that trains nothing: ``params["reference"]`` is teacher or oracle."""
    name = trial.params.get("reference")
    if name not in materials.reference:
        raise UserError(f"reference = {name!r}: allowed are {', '.join(materials.reference)}")
    table = materials.reference[str(name)]
    metrics = summarise(table, trial.scoring.backend)
    metrics["gap_closed"] = gap_closed(metrics, materials.reference, table, trial.scoring.backend)
    return {"epoch": 1, "epochs": 1, "done": True, "metrics": metrics, "table": table}


def gap_closed(scored: dict[str, float], reference: dict[str, list[Row]], table: list[Row], backend: str) -> float:
    """Share of the teacher-to-oracle gap closed at low SNR, on the machines that ``table`` scored.

    0 is the frozen teacher, 1 the oracle; 0 by definition where the oracle is not above the teacher.
    """
    machines = {row["machine"] for row in table}
    low = {
        name: summarise([r for r in rows if r["machine"] in machines], backend)["low/official"]
        for name, rows in reference.items()
    }
    gap = low["oracle"] - low["teacher"]
    return (scored["low/official"] - low["teacher"]) / gap if gap > 0 else 0.0


class _Run:
    """The moving parts of one trial: student, optimizer and curriculum, and how they are saved."""

    def __init__(self, trial: TrialConfig, materials: Materials, device: torch.device, rank: int, world: int) -> None:
        self.trial, self.materials, self.device, self.rank, self.world = trial, materials, device, rank, world
        if trial.system not in SYSTEMS:
            raise UserError(f"system = {trial.system!r}: allowed are {', '.join(SYSTEMS)}")
        if trial.training.batch_size % world:
            raise UserError(f"training.batch_size = {trial.training.batch_size}: not divisible by {world} workers")
        torch.manual_seed(trial.seed)
        self.system = SYSTEMS[trial.system](load_encoder(trial.encoder), materials, trial).to(device)
        self.model: nn.Module = self.system
        if world > 1:
            self.model = nn.parallel.DistributedDataParallel(self.system, find_unused_parameters=False)
        self.base_rate = float(trial.params["learning_rate"])  # type: ignore[arg-type]
        own = self.system.weighting.parameter_groups()
        apart = {id(p) for group in own for p in group["params"]}
        rest = [p for p in self.system.parameters() if p.requires_grad and id(p) not in apart]
        groups = [{"params": rest, "lr": self.base_rate, "weight_decay": trial.training.weight_decay}, *own]
        self.optimizer = torch.optim.AdamW(groups)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.epoch = 0

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One epoch of steps; mean losses and weights by name, equal on all ranks."""
        config, system = self.trial.training, self.system
        rng = np.random.default_rng([self.trial.seed, epoch])
        progress = (epoch - 1) / max(1, config.epochs - 1)
        draws = system.draws(rng, count=config.steps_per_epoch, batch_size=config.batch_size, progress=progress)
        sums: dict[str, Tensor] = {}
        self.model.train()
        for step, draw in enumerate(draws):
            done = (epoch - 1) * config.steps_per_epoch + step
            self._set_rate(done, config.epochs * config.steps_per_epoch)
            with self._autocast():
                losses = self.model(draw, self.rank, self.world)
            means = {name: values.float().mean() for name, values in losses.items()}
            total = system.weighting(means, system.encoder.last_block())
            total = total + 0.0 * sum(means.values())  # a loss without weight still gives its parameters a gradient
            self.optimizer.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_([p for p in system.parameters() if p.grad is not None], CLIP_NORM)
            self.optimizer.step()
            for name, value in {**means, "total": total}.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value.detach()
            self._observe(draw, losses)
        mean = {name: float(self._mean(value / len(draws))) for name, value in sums.items()}
        self._require_finite(mean, epoch)
        tally = torch.from_numpy(system.curriculum.tally.copy())
        if self.world > 1:
            tally = tally.to(self.device)
            dist.all_reduce(tally)
        system.curriculum.end_epoch(tally.cpu().numpy())
        system.weighting.end_epoch({name: mean[name] for name in means})
        weights = {f"weight_{name}": value for name, value in system.weighting.weights().items()}
        snr = np.concatenate([d.snr_db_B for d in draws])
        lambdas = np.concatenate([d.lambda_B for d in draws])
        shown = {"train_snr_db": float(snr.mean()), "train_lambda": float(lambdas.mean())}
        return {f"loss_{name}": value for name, value in mean.items()} | weights | shown

    def score(self, epoch: int) -> list[Row]:
        """The table of scores after an epoch; early epochs may score the first few machines only."""
        trial, plan = self.trial, self.materials.plan
        machines, backends = plan.machines, None
        if epoch < trial.training.epochs:
            backends = (trial.scoring.backend,)
            if trial.scoring.machines_early:
                machines = machines[: trial.scoring.machines_early]
        emb = self.embed(plan.rows(machines))
        if self.rank:
            return []
        bands = self.system.encoder.num_bands
        return score_plan(plan, self.materials.corpus, emb, num_bands=bands, backends=backends, machines=machines)

    @torch.no_grad()
    def embed(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings [R, E] of the plan's mixtures, the given rows filled; ranks share the work."""
        self.model.eval()
        size = self.system.encoder.embedding_size
        full = torch.zeros(len(self.materials.plan.clip_R), size)
        mine = rows[self.rank :: self.world]
        for i in range(0, len(mine), self.trial.scoring.batch_size):
            part = mine[i : i + self.trial.scoring.batch_size]
            with self._autocast():
                full[part] = self.system.embed(self._features(part)).float().cpu()
        if self.world > 1:
            full = full.to(self.device)
            dist.all_reduce(full)  # every row was filled by one rank only
        return full.cpu().numpy()

    def record(self, epoch: int, metrics: dict[str, float], table: list[Row]) -> Record:
        done = epoch == self.trial.training.epochs
        record: Record = {"epoch": epoch, "epochs": self.trial.training.epochs, "done": done}
        if self.rank == 0:
            record["metrics"] = metrics
            if done:
                record["table"] = table
        self.epoch = epoch
        return record

    def save(self, folder: Path | None, record: Record) -> None:
        if folder is None:
            return
        if self.rank == 0:
            tensors = {f"model.{k}": v for k, v in self.system.state_dict().items()} | pack_optimizer(self.optimizer)
            save_checkpoint(
                folder, self.epoch, tensors, {"record": record, "curriculum": self.system.curriculum.state_dict()}
            )
        if self.world > 1:
            dist.barrier()  # no rank goes on before the checkpoint it would be restarted from exists

    def restore(self, folder: Path | None) -> Record | None:
        """Continue from the newest sound checkpoint; the record it holds, if there was one."""
        found = load_checkpoint(folder) if folder is not None and folder.is_dir() else None
        if found is None:
            return None
        tensors, state = found
        self.system.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        unpack_optimizer(self.optimizer, tensors)
        self.system.curriculum.load_state_dict(state["curriculum"])
        self.epoch = int(state["epoch"])
        record: Record = state["record"]
        return record if self.rank == 0 else {k: record[k] for k in ("epoch", "epochs", "done")}

    def _features(self, rows: np.ndarray) -> Tensor:
        if self.materials.feature_RFM is not None:
            return torch.from_numpy(self.materials.feature_RFM[rows]).to(self.device)
        return mixture_features(self.materials.corpus, self.materials.plan, rows, self.system.encoder, self.device)

    def _observe(self, draw: Draw, losses: dict[str, Tensor]) -> None:
        weights = self.system.weighting.weights()
        mine = sum(weights[name] * values.detach().float() for name, values in losses.items())
        assert isinstance(mine, Tensor)
        self.system.curriculum.observe(draw.shard(self.rank, self.world).snr_db_B, mine.cpu().numpy())

    def _set_rate(self, step: int, num_steps: int) -> None:
        warm = max(1, round(self.trial.training.warmup_fraction * num_steps))
        factor = min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / num_steps))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def _mean(self, value: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(value)
            value = value / self.world
        return value

    def _require_finite(self, mean: dict[str, float], epoch: int) -> None:
        broken = [name for name, value in mean.items() if not math.isfinite(value)]
        if broken:
            raise TrialFailed(f"loss {broken[0]} is {mean[broken[0]]} in epoch {epoch}; lower learning_rate or the weights")

    def _autocast(self) -> Any:
        if self.trial.training.precision == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()
