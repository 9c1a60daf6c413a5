"""A new system is one file in ``trainables`` and one in ``search_spaces``: a toy one made so passes the suite."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAINED = '''"""``naming``: the student names the machine in the mixture, and nothing else."""

import torch
from torch import nn
from torch.nn import functional

from trainables.draws import balanced, batches, cycle
from trainables.snr_curricula import snr_curriculum
from trainables.data.mixing import mix
from trainables.system import System


class Naming(System):
    losses = ("name",)

    def __init__(self, encoder, materials, trial):
        super().__init__()
        self.encoder, self.materials = encoder, materials
        self.curriculum = snr_curriculum(trial.params, trial.scoring.bands_db)
        self.machines = sorted({materials.corpus.clips[i].name for i in materials.train_machine})
        self.head = nn.Linear(encoder.embedding_size, len(self.machines))

    def draws(self, rng, *, count, batch_size, progress):
        clips, train = self.materials.corpus.clips, self.materials.train_machine
        clip = balanced(rng, [[i for i in train if clips[i].name == m] for m in self.machines], count * batch_size)
        noise = cycle(rng, self.materials.train_noise, len(clip))
        snr = self.curriculum.draw(rng, len(clip), progress).astype("float32")
        return batches(clip, noise, snr, None, rng.integers(2**31, size=count))

    def forward(self, draw, rank, world):
        mine, device = draw.shard(rank, world), self.head.weight.device
        machine, noise = (self.materials.wave(i, device) for i in (mine.clip_B, mine.noise_B))
        mixture = mix(machine, noise, torch.from_numpy(mine.snr_db_B).to(device))
        names = [self.machines.index(self.materials.corpus.clips[i].name) for i in mine.clip_B]
        logits = self.head(self.embed(self.encoder.features(mixture)))
        return {"name": functional.cross_entropy(logits, torch.tensor(names, device=device), reduction="none")}

    def embed(self, feature, names=()):
        return self.encoder.pool(self.encoder.tokens(feature))
'''
SEARCHED = '''"""What is searched for ``naming``: the SNR curriculum and the learning rate."""

from search_spaces.axes import CURRICULA, CURRICULUM_AXES, Range, point

PAPER = "paper"
BRANCHES = {"curriculum_kind": CURRICULA}
AXES = {**CURRICULUM_AXES, "learning_rate": Range(1e-3, 8e-3, "peak learning rate of AdamW", log=True)}
CHOICES = {name: axis.words for name, axis in AXES.items()}
FIXED = {"weighting_kind": "fixed", "w_name": 1.0}
RECIPES = {PAPER: {"curriculum_kind": "fixed", "snr_db": 0.0, "learning_rate": 2e-3, **FIXED}}


def space(trial):
    return point(trial, AXES, BRANCHES, ("learning_rate",)) | FIXED


def describe(params):
    return params["curriculum_kind"]


def explain(params):
    return f"SNRs {params['curriculum_kind']}, learning rate {params['learning_rate']:.2g}"
'''


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with the two files added."""
    root = tmp_path_factory.mktemp("project")
    for name in ("study", "search_spaces", "trainables", "tests/trainables"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "trainables" / "naming.py").write_text(TRAINED)
    (root / "search_spaces" / "naming.py").write_text(SEARCHED)
    return root


def run(copy: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.mark.slow
def test_passes_the_suite_of_all_systems(copy: Path) -> None:
    done = run(
        copy,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "naming",
        "tests/trainables/test_systems.py",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed >= 11, done.stdout


def test_is_searched_alone_and_beside_the_others(copy: Path) -> None:
    for system, expected in (
        ("naming", "paper (tried first)"),
        ("[naming,retain]", "naming-paper (tried first)"),
    ):
        done = run(
            copy, "study/run.py", "--set", f"system={system}", "--storage", str(copy / "runs"), "--dry-run"
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
        assert "curriculum_kind=self_paced" in done.stdout
