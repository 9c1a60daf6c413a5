"""How a job reads in the tracking UI: its run's name, parameters, metrics and description. Pure functions.

Whatever a record or a configuration holds, the results here respect MLflow's limits on names and lengths.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

MAX_METRICS = 60
MAX_NAME = 250
MAX_PARAM = 6000
MAX_TAG = 5000  # of MLflow servers before 2.20; later ones take 8000

Job = Mapping[str, Any]


def run_name(job: Job) -> str:
    """In words: ``t0003 snr_sigmoid / self_paced / dwa``, ``t0000 paper: constant / fixed / fixed``."""
    words = " / ".join(part.strip() for part in str(job.get("label") or "").split(",") if part.strip())
    baseline = job.get("baseline")
    if baseline and baseline not in words:
        words = f"{baseline}: {words}" if words else str(baseline)
    return f"{job['id']} {words}".strip()


def params(job: Job) -> dict[str, str]:
    """Sampled values under their search-space names, what was fixed under dotted names; no empty ones."""
    trial = dict(job.get("trial") or {})
    sampled = {**(trial.pop("params", None) or {}), **(job.get("params") or {})}
    flat = {**flatten(trial), **flatten(sampled)}
    return {_name(key): _cut(_text(value), MAX_PARAM) for key, value in flat.items() if value is not None}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"training": {"epochs": 6}}`` becomes ``{"training.epochs": 6}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The headline metrics of a record, at most ``MAX_METRICS``: each ``official``, losses, plain numbers
    such as ``gap_closed`` or ``epoch_s``. Details (machine by machine, AUCs) stay in the table."""
    values = finite(record.get("metrics") or {})
    ranks = {key: rank for key in values if (rank := _rank(key)) is not None}
    return {key: values[key] for key in sorted(ranks, key=lambda k: (ranks[k], k))[:MAX_METRICS]}


def finite(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among ``values``, under names that MLflow takes."""
    return {
        _name(key): float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _rank(name: str) -> int | None:
    parts = name.split("/")
    if parts[-1] == "official" and len(parts) <= 3:
        return len(parts)
    if "/" not in name:
        return 2
    return 4 if "loss" in name else None


def tags(values: Mapping[str, Any]) -> dict[str, str]:
    """Tags as MLflow takes them; empty ones left out."""
    return {
        _name(key): _cut(_text(value), MAX_TAG) for key, value in values.items() if value not in (None, "")
    }


def job_note(job: Job, study_name: str, result: Mapping[str, Any] | None = None) -> str:
    """Markdown: what was run and, once there is a ``result``, what came out."""
    role = {"trial": "Search trial", "confirm": "Confirmation", "baseline": "Baseline"}.get(
        job["role"], "Run"
    )
    text = f"{role} **{job['id']}** of study {study_name}"
    if job.get("baseline"):
        text += f", published recipe or reference *{job['baseline']}*"
    if job.get("label"):
        text += f": {job['label']}"
    fixed = flatten(job.get("trial") or {})
    facts = [
        f"{label} {fixed[key]}"
        for key, label in (
            ("corpus.kind", "corpus"),
            ("encoder.name", "encoder"),
            ("training.epochs", "epochs"),
            ("seed", "seed"),
            ("split", "scored on machines of split"),
        )
        if fixed.get(key) is not None and not (key == "training.epochs" and job["role"] == "baseline")
    ]
    text += f".\n\n{', '.join(facts).capitalize()}." if facts else "."
    return text + (f"\n\n{_outcome(result)}" if result is not None else "")


def _outcome(result: Mapping[str, Any]) -> str:
    state = result.get("state")
    epoch = result.get("epoch")
    after = f" after epoch {epoch}" if epoch else ""
    words = {"finished": "Finished", "stopped": "Stopped early", "failed": "Failed"}.get(
        str(state), str(state)
    )
    text = f"**{words}**{after}"
    if result.get("duration_s") is not None:
        text += f" in {result['duration_s']:.0f} s"
    if result.get("reason"):
        text += f": {result['reason']}"
    values = metrics(result)
    if "official" in values:
        bands = [
            f"{band} SNR {values[f'{band}/official']:.1f}"
            for band in ("low", "mid", "high")
            if f"{band}/official" in values
        ]
        text += f". Official score {values['official']:.1f} of 100" + (
            f" ({', '.join(bands)})" if bands else ""
        )
        if "gap_closed" in values:
            text += f"; {100 * values['gap_closed']:.0f} % of the teacher-to-oracle gap closed at low SNR"
    return text + "."


def study_note(description: str, ended: Iterable[tuple[Job, Mapping[str, Any]]]) -> str:
    """Markdown: the study, how many of its jobs ended how, the best search trial beside the references."""
    by_state: dict[str, int] = {}
    scores: list[tuple[float, Job]] = []
    for job, result in ended:
        if job["role"] != "baseline":
            by_state[str(result.get("state"))] = by_state.get(str(result.get("state")), 0) + 1
        value = metrics(result).get("official")
        if value is not None and job["role"] != "confirm" and result.get("state") == "finished":
            scores.append((value, job))
    if not by_state and not scores:
        return description
    lines = [
        f"Runs: {', '.join(f'{count} {state}' for state, count in sorted(by_state.items()))}."
        if by_state
        else ""
    ]
    trials = [(value, job) for value, job in scores if job["role"] == "trial"]
    if trials:
        value, job = max(trials, key=lambda pair: pair[0])
        lines.append(f"Best of the search (an optimistic figure): **{run_name(job)}**, official {value:.1f}.")
    named = sorted((str(job["baseline"]), value) for value, job in scores if job.get("baseline"))
    if named:
        lines.append(f"References: {', '.join(f'{name} {value:.1f}' for name, value in named)}.")
    return "\n\n".join(filter(None, [description, *lines]))


def _name(key: str) -> str:
    """MLflow takes letters, digits and ``_ - . / :`` and spaces, and only the shortest form of a path."""
    key = re.sub(r"[^\w/.\- :]", "_", str(key))
    return "/".join(part for part in key.split("/") if part not in ("", ".", ".."))[:MAX_NAME] or "_"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
