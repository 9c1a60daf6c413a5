"""Benchmarks of encoders: features of a batch, and a student's step, beside what a reader of the paper would write.

The comparators are torchaudio's filterbank in a loop over clips, and speechbrain's BEATs with its teacher run along.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lines import Line, line, paired

SECONDS = 10.0  # of a clip, as in the paper


def _waves(count: int) -> Any:
    import torch

    return torch.randn(count, round(SECONDS * 16_000), generator=torch.Generator().manual_seed(0))


def features(runs: int) -> Line:
    """Kaldi's filterbank of a batch, against torchaudio's clip by clip."""
    import torch
    from torchaudio.compliance.kaldi import fbank

    from trainables.encoders.features import KaldiFilterbank

    torch.set_num_threads(1)
    wave_BT, ours = 0.1 * _waves(32), KaldiFilterbank()

    def clip_by_clip() -> Any:
        sizes: dict[str, Any] = {"num_mel_bins": 128, "frame_length": 25, "frame_shift": 10}
        return torch.stack([fbank(w[None] * 2**15, sample_frequency=16_000, **sizes) for w in wave_BT])

    assert torch.allclose(ours(wave_BT), clip_by_clip(), atol=1e-4)
    seconds = paired(lambda: ours(wave_BT), clip_by_clip, runs)
    what = "filterbank of 128 mels, 32 clips of 10 s, no gradient"
    return line("features", what, "torchaudio, clip by clip", seconds, 5.0)


def step(runs: int) -> Line:
    """A student step (features, forward, backward, update) of a small BEATs with targets from the cache, against the
    same on speechbrain's BEATs with the teacher run on machine and noise."""
    import torch
    from speechbrain.lobes.models.beats import BEATs

    from trainables.encoders.beats_checkpoint import BeatsShape, random_checkpoint
    from trainables.encoders.encoder import load_encoder
    from trainables.settings import EncoderConfig

    torch.set_num_threads(1)
    shape = BeatsShape(
        encoder_layers=4,
        embed_dim=128,
        encoder_embed_dim=256,
        encoder_ffn_embed_dim=1024,
        encoder_attention_heads=4,
    )
    machine_BT, noise_BT = _waves(8).chunk(2)
    mixed_BT, whole = (machine_BT + noise_BT) / 2**0.5, torch.ones(4)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.pt"
        content = random_checkpoint(shape)
        content["cfg"] |= {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
        torch.save(content, path)
        student = load_encoder(EncoderConfig(name="beats", checkpoint=str(path)))
        their_student, their_teacher = BEATs(str(path), freeze=False), BEATs(str(path), freeze=True)
    with torch.no_grad():
        kept = [student.pool(student.tokens(student.features(wave))) for wave in (machine_BT, noise_BT)]
    ours_optimizer, their_optimizer = (
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for model in (student, their_student)
    )

    def ours() -> None:
        emb_BE = student.pool(student.tokens(student.features(mixed_BT)))
        (emb_BE - (kept[0] + kept[1]) / 2).square().mean().backward()
        ours_optimizer.step()
        ours_optimizer.zero_grad()

    def embedded(model: Any, wave_BT: Any) -> Any:
        tokens_BLD = model.extract_features(0.1 * wave_BT, whole)[0]
        return tokens_BLD.unflatten(1, (-1, 8)).mean(1).flatten(1)

    def theirs() -> None:
        with torch.no_grad():
            target = (embedded(their_teacher, machine_BT) + embedded(their_teacher, noise_BT)) / 2
        (embedded(their_student, mixed_BT) - target).square().mean().backward()
        their_optimizer.step()
        their_optimizer.zero_grad()

    seconds = paired(ours, theirs, runs)
    what = "student step, BEATs of 4 x 256, 4 clips of 10 s"
    return line(
        "step", what, "speechbrain, teacher online", seconds, 1.5
    )  # the teacher alone is two thirds of one
