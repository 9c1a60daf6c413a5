"""Pre-train ``tiny`` on audio of the project's own making, without labels.

    python -m trainables.encoders.pretrain                    # the weights that ship (two cores: about ten minutes)
    python -m trainables.encoders.pretrain --steps 50 --out /tmp/tiny.safetensors

A masked auto-encoder (He et al. 2022, on spectrograms as in Huang et al. 2022): three patches in five are hidden,
the encoder sees the rest, a small decoder predicts the hidden ones, each normalised by its own mean and deviation.
Beside it, a contrast between recordings (as COLA, Saeed et al. 2021): the visible parts of two clips of one recording
should be nearer to each other than to the batch, which makes the encoder forget what chance alone decides.
It hears nameless machines and places drawn from the factory's families, clean and one at a time: never a named
machine type, never a mixture. Weights and sidecar appear when training is over; one that is broken off leaves nothing.

Shape legend: B batch (first half and second half are clips of the same recordings), F frames, M mel bins, T samples.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from trainables.data import designs
from trainables.data.corpus import normalise
from trainables.data.physics import render
from trainables.encoders.tiny import WEIGHTS, Block, LogMel, Tiny, TinyShape, save_tiny
from trainables.errors import UserError

HIDDEN_SHARE = 0.6
CONTRAST_WEIGHT = 0.3
TEMPERATURE = 0.1
CLIPS_PER_RECORDING = 4
FAMILIES = tuple(designs.FAMILIES)


class Decoder(nn.Module):
    """Predicts hidden patches from the encoded visible ones; ``project`` makes the views that are contrasted."""

    def __init__(self, encoder: Tiny, depth: int = 2) -> None:
        super().__init__()
        width = encoder.width
        self.hidden = nn.Parameter(torch.randn(width) * 0.02)
        self.enter = nn.Linear(width, width)
        self.blocks = nn.Sequential(*[Block(width, 4) for _ in range(depth)], nn.LayerNorm(width))
        self.leave = nn.Linear(width, encoder.embed.in_features)
        self.project = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


def losses(
    encoder: Tiny, decoder: Decoder, feature_BFM: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Masked prediction and contrast of a batch, two scalars.

    Masked prediction: mean squared error on hidden patches, each normalised by its own mean and standard deviation
    (He et al. 2022). Contrast: InfoNCE of the mean visible token, symmetric.
    """
    patch = encoder.patches(feature_BFM)
    batch, num_time, num_bands, _ = patch.shape
    length = num_time * num_bands
    num_seen = length - round(HIDDEN_SHARE * length)
    order = torch.rand(batch, length, generator=rng).argsort(1)
    seen, back = order[:, :num_seen], order.argsort(1)
    x = encoder.embed_patches(patch).flatten(1, 2)
    x = x.gather(1, seen[..., None].expand(-1, -1, encoder.width))
    for block in encoder.blocks:
        x = block(x)
    view = nn.functional.normalize(decoder.project(x.mean(1)), dim=-1)
    likeness = view[: batch // 2] @ view[batch // 2 :].T / TEMPERATURE
    same = torch.arange(len(likeness))
    cross = nn.functional.cross_entropy
    contrast = 0.5 * (cross(likeness, same) + cross(likeness.T, same))
    position = encoder.embed_patches(torch.zeros_like(patch)).flatten(1, 2) - encoder.embed.bias
    full = torch.cat([decoder.enter(x), decoder.hidden.expand(batch, length - num_seen, -1)], 1)
    full = full.gather(1, back[..., None].expand(-1, -1, encoder.width)) + position
    guess = decoder.leave(decoder.blocks(full))
    truth = patch.flatten(1, 2)
    truth = (truth - truth.mean(-1, keepdim=True)) / (truth.std(-1, keepdim=True) + 0.1)
    hidden = torch.ones(batch, length).scatter(1, seen, 0.0)
    return ((guess - truth).square().mean(-1) * hidden).sum() / hidden.sum(), contrast


def nameless_clips(num_machines: int, num_places: int, clips_each: int, seed: int) -> np.ndarray:
    """Clean clips [N, T] of machines and places that no corpus names, unit RMS, float16 to save memory.

    Every ``CLIPS_PER_RECORDING`` in a row are one recording: one machine at one operating point, or one place.

    Raises:
        UserError: clips of each that are no multiple of ``CLIPS_PER_RECORDING``.
    """
    if clips_each < 1 or clips_each % CLIPS_PER_RECORDING:
        raise UserError(
            f"--each = {clips_each}: expected a multiple of {CLIPS_PER_RECORDING}, the clips of a recording"
        )
    rate_hz, num_samples, waves = 16_000, 32_000, []
    for m in range(num_machines):
        rng = designs.name_rng("pretrain", seed, "machine", m)
        family = FAMILIES[m % len(FAMILIES)]
        machine = designs.design(family, f"nameless-{seed}-{m}")
        for c in range(clips_each):
            if c % CLIPS_PER_RECORDING == 0:
                speed, load = rng.uniform(0.75, 1.3), rng.uniform(0.6, 1.2)
            wave = render(machine, rng, speed=speed, load=load, num_samples=num_samples, rate_hz=rate_hz)
            waves.append(normalise(wave, family, num_samples).astype(np.float16))
    for p in range(num_places):
        rng = designs.name_rng("pretrain", seed, "place", p)
        place = designs.place(f"nameless-{seed}-{p}")
        for _ in range(clips_each):
            wave = designs.noise(place, rng, busy=p % 2 == 1, num_samples=num_samples, rate_hz=rate_hz)
            waves.append(normalise(wave, "place", num_samples).astype(np.float16))
    return np.stack(waves)


def pretrain(
    *, steps: int, batch_size: int, learning_rate: float, seed: int, machines: int, places: int, each: int
) -> tuple[Tiny, dict[str, object]]:
    """Train from scratch on ``machines`` + ``places`` with ``each`` clips; prints progress.

    Returns:
        The encoder, and the record for its sidecar: command, settings, losses, duration.

    Raises:
        UserError: as ``nameless_clips``.
    """
    start, rng = time.time(), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    waves = nameless_clips(machines, places, each, seed)
    shape, raw = TinyShape(), LogMel(TinyShape())
    features = torch.cat(
        [raw(torch.from_numpy(waves[i : i + 256]).float()) for i in range(0, len(waves), 256)]
    )
    shape = replace(shape, feature_mean=float(features.mean()), feature_std=float(features.std()))
    features = (features - shape.feature_mean) / shape.feature_std
    print(f"{len(waves)} clips made in {time.time() - start:.0f} s", flush=True)
    encoder = Tiny(shape)
    decoder = Decoder(encoder)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    history: list[tuple[float, float]] = []
    for step in range(1, steps + 1):
        recording = torch.randperm(len(features) // CLIPS_PER_RECORDING, generator=rng)[: batch_size // 2]
        first = torch.randint(CLIPS_PER_RECORDING, recording.shape, generator=rng)
        second = (
            first + torch.randint(1, CLIPS_PER_RECORDING, first.shape, generator=rng)
        ) % CLIPS_PER_RECORDING
        both = torch.cat([recording * CLIPS_PER_RECORDING + first, recording * CLIPS_PER_RECORDING + second])
        masked, contrast = losses(encoder, decoder, features[both], rng)
        optimizer.zero_grad()
        (masked + CONTRAST_WEIGHT * contrast).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        history.append((masked.item(), contrast.item()))
        if step % 100 == 0 or step == steps:
            recent = np.mean(history[-100:], axis=0)
            losses_now = f"masked {recent[0]:.4f}  contrast {recent[1]:.4f}"
            print(f"step {step}/{steps}  {losses_now}  {time.time() - start:.0f} s", flush=True)
    record: dict[str, object] = {
        "command": "python -m trainables.encoders.pretrain " + " ".join(sys.argv[1:]),
        "seed": seed,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "clips": len(waves),
        "duration_s": round(time.time() - start),
        "loss_first_100_steps": _means(history[:100]),
        "loss_last_100_steps": _means(history[-100:]),
        "torch": torch.__version__,
    }
    return encoder, record


def _means(history: list[tuple[float, float]]) -> dict[str, float]:
    masked, contrast = np.mean(history, axis=0)
    return {"masked": round(float(masked), 4), "contrast": round(float(contrast), 4)}


def main() -> None:
    """The command line; the defaults make the weights that ship."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--machines", type=int, default=210, help="nameless machines to hear")
    parser.add_argument("--places", type=int, default=90, help="nameless noise environments to hear")
    parser.add_argument("--each", type=int, default=12, help="clips of each")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = vars(parser.parse_args())
    out = args.pop("out")
    try:
        encoder, record = pretrain(**args)
    except UserError as error:
        parser.error(str(error))
    save_tiny(encoder, out, record)
    print(f"{out}  {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
