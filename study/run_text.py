"""How a job reads in the tracking UI: its run's name, parameters, metrics and description. Pure functions.

Whatever a record or a configuration holds, the results here respect MLflow's limits on names and lengths.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import search_spaces
from trainables.errors import UserError

MAX_METRICS = 60
SYSTEM_METRICS = "system/"  # MLflow's pages keep a tab for metrics of this name
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
    return 4 if "loss" in name or name.startswith(SYSTEM_METRICS) else None


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
    # MLflow's pages fold what follows the first lines: what came out is among these.
    parts = [f"{text}.", _outcome(result) if result is not None else "", _choices(job), _circumstances(job)]
    return "\n\n".join(filter(None, parts))


def _choices(job: Job) -> str:
    """What the trial chose, in the words of its search space; empty where there is nothing to choose."""
    system, params = (job.get("trial") or {}).get("system"), job.get("params") or {}
    if system not in search_spaces.SYSTEMS:
        return ""
    with contextlib.suppress(
        UserError, LookupError, TypeError, ValueError
    ):  # what training refuses has no words
        words = str(search_spaces.load(system).explain(params))
        return f"{words[0].upper()}{words[1:]}."
    return ""


def _circumstances(job: Job) -> str:
    fixed = flatten(job.get("trial") or {})
    epochs, steps = fixed.get("training.epochs"), fixed.get("training.steps_per_epoch")
    trained = [f"{epochs} epochs" + (f" of {steps} steps" if steps else "")] if epochs else []
    trained += [f"seed {fixed['seed']}"] if fixed.get("seed") is not None else []
    if fixed.get("system") == "frozen":
        trained = []
    elif job["role"] == "baseline":
        trained = trained[1:]  # it has a length of its own
    where = [
        f"{label} {fixed[key]}"
        for key, label in (("corpus.kind", "corpus"), ("encoder.name", "encoder"))
        if fixed.get(key) is not None
    ]
    if fixed.get("split") is not None:
        where.insert(0, f"the machines of split {fixed['split']}")
    sentences = [
        f"Trained with {', '.join(trained)}" if trained else "",
        f"Scored on {', '.join(where)}" if where else "",
    ]
    return " ".join(f"{sentence}." for sentence in sentences if sentence)


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
        text += f". Official score {values['official']:.1f} of 100"
        bands = [
            f"{band} SNR {values[f'{band}/official']:.1f}"
            for band in ("low", "mid", "high")
            if f"{band}/official" in values
        ]
        text += f" ({', '.join(bands)})" if bands else ""
        if "gap_closed" in values:
            gap = 100 * values["gap_closed"]
            text += (
                f"; {gap:.0f} % of the teacher-to-oracle gap closed at low SNR"
                if gap >= 0
                else f"; at low SNR worse than the frozen teacher, by {-gap:.0f} % of its gap to the oracle"
            )
    return text + "."


def study_note(
    description: str, ended: Iterable[tuple[Job, Mapping[str, Any]]], config: Mapping[str, Any] | None = None
) -> str:
    """Markdown: the study, how many of its jobs ended how, the best trial beside the references, and what the
    confirmation found on machines that no trial has seen."""
    by_state: dict[str, int] = {}
    scores: list[tuple[float, Job]] = []
    confirmed: dict[str, list[float]] = {}
    for job, result in ended:
        if job["role"] != "baseline":
            by_state[str(result.get("state"))] = by_state.get(str(result.get("state")), 0) + 1
        value = metrics(result).get("official")
        if value is None or result.get("state") != "finished":
            continue
        if job["role"] != "confirm":
            scores.append((value, job))
        elif group := re.fullmatch(r"c-(.+)-s\d+", str(job["id"])):
            confirmed.setdefault(group[1], []).append(value)
    lines = [description]  # then what came out, because MLflow's pages fold what follows the first lines
    if confirmed:
        means = sorted(((sum(v) / len(v), who, len(v)) for who, v in confirmed.items()), reverse=True)
        told = ", ".join(f"{who} {mean:.1f}" + (f" ({n} seeds)" if n > 1 else "") for mean, who, n in means)
        lines.append(
            f"**On machines that no trial has seen**, official: {told}. Intervals are in findings.md."
        )
    trials = [(value, job) for value, job in scores if job["role"] == "trial"]
    if trials:
        value, job = max(trials, key=lambda pair: pair[0])
        lines.append(f"Best of the search (an optimistic figure): **{run_name(job)}**, official {value:.1f}.")
    named = sorted((str(job["baseline"]), value) for value, job in scores if job.get("baseline"))
    if named:
        lines.append(f"References: {', '.join(f'{name} {value:.1f}' for name, value in named)}.")
    if by_state:
        lines.append(f"Runs: {', '.join(f'{count} {state}' for state, count in sorted(by_state.items()))}.")
    return "\n\n".join(filter(None, [*lines, _plan(config or {})]))


def _plan(config: Mapping[str, Any]) -> str:
    """What every trial of the study shares, and what comes after the search."""
    fixed = flatten(config)
    epochs, steps = fixed.get("training.epochs"), fixed.get("training.steps_per_epoch")
    if not epochs or not steps or fixed.get("system") == "frozen":
        return ""
    text = f"A trial trains the encoder {fixed.get('encoder.name')} for {epochs} epochs of {steps} steps; "
    text += "it is judged by the official score, in points, on the search machines."
    seeds, recipes = fixed.get("confirm.seeds"), ", ".join(fixed.get("confirm.recipes") or ())
    if seeds:
        text += f" The best and {recipes or 'the references'} are then trained again with {seeds} seeds"
        text += " and scored on machines that no trial has seen."
    return text


def _name(key: str) -> str:
    """MLflow takes letters, digits and ``_ - . / :`` and spaces, and only the shortest form of a path."""
    key = re.sub(r"[^\w/.\- :]", "_", str(key))
    return "/".join(part for part in key.split("/") if part not in ("", ".", ".."))[:MAX_NAME] or "_"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
