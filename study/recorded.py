"""One run as MLflow holds it: what was run, what came out epoch by epoch, and how it ended.

Nothing but MLflow is read, so a run can be looked at where the study's folder is not. A run that cannot be used is
refused in one line that says why; no message holds a password.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study.tracking_uri import absolute, check, redact, scrub, sqlite_path
from trainables.errors import UserError

ENTRY = "trainables.loop:train"  # the only code that a run may name

Curves = dict[int, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What MLflow holds of a run: ``facts`` is its ``job.json``, ``curves`` the metrics by epoch."""

    run_id: str
    facts: Mapping[str, Any]
    state: str
    reason: str
    curves: Curves
    table: list[dict[str, Any]]

    @property
    def job(self) -> Mapping[str, Any]:
        job: Mapping[str, Any] = self.facts["job"]
        return job

    @property
    def epoch(self) -> int:
        """The last epoch that was reported."""
        return max(self.curves, default=0)

    @property
    def on_gpu(self) -> bool:
        trial = self.job["trial"]
        device = trial.get("training", {}).get("device", "auto")
        return device != "cpu" and bool((self.facts.get("slots") or {}).get("gpus_per_worker"))


def read(run_id: str, tracking_uri: str) -> Recorded:
    """Everything that MLflow holds of a run.

    Raises:
        UserError: no answer, no such run, or no trial of this project that has ended.
    """
    check(tracking_uri)
    path, where = sqlite_path(absolute(tracking_uri)), redact(tracking_uri)
    if path is not None and not path.exists():
        raise UserError(
            f"--reproduce {run_id}: there is no {path}; give the study's --storage or --tracking-uri"
        )
    from study.mirror import open_client, prepare_environment

    prepare_environment()
    try:
        client = open_client(absolute(tracking_uri))
        run = _get_run(client, run_id, where)
        tags = run.data.tags
        if tags.get("role") == "study":
            raise UserError(
                f"--reproduce {run_id}: that is the study {tags.get('study', '')}, not one of its trials; give the id "
                "of a run below it"
            )
        if "trial_id" not in tags or "study" not in tags:
            raise UserError(
                f"--reproduce {run_id}: the run {run.info.run_name} is no trial of this project; give the id of one"
            )
        with tempfile.TemporaryDirectory(prefix="reproduce-") as folder:
            files = {file.path for file in client.list_artifacts(run_id)}
            if "job.json" not in files:
                raise UserError(
                    f"--reproduce {run_id}: {tags['trial_id']} has no job.json, which a run gets when it ends; "
                    f"{_why_no_job(tags)}"
                )
            facts = json.loads(Path(client.download_artifacts(run_id, "job.json", folder)).read_text())
            kept = "knn.json" in files
            table = (
                json.loads(Path(client.download_artifacts(run_id, "knn.json", folder)).read_text())
                if kept
                else {}
            )
        curves: Curves = {}
        for name in run.data.metrics:
            if is_number_of_trial(name):
                for point in client.get_metric_history(run_id, name):
                    curves.setdefault(point.step, {})[name] = point.value
    except UserError:
        raise
    except Exception as error:
        text = " ".join(scrub(str(error), tracking_uri).split())[:200]
        raise UserError(f"--reproduce {run_id}: cannot be read from MLflow at {where}: {text}") from error
    if facts.get("job", {}).get("entry", ENTRY) != ENTRY or "trial" not in facts.get("job", {}):
        raise UserError(f"--reproduce {run_id}: its job.json is not one that a study has written")
    state, reason = tags.get("state", ""), tags.get("reason", "")
    return Recorded(
        run_id=run_id,
        facts=facts,
        state=state,
        reason=reason,
        curves=curves,
        table=table.get("rows", []),
    )


def _get_run(client: Any, run_id: str, where: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise UserError(
            f"--reproduce {run_id}: MLflow at {where} has no such run; its id, 32 hexadecimal digits, stands on the "
            "run's page"
        ) from None


def _why_no_job(tags: Mapping[str, str]) -> str:
    if tags.get("state") in ("running", "interrupted"):
        return "it is not over: give the study's command again to finish it"
    return "it was written by an earlier version of this project; run the study again under another name"


def is_number_of_trial(name: str) -> bool:
    """Whether a metric has to come out again: seconds do not."""
    return not name.endswith("_s")
