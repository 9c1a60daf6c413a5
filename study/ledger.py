"""What the tracking events of a study have said so far, and what its folder knows beyond that.

The ledger is rebuilt from the delivered events at every opening. It makes delivery idempotent where time
stamps cannot: an epoch or an end told again, by a resumed job or from the folder, is recognised and dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from study import run_text
from study.folder import StudyFolder
from study.spool import Event


@dataclass
class Ledger:
    """By job: how it was described, its epochs, how it ended, and whether its files were sent."""

    study: dict[str, Any] = field(default_factory=dict)
    description: str = ""
    started: dict[str, dict[str, Any]] = field(default_factory=dict)
    epochs: dict[str, set[int]] = field(default_factory=dict)
    ended: dict[str, dict[str, Any]] = field(default_factory=dict)
    tables: set[str] = field(default_factory=set)

    def note(self, event: Event) -> None:
        kind = event["kind"]
        if kind == "start":
            self.study, self.description = event["study"], event["description"]
        elif kind == "job_started":
            self.started[event["job"]["id"]] = event["job"]
        elif kind == "job_reported":
            self.epochs.setdefault(event["id"], set()).add(event["record"]["epoch"])
        elif kind == "job_ended":
            self.ended[event["id"]] = event["result"]
        elif kind == "table":
            self.tables.add(event["id"])
        elif kind == "told":
            self.study, self.description = event["study"], event["description"]
            self.started.update({job_id: {} for job_id in event["started"]})  # the rest is in the folder
            self.epochs.update({job_id: set(epochs) for job_id, epochs in event["epochs"].items()})
            self.ended.update(event["ended"])
            self.tables.update(event["tables"])

    def summary(self) -> Event:
        """One event in the place of all that were noted. Whoever has them all learns from it what it has; to others
        it says nothing, and they find the same in the folder."""
        ended = {
            job_id: {
                **slim(result),
                "metrics": {k: v for k, v in result["metrics"].items() if k == "official"},
            }
            for job_id, result in self.ended.items()
        }
        return {
            "kind": "told",
            "study": self.study,
            "description": self.description,
            "started": sorted(self.started),
            "epochs": {job_id: sorted(epochs) for job_id, epochs in self.epochs.items()},
            "ended": ended,
            "tables": sorted(self.tables),
        }

    def has(self, event: Event) -> bool:
        """Does ``event`` say nothing new? A job that ended stays ended."""
        if event.get("again"):
            return False  # it was refused before, and noted all the same
        if event["kind"] == "told":
            return True
        kind, job_id = event["kind"], str(event["job"]["id"] if "job" in event else event.get("id"))
        if kind == "job_reported":
            return event["record"]["epoch"] in self.epochs.get(job_id, ())
        if kind in ("job_started", "job_ended") and job_id in self.ended:
            return True
        told = {"job_started": self.started, "table": self.tables}.get(kind, ())
        return bool(event.get("missed")) and job_id in told

    def missing(self, folder: StudyFolder) -> Iterator[Event]:
        """Events that never reached the spool, from the study's folder: the driver died between the two.

        They are marked ``missed``: by the time they are delivered, the study may have told the same itself. They bear
        the times at which things happened, as far as the folder knows them.
        """
        for job_id in folder.job_ids():
            job, result, records = folder.job(job_id), folder.result(job_id), folder.records(job_id)
            if job is None:
                continue
            events: list[Event] = []
            began, ended = _times(result)
            if result is not None or job_id in self.started:
                events.append({"kind": "job_started", "job": public(job), **began})
                events += [
                    {"kind": "job_reported", "id": job_id, "record": slim(r), **ended} for r in records
                ]
                if result is not None:
                    events.append({"kind": "job_ended", "id": job_id, "result": slim(result), **ended})
            if result is not None:
                events.append({"kind": "table", "id": job_id})
            yield from (m for m in ({"missed": True, **event} for event in events) if not self.has(m))


def _times(result: Mapping[str, Any] | None) -> tuple[dict[str, int], dict[str, int]]:
    """When a job began and ended, in ms, each as an event's ``time``; nothing where the result does not say."""
    try:
        began = datetime.fromisoformat((result or {})["started"]).timestamp()
        return {"time": int(1000 * began)}, {"time": int(1000 * (began + (result or {})["duration_s"]))}
    except (KeyError, TypeError, ValueError):
        return {}, {}


def slim(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record or result as the spool keeps it: headline metrics only, no table."""
    kept = {key: record[key] for key in ("epoch", "state", "reason", "duration_s") if key in record}
    return {**kept, "metrics": run_text.metrics(record)}


def recipe(job: Mapping[str, Any], study: Mapping[str, Any], num_workers: int | None) -> dict[str, Any]:
    """The content of a run's ``job.json``: all that running the job again takes, and what its numbers hang on."""
    slots = (study.get("config") or {}).get("slots")
    facts = {key: study.get(key) for key in ("corpus", "files", "grid", "versions", "hardware")}
    return {
        "study": study.get("name"),
        "job": public(job),
        **facts,
        "slots": slots,
        "num_workers": num_workers,
    }


def public(job: Mapping[str, Any]) -> dict[str, Any]:
    """What tracking needs of a job: paths on this machine are left out."""
    return {key: job[key] for key in ("id", "role", "trial", "label", "baseline", "params") if key in job}
