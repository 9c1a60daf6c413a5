"""Pre-train ``tiny`` on audio of the project's own making, without labels.

    python -m trainables.encoders.pretrain                    # the weights that ship (two cores: about ten minutes)
    python -m trainables.encoders.pretrain --steps 50 --out /tmp/tiny.safetensors

A masked auto-encoder (He et al. 2022, on spectrograms as in Huang et al. 2022): three patches in five are hidden,
the encoder sees the rest, a small decoder predicts the hidden ones, each normalised by its own mean and deviation.
It hears nameless machines and places drawn from the factory's families, clean and one at a time: never a named
machine type, never a mixture.
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

HIDDEN_SHARE = 0.6
FAMILIES = ("rotor", "gear", "bearing", "stroke", "click", "friction", "electric")


class Decoder(nn.Module):
    """Predicts hidden patches from the encoded visible ones."""

    def __init__(self, encoder: Tiny, depth: int = 2) -> None:
        super().__init__()
        width = encoder.width
        self.hidden = nn.Parameter(torch.randn(width) * 0.02)
        self.enter = nn.Linear(width, width)
        self.blocks = nn.Sequential(*[Block(width, 4) for _ in range(depth)], nn.LayerNorm(width))
        self.leave = nn.Linear(width, encoder.embed.in_features)


def masked_loss(encoder: Tiny, decoder: Decoder, feature_BFM: Tensor, rng: torch.Generator) -> Tensor:
    """Mean squared error on hidden patches, each normalised by its own mean and standard deviation."""
    patch = encoder.patches(feature_BFM)
    batch, num_time, num_bands, size = patch.shape
    length = num_time * num_bands
    num_seen = length - round(HIDDEN_SHARE * length)
    order = torch.rand(batch, length, generator=rng).argsort(1)
    seen, back = order[:, :num_seen], order.argsort(1)
    x = encoder.embed_patches(patch).flatten(1, 2)
    x = x.gather(1, seen[..., None].expand(-1, -1, encoder.width))
    for block in encoder.blocks:
        x = block(x)
    position = encoder.embed_patches(torch.zeros_like(patch)).flatten(1, 2) - encoder.embed.bias
    full = torch.cat([decoder.enter(x), decoder.hidden.expand(batch, length - num_seen, -1)], 1)
    full = full.gather(1, back[..., None].expand(-1, -1, encoder.width)) + position
    guess = decoder.leave(decoder.blocks(full))
    truth = patch.flatten(1, 2)
    truth = (truth - truth.mean(-1, keepdim=True)) / (truth.std(-1, keepdim=True) + 0.1)
    hidden = torch.ones(batch, length).scatter(1, seen, 0.0)
    return ((guess - truth).square().mean(-1) * hidden).sum() / hidden.sum()


def nameless_clips(num_machines: int, num_places: int, clips_each: int, seed: int) -> np.ndarray:
    """Clean clips [N, T] of machines and places that no corpus names, unit RMS, float16 to save memory."""
    rate_hz, num_samples, waves = 16_000, 32_000, []
    for m in range(num_machines):
        rng = designs.name_rng("pretrain", seed, "machine", m)
        family = FAMILIES[m % len(FAMILIES)]
        machine = designs.design(family, f"nameless-{seed}-{m}")
        for _ in range(clips_each):
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


def pretrain(*, steps: int, batch_size: int, learning_rate: float, seed: int, machines: int, places: int, each: int):
    """Train from scratch; returns the encoder and the record for its sidecar. Prints progress."""
    start, rng = time.time(), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    waves = nameless_clips(machines, places, each, seed)
    shape, raw = TinyShape(), LogMel(TinyShape())
    features = torch.cat([raw(torch.from_numpy(waves[i : i + 256]).float()) for i in range(0, len(waves), 256)])
    shape = replace(shape, feature_mean=float(features.mean()), feature_std=float(features.std()))
    features = (features - shape.feature_mean) / shape.feature_std
    print(f"{len(waves)} clips made in {time.time() - start:.0f} s", flush=True)
    encoder = Tiny(shape)
    decoder = Decoder(encoder)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    losses: list[float] = []
    for step in range(1, steps + 1):
        batch = features[torch.randint(len(features), (batch_size,), generator=rng)]
        loss = masked_loss(encoder, decoder, batch, rng)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {np.mean(losses[-100:]):.4f}  {time.time() - start:.0f} s", flush=True)
    record: dict[str, object] = {
        "command": "python -m trainables.encoders.pretrain " + " ".join(sys.argv[1:]),
        "seed": seed,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "clips": len(waves),
        "duration_s": round(time.time() - start),
        "loss_first_100": round(float(np.mean(losses[:100])), 4),
        "loss_last_100": round(float(np.mean(losses[-100:])), 4),
        "torch": torch.__version__,
    }
    return encoder, record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--machines", type=int, default=350, help="nameless machines to hear")
    parser.add_argument("--places", type=int, default=150, help="nameless noise environments to hear")
    parser.add_argument("--each", type=int, default=16, help="clips of each")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = vars(parser.parse_args())
    out = args.pop("out")
    encoder, record = pretrain(**args)
    save_tiny(encoder, out, record)
    print(f"{out}  {out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
