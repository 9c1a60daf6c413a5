"""The field's own yardstick: the autoencoder baseline of DCASE Task 2, on any corpus and evaluation grid.

    table = autoencoder_table(corpus, plan, seed=0, device=torch.device("cpu"))[0]

As published (Harada et al., arXiv 2303.00455; ``baseline.yaml`` of nttcslab/dcase2023_task2_baseline_ae): log-mel
frames in dB, five in a row, through a dense autoencoder trained on one machine's normal clips; a clip scores by its
mean squared reconstruction error, or by the Mahalanobis distance of the error under the covariance of the domain that
makes it smaller (*selective*). One is trained for every bank of the grid, that is for each machine, kind of noise and
SNR band: a user of the baseline has the normal clips as they are heard where the queries come from, no other noise
and no other SNR, and so have the back ends that it is compared with. A cell that borrows its bank (``mismatched``)
borrows its autoencoder.

What differs, because a bank here holds tens of clips and a grid dozens of banks: a fixed number of steps in place of
epochs; features are centred on the bank and divided by one number, so that no step goes into learning the level (error
and covariance only change their unit); batch normalisation takes its statistics from the whole bank at the end, which
a running mean of momentum 0.01 has not reached by then; and no clip is held out, as no decision would hang on it.
A loss that is not finite ends it as ``TrialFailed``.

Shape legend: N bank clips, Q queries, C clips (either), F frames, M mel bins, V windows of a clip, W frames of a
window, X inputs (W x M), B batch.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainables.cache import Materials, mixture_features
from trainables.data.corpus import Corpus
from trainables.errors import TrialFailed, UserError
from trainables.params import Number
from trainables.scoring.density import MIN_CLIPS
from trainables.scoring.evaluation import AUTOENCODER_SCORES
from trainables.scoring.grid import Detector, Plan, Row, lean, summarise, tabulate
from trainables.settings import TrialConfig

MSE, MAHALANOBIS, MAHALANOBIS_MEAN = AUTOENCODER_SCORES
SMALLEST_POWER = 1e-10  # of unit-level audio, -100 dB
SHRINKAGE = 1e-3  # towards equal variances: few clips leave a covariance that cannot be inverted
DEFAULT_STEPS = 200
STEPS = Number(1, 10_000_000)
SCORED_AT_ONCE = 64  # clips


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The published values, but for ``steps`` and ``batch_size`` (100 epochs of 256 there).

    Windows of ``frame_s`` every ``hop_s`` seconds are 1024 and 512 samples at 16 kHz; ``window_frames`` of them are
    one input. ``depth`` layers of ``width`` lead to and from the ``bottleneck``.
    """

    num_mels: int = 128
    frame_s: float = 0.064
    hop_s: float = 0.032
    window_frames: int = 5
    width: int = 128
    depth: int = 4
    bottleneck: int = 8
    learning_rate: float = 1e-3
    batch_size: int = 64
    steps: int = DEFAULT_STEPS


class MelInDecibel:
    """Log-mel spectrogram in dB, wave_BT -> feature_BFM: power in a Hann window, Slaney's mel scale and norm."""

    def __init__(self, config: AutoencoderConfig, sample_rate_hz: int) -> None:
        from torchaudio.functional import melscale_fbanks

        self.size, self.hop = (round(s * sample_rate_hz) for s in (config.frame_s, config.hop_s))
        self.window = torch.hann_window(self.size)
        self.filters_KM = melscale_fbanks(
            self.size // 2 + 1, 0.0, sample_rate_hz / 2, config.num_mels, sample_rate_hz, "slaney", "slaney"
        )

    def features(self, wave_BT: Tensor) -> Tensor:
        """[B, F, M], without padding: F is ``1 + (T - size) // hop``."""
        frames = wave_BT.unfold(-1, self.size, self.hop) * self.window.to(wave_BT.device)
        spectrum_BFK = torch.view_as_real(torch.fft.rfft(frames))
        power_BFK = spectrum_BFK.square().sum(-1)
        return 10 * (power_BFK @ self.filters_KM.to(wave_BT.device)).clamp_min(SMALLEST_POWER).log10()


