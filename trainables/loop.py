"""The one training loop: any system, in one process or under DDP, one record per epoch.

    for record in train(trial, cache_dir=Path("runs/cache"), checkpoint_dir=None): ...

All randomness of an epoch follows from (seed, epoch), and batches are drawn whole and then shared out over the
ranks: the same trial gives the same numbers whether it ran through or was continued from its checkpoint, and up to
rounding on any number of workers. The checkpoint of an epoch is on disk before its record is yielded; a trial that
is started again first yields the record its checkpoint holds. A loss or a weight that is not finite ends the trial
as ``TrialFailed`` before that epoch is scored or saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainables.autoencoder import autoencoder_record
from trainables.cache import Materials, clips_at_once, mixture_features, prepare
from trainables.checkpoint import (
    learned_state,
    load_checkpoint,
    load_learned,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from trainables.encoders.encoder import load_encoder
from trainables.errors import TrialFailed, UserError
from trainables.heap import keep_freed_memory
from trainables.identify import BACKEND
from trainables.loss_weighting import loss_weighting
from trainables.params import Number
from trainables.scoring.backends import backends
from trainables.scoring.grid import Row, gap_metric, lean, score_plan, summarise
from trainables.settings import TrialConfig, check_limits
from trainables.system import System, find_systems, running_mean

AUTOENCODER = "autoencoder"  # the challenge's baseline: its own detector, and no student
CLIP_NORM = 1.0  # largest norm of a step's gradient
LEARNING_RATE = Number(0, 1, above=True)
Record = dict[str, Any]


def train(trial: TrialConfig, *, cache_dir: Path, checkpoint_dir: Path | None = None) -> Iterator[Record]:
    """Train and score one trial.

    Args:
        cache_dir: where corpora, teacher targets and features are shared.
        checkpoint_dir: where this trial's checkpoints go; None keeps none.

    Yields:
        One record per epoch: epoch, epochs, done, metrics (points, losses, seconds), and with ``done`` the table
        of scores. Ranks other than 0 yield epoch, epochs and done alone.

    Raises:
        UserError: settings or inputs that cannot be used.
        TrialFailed: a loss or a weight of the student is no longer finite.
    """
    threads = torch.get_num_threads()
    keep_freed_memory()
    try:
        yield from _train(trial, cache_dir, checkpoint_dir)
    finally:
        torch.set_num_threads(threads)


def _train(trial: TrialConfig, cache_dir: Path, checkpoint_dir: Path | None) -> Iterator[Record]:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    check_trial(trial, world)
    torch.set_num_threads(trial.training.threads)
    device = pick_device(trial.training.device)
    begun = time.perf_counter()
    materials = prepare(trial, cache_dir, device)
    if trial.system in find_systems():
        materials.make("tokens", "targets")  # what scoring reads may be in the making elsewhere meanwhile
    prepare_s = time.perf_counter() - begun
    if trial.system == "frozen":
        record = reference_record(trial, materials)
        yield _bare(record) if rank else record
        return
    if trial.system == AUTOENCODER:
        record = {"epoch": 1, "epochs": 1, "done": True}
        if rank == 0:  # one is enough
            record |= autoencoder_record(trial, materials, device)
            scored, table = record["metrics"], record["table"]
            record["metrics"] = scored | gap_metric(scored, materials.reference, table, trial.scoring)
        yield record
        return
    run = _Run(trial, materials, device, rank, world)
    first = run.restore(checkpoint_dir)
    if first is not None:
        yield first
    for epoch in range(run.epoch + 1, trial.training.epochs + 1):
        begun = time.perf_counter()
        metrics = run.train_epoch(epoch)
        trained = time.perf_counter()
        materials.make()
        made = time.perf_counter()
        table = run.score(epoch)
        if rank == 0:
            scored = summarise(table, trial.scoring.backend)
            metrics |= scored | gap_metric(scored, materials.reference, table, trial.scoring)
            metrics["train_s"], metrics["scoring_s"] = trained - begun, time.perf_counter() - made
            metrics["prepare_s"], prepare_s = prepare_s + made - trained, 0.0
            num_steps = trial.training.steps_per_epoch
            metrics["examples_per_s"] = num_steps * trial.training.batch_size / metrics["train_s"]
            metrics["epoch_s"] = time.perf_counter() - begun
            metrics |= run.size()
            if own := summarise(table, BACKEND):
                metrics[f"{BACKEND}_official"] = own["official"]
        record = run.record(epoch, metrics, table)
        run.save(checkpoint_dir, record)
        yield record


def check_trial(trial: TrialConfig, world: int = 1) -> None:
    """Refuse, before anything is computed, settings that ``world`` ranks cannot train.

    Raises:
        UserError: a system, precision, back end or device that does not exist, or a number out of its range.
    """
    check_limits(trial)
    known = (*find_systems(), "frozen", AUTOENCODER)
    if trial.system not in known:
        raise UserError(f"system = {trial.system!r}: allowed are {', '.join(known)}")
    if trial.scoring.backend not in backends():
        raise UserError(f"scoring.backend = {trial.scoring.backend!r}: allowed are {', '.join(backends())}")
    if trial.training.batch_size % world:
        raise UserError(
            f"training.batch_size = {trial.training.batch_size}: {world} workers need a multiple of {world}"
        )
    if trial.system in find_systems():
        LEARNING_RATE.read("learning_rate", trial.params.get("learning_rate"))


def pick_device(name: str) -> torch.device:
    """``auto`` is this process's GPU when there is one, else the CPU. Raises UserError if it is not there."""
    if name == "auto":
        name = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        there = "auto, cpu, cuda" if torch.cuda.is_available() else "auto, cpu"
        raise UserError(f"training.device = {name!r}: allowed here are {there}") from error
    return device


