"""What every test runs under: one thread, no display, no network of our making, and real recordings if they exist."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports numpy, torch, matplotlib, MLflow or Ray.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
for name in (
    "RAY_ADDRESS",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "STUDY_STORAGE",
    "STUDY_OPTUNA_URL",
    "MLFLOW_TRACKING_URI",
):
    os.environ.pop(name, None)  # a test must not find the developer's cluster or studies

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

settings.register_profile("study", deadline=None, derandomize=True, database=None)
settings.load_profile("study")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def real_recordings() -> Path:
    """The folder of real recordings beside the checkout. Their licences keep them out of the repository."""
    folder = ROOT.parent / "shared" / "data" / "real"
    if not (folder / "manifest.csv").exists():
        pytest.skip("no real recordings: ../shared/data/real is missing")
    return folder
