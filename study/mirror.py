"""What a study's events do to MLflow: one experiment, one parent run, one child run per job.

Every event may be delivered again, after a crash or to another server, and changes nothing the second time: a
run is found by its tags ``study_id`` and ``trial_id`` before it is created; parameters already there are left
alone; a metric carries the time of its event, and MLflow keeps one value per name, step and time. Repetitions
under another time are dropped by the ledger. Nothing here is called from the path that trains; whatever fails
raises, and the caller decides (``is_final``).
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from study import dataset, run_text, views
from study.folder import StudyFolder
from study.ledger import Ledger, recipe
from study.spool import Event
from study.tracking_uri import absolute, sqlite_path
from trainables.files import exclusive, write_atomically
from trainables.settings import digest

# One attempt per request: the tracker retries by itself, after looking whether the request took effect. The
# timeout is long because a slow answer holds up nobody, while a run created after we gave up is a duplicate.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "40",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
PARENT = "(study)"
FINAL_CODES = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST")


class Lost(Exception):
    """The store no longer has what was delivered to it."""


class Refused(Exception):
    """This event will never be taken as it stands."""


class Mirror:
    """Delivers events to the MLflow at ``tracking_uri``, from one thread; imports MLflow at the first one."""

    def __init__(
        self, tracking_uri: str, study_name: str, folder: StudyFolder, artifact_location: str | None
    ) -> None:
        self._uri = absolute(tracking_uri)
        self._remote = tracking_uri.startswith(("http://", "https://"))
        self._name = study_name
        self._folder = folder
        self._artifact_location = artifact_location
        if artifact_location is None and not self._remote:
            self._artifact_location = str((folder.path.parent / "mlartifacts" / study_name).absolute())
        self._client: Any = None
        self._experiment: str | None = None
        self._runs: dict[str, Any] | None = None
        self.ledger = Ledger()

    def connect(self, delivered: Iterable[Event]) -> None:
        """Open the store, learn from the events ``delivered`` what it has, and check that it still has it.

        Raises:
            Lost: it does not.
        """
        if self._client is None:
            self._client = open_client(self._uri)
        self.forget()
        self.ledger = Ledger()
        for event in delivered:
            self.ledger.note(event)
        if self.ledger.study:
            experiment = self._client.get_experiment_by_name(self._name)
            if experiment is None or PARENT not in self._index(experiment.experiment_id):
                raise Lost

    def forget(self) -> None:
        """Look again at what the store has, before the next event."""
        self._experiment, self._runs = None, None

    def deliver(self, event: Event) -> None:
        """Bring the store to where it is after ``event``.

        Raises:
            Refused, Lost: see there. Anything else: ``is_final`` says whether it may pass.
        """
        if self.ledger.has(event):
            return
        if event["kind"] != "start" and not self.ledger.study:
            raise Refused("it came before the start of the study")
        getattr(self, f"_{event['kind']}")(event)
        self.ledger.note(event)

    def is_lost(self, error: Exception) -> bool:
        """Does ``error`` say that a run which was there is gone?"""
        return isinstance(error, Lost) or self._code(error) == "RESOURCE_DOES_NOT_EXIST"

    def is_final(self, error: Exception) -> bool:
        """Would the same event fail in the same way for ever?"""
        if getattr(error, "error_code", None) is not None:
            return self._code(error) in FINAL_CODES
        # A login page instead of an answer is a JSONDecodeError, a ValueError that may pass.
        passing = isinstance(error, json.JSONDecodeError | ImportError | OSError)
        return isinstance(error, Refused | KeyError | TypeError | ValueError | AttributeError) and not passing

    def _code(self, error: Exception) -> str:
        """MLflow's own error code; not what its client makes of a proxy's error page (404 and the like)."""
        answered = not self._remote or hasattr(error, "json")
        return str(getattr(error, "error_code", "")) if answered else ""

    def answers(self) -> bool:
        """Is the store there, whatever may be wrong with the place for its artifacts?"""
        with contextlib.suppress(Exception):
            self._client.get_experiment_by_name(self._name)
            return True
        return False

    # One method per kind of event.

    def _start(self, event: Event) -> None:
        self.ledger.note(event)  # the study's identity, needed below
        self.forget()
        study = self.ledger.study
        config, versions = study.get("config") or {}, study.get("versions") or {}
        # MLflow's own tags: its kind of pages, what its charts show first, its views, and the text on top.
        for key, value in {
            "mlflow.experimentKind": "custom_model_development",
            "mlflow.experiment.primaryMetric.name": "official",
            "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
            "mlflow.note.content": self._with_links()[: run_text.MAX_TAG],
            **views.saved_views(str(config.get("system")), event["time"]),
        }.items():
            self._client.set_experiment_tag(self._experiment_id(), key, value)
        tags = {
            **{f"version.{name}": version for name, version in versions.items()},
            **{key: study.get(key) for key in ("identity", "command", "created")},
            **{key: config.get(key) for key in ("system", "preset")},
            "state": "running",
            "mlflow.note.content": run_text.study_note(self._with_links(), (), config),
            "mlflow.source.git.commit": None
            if versions.get("commit") == "unknown"
            else versions.get("commit"),
        }
        run_id = self._run(PARENT, event)
        self._log(run_id, tags=tags, params=run_text.params({"trial": config}))
        confirms = (config.get("confirm") or {}).get("seeds")
        self._log_data(run_id, dataset.SPLITS if confirms else dataset.SPLITS[:1])
        self._client.update_run(run_id, status="RUNNING")

    def _job_started(self, event: Event) -> None:
        job = event["job"]
        run_id = self._run(job["id"], event, job)
        tags = {"state": "running", "mlflow.parentRunId": self._run(PARENT, event)}
        self._log(run_id, tags=tags, params=run_text.params(job))
        self._log_data(run_id, [(job.get("trial") or {}).get("split")])
        self._client.update_run(run_id, status="RUNNING")

    def _job_reported(self, event: Event) -> None:
        record = event["record"]
        run_id = self._run(event["id"], event, self._job(event["id"]))
        step = record.get("epoch") or 0
        self._log(run_id, metrics=run_text.metrics(record), step=step, time=event["time"])

    def _job_ended(self, event: Event) -> None:
        job, result = self._job(event["id"]), event["result"]
        run_id = self._run(job["id"], event, job)
        note = run_text.job_note(job, self._name, result)
        tags = {"state": result["state"], "reason": result.get("reason"), "mlflow.note.content": note}
        self._log(run_id, tags=tags)
        status = "FAILED" if result["state"] == "failed" else "FINISHED"
        self._client.set_terminated(run_id, status, end_time=event["time"])

    def _table(self, event: Event) -> None:
        """What it takes to run an ended job again, and its table of scores if it has one."""
        job = self._job(event["id"])
        run_id = self._run(event["id"], event, job)
        result = self._folder.result(event["id"]) or {}
        facts = recipe(job, self.ledger.study, result.get("num_workers"))
        self._client.log_dict(run_id, facts, "job.json")
        if self._folder.table(event["id"]):
            self._client.log_artifact(run_id, str(self._folder.job_path(event["id"]) / "knn.json"))

    def _artifacts(self, event: Event) -> None:
        run_id = self._run(PARENT, event)
        for path in event["paths"]:
            if not Path(path).exists():
                raise Refused(f"{path} is not there any more")
            self._client.log_artifact(run_id, path)

    def _model(self, event: Event) -> None:
        from study.registry import register

        package = Path(event["path"])
        if not (package / "detector.json").exists():
            raise Refused(f"{package} is not there any more")
        job = self._job(json.loads((package / "detector.json").read_text())["facts"]["student"])
        runs = [self._run(job["id"], event, job), self._run(PARENT, event)]
        register(self._client, package, self._experiment_id(), runs)

    def _parent(self, event: Event) -> None:
        run_id = self._run(PARENT, event)
        self._log(run_id, tags=event["tags"], metrics=event["metrics"], time=event["time"])

    def _finish(self, event: Event) -> None:
        self._runs = None  # see what the store really holds, duplicates and forgotten runs included
        run_id = self._run(PARENT, event)
        runs: dict[str, Any] = self._runs or {}
        for job_id in runs:
            if job_id != PARENT and runs[job_id].info.status == "RUNNING":
                child_id = runs[job_id].info.run_id
                self._log(child_id, tags={"state": "interrupted"})
                self._client.set_terminated(child_id, "KILLED", end_time=event["time"])
        ended = [(self._job(job_id), result) for job_id, result in self.ledger.ended.items()]
        note = run_text.study_note(self._with_links(), ended, self.ledger.study.get("config"))
        self._log(run_id, tags={"mlflow.note.content": note, "state": event["status"].lower()})
        self._client.set_terminated(run_id, event["status"], end_time=event["time"])

    # Finding and filling runs.

    def _experiment_id(self) -> str:
        if self._experiment is None:
            experiment = self._client.get_experiment_by_name(self._name)
            if experiment is None:
                self._experiment = self._client.create_experiment(self._name, self._artifact_location)
            else:
                if experiment.lifecycle_stage == "deleted":
                    self._client.restore_experiment(experiment.experiment_id)
                self._experiment = experiment.experiment_id
        return str(self._experiment)

    @property
    def _study_id(self) -> str:
        return digest({key: self.ledger.study.get(key) for key in ("name", "identity", "created")})

    def _index(self, experiment_id: str) -> dict[str, Any]:
        """The study's runs by job, the parent among them.

        Of two runs for one job (a slow server may still create the one that was given up and created again)
        the fuller one stays, then the older one; the other is deleted.
        """
        found: dict[str, Any] = {}
        page = None
        while True:
            runs = self._client.search_runs(
                [experiment_id], f"tags.study_id = '{self._study_id}'", max_results=500, page_token=page
            )
            for run in runs:
                key = PARENT if run.data.tags.get("role") == "study" else run.data.tags.get("trial_id", "")
                pair = [run, found[key]] if key in found else [run]
                pair.sort(key=lambda r: (-len(r.data.metrics), -len(r.data.params), r.info.start_time))
                found[key] = pair[0]
                for extra in pair[1:]:
                    self._client.delete_run(extra.info.run_id)
            page = runs.token
            if not page:
                return found

    def _run(self, key: str, event: Event, job: Mapping[str, Any] | None = None) -> str:
        """The id of the run of ``key``, created if the store has none; without a ``job`` it is the parent."""
        if self._runs is None:
            self._runs = self._index(self._experiment_id())
        if key not in self._runs:
            tags: dict[str, Any] = {
                "study": self._name,
                "study_id": self._study_id,
                "mlflow.user": _user(),
                "mlflow.source.name": "study/run.py",
                "mlflow.source.type": "LOCAL",
            }
            if job is None:
                tags |= {"role": "study", "mlflow.runName": self._name}
            else:
                tags |= {
                    "role": job["role"],
                    "trial_id": job["id"],
                    "system": (job.get("trial") or {}).get("system"),
                    "baseline": job.get("baseline"),
                    "mlflow.parentRunId": self._run(PARENT, event),
                    "mlflow.runName": run_text.run_name(job),
                    "mlflow.note.content": run_text.job_note(job, self._name),
                }
            self._runs[key] = self._client.create_run(
                self._experiment_id(), start_time=event["time"], tags=run_text.tags(tags)
            )
        return str(self._runs[key].info.run_id)

    def _job(self, job_id: str) -> dict[str, Any]:
        job = self.ledger.started.get(job_id) or self._folder.job(job_id)
        if job is None:
            raise Refused(f"job {job_id} is not known")
        return job

    def _with_links(self) -> str:
        return f"{self.ledger.description} {views.links(self._experiment_id())}".strip()

    def _log_data(self, run_id: str, splits: Iterable[str | None]) -> None:
        """What the run has heard, among its inputs. The same input again changes nothing."""
        data = self.ledger.study.get("data")  # studies of earlier versions did not say
        inputs = [dataset.run_input(data, split) for split in splits if data and split in dataset.SPLITS]
        if inputs:
            self._client.log_inputs(run_id, datasets=inputs)

    def _log(
        self,
        run_id: str,
        *,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, str] | None = None,
        metrics: Mapping[str, float] | None = None,
        step: int = 0,
        time: int = 0,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        if params:
            # A parameter cannot change: what differs (a study continued with more trials) stays as it was.
            there = self._client.get_run(run_id).data.params
            params = {key: value for key, value in params.items() if key not in there}
        self._client.log_batch(  # splits by itself at 100 parameters, 100 tags and 1000 metrics
            run_id,
            metrics=[Metric(key, value, time, step) for key, value in (metrics or {}).items()],
            params=[Param(key, value) for key, value in (params or {}).items()],
            tags=[RunTag(key, value) for key, value in run_text.tags(tags or {}).items()],
        )


def prepare_environment() -> None:
    """Set what MLflow reads from the environment, before it is imported. What the user set stays."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def open_client(uri: str) -> Any:
    """An MlflowClient. The first opening of a database creates its tables: one process at a time, quietly."""
    # SQLAlchemy's view of MLflow's own code; nothing that a user could act on.
    warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*noload.*")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    path = sqlite_path(uri)
    with exclusive(path) if path else contextlib.nullcontext():
        if path and not (path.exists() and path.stat().st_size):
            _make_database(path, MlflowClient)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _make_database(path: Path, client: Any) -> None:
    """MLflow's tables, put in place when they are whole: a process that is killed while it makes them leaves a
    database that MLflow takes for an older one."""
    made = path.with_name(f"{path.name}.new")
    for left in (made, made.with_name(f"{made.name}-journal")):  # of a process that was killed
        left.unlink(missing_ok=True)
    client(tracking_uri=f"sqlite:///{made}", registry_uri=f"sqlite:///{made}")
    write_atomically(path, made.read_bytes())
    made.unlink()


def _user() -> str:
    with contextlib.suppress(Exception):  # no such user in a container
        return getpass.getuser()
    return "unknown"