def reference_record(trial: TrialConfig, materials: Materials) -> Record:
    """The one record of a system that trains nothing: ``params["reference"]`` is teacher or oracle.

    Raises:
        UserError: another name.
    """
    name = trial.params.get("reference")
    if name not in materials.reference:
        raise UserError(f"reference = {name!r}: allowed are {', '.join(materials.reference)}")
    table = materials.reference[str(name)]
    metrics = summarise(table, trial.scoring.backend)
    metrics |= gap_metric(metrics, materials.reference, table, trial.scoring)
    return {
        "epoch": 1,
        "epochs": 1,
        "done": True,
        "metrics": metrics,
        "table": lean(table, trial.scoring.backend),
    }


def _bare(record: Record) -> Record:
    return {key: record[key] for key in ("epoch", "epochs", "done")}


class _Run:
    """The moving parts of one trial: student, weighting, optimizer and curriculum, and how they are saved."""

    def __init__(
        self, trial: TrialConfig, materials: Materials, device: torch.device, rank: int, world: int
    ) -> None:
        self.trial, self.materials, self.device, self.rank, self.world = trial, materials, device, rank, world
        torch.manual_seed(trial.seed)
        encoder = load_encoder(trial.encoder, materials.folder)
        encoder.tune(device, compiled=trial.training.compile, recompute=trial.training.checkpointing)
        self.system = find_systems()[trial.system](encoder, materials, trial).to(device)
        self.reads_cache = self.system.encoder is encoder  # whose features of the mixtures are kept
        # beside the model and outside DDP: it agrees with the other ranks by itself
        self.weighting = loss_weighting(trial.params, self.system.losses).to(device)
        # what is scored and saved: the running mean of the weights where there is one
        self.averaged = running_mean(self.system, trial.training.ema_decay)
        self.judged: System = self.averaged.module if self.averaged is not None else self.system  # type: ignore[assignment]
        self.model: nn.Module = self.system
        if world > 1:
            self.model = nn.parallel.DistributedDataParallel(self.system)
        rate = LEARNING_RATE.read("learning_rate", trial.params.get("learning_rate"))
        trained = [p for p in self.system.parameters() if p.requires_grad]
        groups = [{"params": trained, "lr": rate, "weight_decay": trial.training.weight_decay}]
        fused = True if device.type == "cuda" else None  # on a CPU it would change the last digits
        self.optimizer = torch.optim.AdamW([*groups, *self.weighting.parameter_groups()], fused=fused)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.learned = [*trained, *self.weighting.parameters()]
        self.epoch = 0

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One epoch of steps; mean losses and weights by name, equal on all ranks.

        Raises:
            TrialFailed: a loss or a weight is not finite.
        """
        config, system, weighting = self.trial.training, self.system, self.weighting
        rng = np.random.default_rng([self.trial.seed, epoch])
        progress = (epoch - 1) / max(1, config.epochs - 1)
        draws = system.draws(
            rng, count=config.steps_per_epoch, batch_size=config.batch_size, progress=progress
        )
        sums: dict[str, Tensor] = {}
        shown: list[Tensor] = []  # each example's weighted loss; stays on the device until the epoch is over
        self.model.train()
        weighting.train()
        for step, draw in enumerate(draws):
            done = (epoch - 1) * config.steps_per_epoch + step
            self._set_rate(done, config.epochs * config.steps_per_epoch)
            with self._autocast():
                losses = self.model(draw, self.rank, self.world)
            means = {name: values.float().mean() for name, values in losses.items()}
            total = weighting(means, [p for p in system.encoder.last_block() if p.requires_grad])
            # a loss without weight still gives its parameters a gradient, which DDP waits for
            total = total + 0.0 * sum(means.values())
            self.optimizer.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_(self.learned, CLIP_NORM)
            self.optimizer.step()
            if self.averaged is not None:
                self.averaged.update_parameters(self.system)
            for name, value in {**means, "total": total}.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value.detach()
            weight = dict(zip(weighting.names, weighting.current().detach(), strict=True))
            shown.append(torch.stack([weight[n] * v.detach().float() for n, v in losses.items()]).sum(0))
        mean = self._mean({name: value / len(draws) for name, value in sums.items()})
        self._require_finite(mean, epoch)
        for draw, loss_B in zip(draws, torch.stack(shown).cpu().numpy(), strict=True):
            system.curriculum.observe(draw.shard(self.rank, self.world).snr_db_B, loss_B)
        system.curriculum.end_epoch(self._sum(system.curriculum.tally))
        weighting.end_epoch({name: mean[name] for name in system.losses})
        weights = {f"weight_{name}": value for name, value in weighting.weights().items()}
        drawn = {"train_snr_db": float(np.concatenate([d.snr_db_B for d in draws]).mean())}
        lambdas = [d.lambda_B for d in draws if d.lambda_B is not None]
        if lambdas:
            drawn["train_lambda"] = float(np.concatenate(lambdas).mean())
        return {f"loss_{name}": value for name, value in mean.items()} | weights | drawn

    def score(self, epoch: int) -> list[Row]:
        """The table of scores after an epoch, on rank 0; early epochs may score the first few machines only."""
        trial, plan = self.trial, self.materials.plan
        machines, names = plan.machines, None
        if epoch < trial.training.epochs:
            names = (trial.scoring.backend,)
            if trial.scoring.machines_early:
                machines = machines[: trial.scoring.machines_early]
        emb = self.embed(plan.rows(machines))
        if self.rank:
            return []
        bands = self.system.encoder.num_bands
        table = score_plan(
            plan, self.materials.corpus, emb, num_bands=bands, backends=names, machines=machines
        )
        return table + self.judged.own_rows(emb, machines)

    @torch.no_grad()
    def embed(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings [R, E] of the plan's mixtures, the given rows filled; ranks share the work."""
        self.judged.eval()
        size = self.system.encoder.embedding_size
        full = torch.zeros(len(self.materials.plan.clip_R), size)
        mine = rows[self.rank :: self.world]
        for i in range(0, len(mine), size := clips_at_once(self.trial)):
            part = mine[i : i + size]
            with self._autocast():
                full[part] = self.judged.embed(self._features(part), self._names(part)).float().cpu()
        if self.world > 1:
            full = full.to(self.device)
            dist.all_reduce(full)  # every row was filled by one rank only
        return full.cpu().numpy()

    def size(self) -> dict[str, float]:
        """How many weights are trained, and how large the student's saved weights are, in bytes."""
        saved = learned_state(self.judged).values()
        return {
            "trained_weights": float(sum(p.numel() for p in self.system.parameters() if p.requires_grad)),
            "student_bytes": float(sum(value.nbytes for value in saved)),
        }

    def record(self, epoch: int, metrics: dict[str, float], table: list[Row]) -> Record:
        """What is yielded for an epoch, which becomes the run's latest."""
        self.epoch = epoch
        done = epoch == self.trial.training.epochs
        record: Record = {"epoch": epoch, "epochs": self.trial.training.epochs, "done": done}
        if self.rank == 0:
            record["metrics"] = metrics
            if done:
                record["table"] = lean(table, self.trial.scoring.backend)
        return record

    def save(self, folder: Path | None, record: Record) -> None:
        """Write the epoch's checkpoint, from rank 0; every rank returns when it is on disk."""
        if folder is None:
            return
        if self.rank == 0:
            parts = {name: learned_state(module) for name, module in self._saved().items()}
            tensors = {f"{part}.{k}": v for part, state in parts.items() for k, v in state.items()}
            state = {"record": record, "curriculum": self.system.curriculum.state_dict()}
            save_checkpoint(folder, self.epoch, tensors | pack_optimizer(self.optimizer), state)
        if self.world > 1:
            dist.barrier()  # no rank goes on before the checkpoint it would be restarted from exists

    def restore(self, folder: Path | None) -> Record | None:
        """Continue from the newest sound checkpoint; the record it holds, if there was one."""
        found = load_checkpoint(folder) if folder is not None else None
        if found is None:
            return None
        tensors, state = found
        for part, module in self._saved().items():
            start = f"{part}."
            load_learned(
                module, {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            )
        unpack_optimizer(self.optimizer, tensors)
        self.system.curriculum.load_state_dict(state["curriculum"])
        self.epoch = int(state["epoch"])
        if self.averaged is not None:
            self.averaged.n_averaged.fill_(self.epoch * self.trial.training.steps_per_epoch)
        record: Record = state["record"]
        return _bare(record) if self.rank else record

    def _saved(self) -> dict[str, nn.Module]:
        """The parts of a checkpoint; ``model`` is the student that was scored, ``moving`` the one in training."""
        parts: dict[str, nn.Module] = {"model": self.judged, "weighting": self.weighting}
        return parts if self.averaged is None else parts | {"moving": self.system}

    def _names(self, rows: np.ndarray) -> list[str]:
        return [self.materials.corpus.clips[i].name for i in self.materials.plan.clip_R[rows]]

    def _features(self, rows: np.ndarray) -> Tensor:
        if self.reads_cache and self.materials.feature_RFM is not None:
            return torch.from_numpy(self.materials.feature_RFM[rows]).to(self.device)
        corpus, plan = self.materials.corpus, self.materials.plan
        return mixture_features(corpus, plan, rows, self.system.encoder, self.device)

    def _set_rate(self, step: int, num_steps: int) -> None:
        """Linear warm-up, then half a cosine down to almost 0."""
        warm = max(1, round(self.trial.training.warmup_fraction * num_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / num_steps))
        factor = min(1.0, (step + 1) / warm) * cosine
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def _mean(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Scalars, averaged over the ranks in one exchange."""
        stacked = torch.stack(list(values.values()))
        if self.world > 1:
            dist.all_reduce(stacked)
            stacked = stacked / self.world
        return dict(zip(values, stacked.tolist(), strict=True))

    def _sum(self, array: np.ndarray) -> np.ndarray:
        """An array, added up over the ranks."""
        if self.world == 1:
            return array
        values = torch.from_numpy(array.copy()).to(self.device)
        dist.all_reduce(values)
        return values.cpu().numpy()

    def _require_finite(self, mean: dict[str, float], epoch: int) -> None:
        """Losses of the epoch and weights after it; equal on all ranks, so all stop or none does."""
        advice = "lower learning_rate or the weights of the losses"
        for name, value in mean.items():
            if not math.isfinite(value):
                raise TrialFailed(f"loss {name} is {value} in epoch {epoch}; {advice}")
        if not torch.stack([p.detach().isfinite().all() for p in self.learned]).all():
            raise TrialFailed(f"a weight of the student is no longer finite after epoch {epoch}; {advice}")

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.trial.training.precision == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()