class Autoencoder(nn.Module):
    """Dense layers with batch normalisation and ReLU down to the bottleneck and up again; the last layer is linear."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        inputs = config.window_frames * config.num_mels
        hidden = [config.width] * config.depth
        sizes = [inputs, *hidden, config.bottleneck, *hidden]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nn.BatchNorm1d(after, eps=1e-3, momentum=0.01), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], inputs))

    def forward(self, window_BX: Tensor) -> Tensor:
        """The reconstruction, [B, X]."""
        reconstruction_BX: Tensor = self.layers(window_BX)
        return reconstruction_BX


class Yardstick:
    """One machine's detector: ``fit`` a bank, then ``score`` queries. The same seed gives the same numbers."""

    def __init__(self, config: AutoencoderConfig, *, seed: int) -> None:
        self.config, self.seed = config, seed
        self.losses: list[float] = []  # of each step, in units of the bank's variance

    def fit(self, bank_NFM: Tensor, is_target_N: np.ndarray) -> Yardstick:
        """Train on the features (dB) of normal clips.

        Raises:
            UserError: clips shorter than one window.
            TrialFailed: a loss that is not finite.
        """
        config = self.config
        num_frames = bank_NFM.shape[1]
        self.num_windows = num_frames - config.window_frames + 1
        if self.num_windows < 1:
            raise UserError(
                f"the autoencoder hears {config.window_frames} frames at a time, a clip has {num_frames}: "
                f"corpus.clip_s must be at least {config.frame_s + (config.window_frames - 1) * config.hop_s:g}"
            )
        self.mean_M, self.scale = bank_NFM.mean((0, 1)), 1.0
        self.scale = float((bank_NFM - self.mean_M).square().mean().sqrt().clamp_min(1e-6))
        features_NFM = (bank_NFM - self.mean_M) / self.scale
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.model = Autoencoder(config).to(bank_NFM.device)
            self._train(features_NFM)
        self._settle(features_NFM)
        self._learn_covariances(bank_NFM, is_target_N)
        return self

    @torch.no_grad()
    def score(self, queries_QFM: Tensor) -> dict[str, np.ndarray]:
        """Scores (Q) by name; higher is more anomalous.

        ``ae_mse`` is the mean squared error in dB^2. ``ae_mahalanobis`` is the mean over the clip's error frames e of
        ``e' inv(cov) e`` and ``ae_mahalanobis_mean`` the same of the mean error frame, for the domain that makes it
        smaller. The latter is what the baseline's published code computes (its products of all pairs of frames add
        up to that), and so what its published tables hold.
        """
        parts: dict[str, list[np.ndarray]] = {name: [] for name in AUTOENCODER_SCORES}
        for mean_CM, second_CMM in self._moments(queries_QFM):
            within = [np.einsum("cmn,mn->c", second_CMM, inverse) for inverse in self.inverses]
            of_mean = [np.einsum("cm,cm->c", mean_CM @ inverse, mean_CM) for inverse in self.inverses]
            parts[MSE].append(np.einsum("cmm->c", second_CMM) / second_CMM.shape[1])
            parts[MAHALANOBIS].append(np.minimum.reduce(within))
            parts[MAHALANOBIS_MEAN].append(np.minimum.reduce(of_mean))
        return {name: np.concatenate(found) for name, found in parts.items()}

    def _windows(self, feature_NFM: Tensor, index_B: Tensor) -> Tensor:
        """Inputs [B, X]; ``index_B`` counts the windows of all clips."""
        clip_B, start_B = index_B // self.num_windows, index_B % self.num_windows
        frame_BW = start_B[:, None] + torch.arange(self.config.window_frames, device=index_B.device)
        return feature_NFM[clip_B[:, None], frame_BW].flatten(1)

    def _train(self, feature_NFM: Tensor) -> None:
        config, model = self.config, self.model.train()
        # fused: on a CPU the optimizer would otherwise cost as much as the network
        optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
        count = len(feature_NFM) * self.num_windows
        size = max(2, min(config.batch_size, count))  # batch normalisation needs two
        order, losses = torch.empty(0, dtype=torch.long), []
        for _ in range(config.steps):
            while len(order) < size:
                order = torch.cat([order, torch.randperm(count)])
            index_B, order = order[:size].to(feature_NFM.device), order[size:]
            window_BX = self._windows(feature_NFM, index_B)
            loss = (model(window_BX) - window_BX).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        self.losses = torch.stack(losses).tolist()
        if not math.isfinite(sum(self.losses)):
            raise TrialFailed("the autoencoder's loss is not finite; lower its learning_rate")

    @torch.no_grad()
    def _settle(self, feature_NFM: Tensor) -> None:
        """Batch normalisation's statistics from the whole bank, for the weights as they are now."""
        for layer in self.model.modules():
            if isinstance(layer, nn.BatchNorm1d):
                layer.reset_running_stats()
                layer.momentum = None  # a plain mean over the batches that follow
        every = torch.arange(len(feature_NFM) * self.num_windows, device=feature_NFM.device)
        for index_B in every.chunk(math.ceil(len(every) / 4096)):
            self.model(self._windows(feature_NFM, index_B))
        self.model.eval()

    @torch.no_grad()
    def _learn_covariances(self, bank_NFM: Tensor, is_target_N: np.ndarray) -> None:
        """Inverse covariance [M, M] of the error frames of each domain in the bank.

        A domain of fewer than ``MIN_CLIPS`` clips takes the other's, as in ``scoring/mahalanobis.py``.
        """
        moments = list(self._moments(bank_NFM))
        mean_NM, second_NMM = (np.concatenate(part) for part in zip(*moments, strict=True))
        domains = [np.flatnonzero(is_target_N == target) for target in (False, True)]
        used = [rows for rows in domains if len(rows) >= MIN_CLIPS] or [max(domains, key=len)]
        self.inverses = []
        for rows in used:
            mean_M = mean_NM[rows].mean(0)
            covariance = second_NMM[rows].mean(0) - np.outer(mean_M, mean_M)
            equal = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
            self.inverses.append(np.linalg.inv((1 - SHRINKAGE) * covariance + SHRINKAGE * equal))

    def _moments(self, feature_CFM: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Mean [c, M] and mean outer product [c, M, M] of each clip's error frames in dB, some clips at a time."""
        for part_cFM in feature_CFM.split(SCORED_AT_ONCE):
            index = torch.arange(len(part_cFM) * self.num_windows, device=part_cFM.device)
            window_BX = self._windows((part_cFM - self.mean_M) / self.scale, index)
            error_cfM = (self.model(window_BX) - window_BX).reshape(len(part_cFM), -1, self.config.num_mels)
            error_cfM = error_cfM * self.scale
            mean_cM, second_cMM = error_cfM.mean(1), error_cfM.mT @ error_cfM / error_cfM.shape[1]
            yield mean_cM.double().cpu().numpy(), second_cMM.double().cpu().numpy()


def autoencoder_record(trial: TrialConfig, materials: Materials, device: torch.device) -> dict[str, Any]:
    """``metrics`` and ``table`` of the baseline on a trial's grid, trained with the trial's seed.

    ``params["steps"]`` are those on each bank: the default is quick rather than converged.

    Raises:
        UserError: steps that are no such number.
    """
    begun = time.perf_counter()
    config = AutoencoderConfig(steps=int(STEPS.read("steps", trial.params.get("steps", DEFAULT_STEPS))))
    corpus, plan = materials.corpus, materials.plan
    table, losses = autoencoder_table(corpus, plan, seed=trial.seed, device=device, config=config)
    metrics = summarise(table, AUTOENCODER_SCORES[0]) | losses
    metrics |= {f"{name}/official": summarise(table, name)["official"] for name in AUTOENCODER_SCORES}
    metrics |= {"autoencoder_s": time.perf_counter() - begun}
    return {"metrics": metrics, "table": lean(table, AUTOENCODER_SCORES[0])}


def autoencoder_table(
    corpus: Corpus, plan: Plan, *, seed: int, device: torch.device, config: AutoencoderConfig | None = None
) -> tuple[list[Row], dict[str, float]]:
    """Train and score every bank of a grid.

    Returns:
        The rows of ``grid.score_plan``, with the names of ``Yardstick.score`` for back ends; and ``loss_first`` and
        ``loss_last``, the mean reconstruction losses of the first and last tenth of the steps.

    Raises:
        UserError, TrialFailed: as ``Yardstick.fit``.
    """
    config = config or AutoencoderConfig()
    mel = MelInDecibel(config, corpus.sample_rate_hz)
    losses: list[list[float]] = []

    def features(rows: np.ndarray) -> Tensor:
        parts = np.array_split(rows, math.ceil(len(rows) / SCORED_AT_ONCE))
        return torch.cat([mixture_features(corpus, plan, part, mel, device) for part in parts])

    def fit(bank_rows: np.ndarray, is_target_N: np.ndarray) -> Detector:
        yardstick = Yardstick(config, seed=seed + len(losses)).fit(features(bank_rows), is_target_N)
        losses.append(yardstick.losses)
        return lambda query_rows: yardstick.score(features(query_rows))

    table = tabulate(plan, corpus, fit)
    tenth = math.ceil(config.steps / 10)
    steps = np.array(losses)
    return table, {"loss_first": float(steps[:, :tenth].mean()), "loss_last": float(steps[:, -tenth:].mean())}
