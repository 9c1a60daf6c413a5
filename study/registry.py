"""The winner of a study in MLflow's model registry: a pyfunc model of code and safetensors, under the study's name.

A packed student (``study/packaging.py``) becomes a logged model of the runs that belong to it, and a version of the
registered model. It brings the project's own code and its encoder, so that it loads where neither the project nor the
study is. To register the same again changes nothing: the model carries a digest of what it was made from, and one that
was left half uploaded is deleted.
"""

from __future__ import annotations

import json
import shlex
import tempfile
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from study.detector import identity
from study.tracking_uri import redact
from trainables.errors import UserError
from trainables.scoring.threshold import DEFAULT_RATE

ROOT = Path(__file__).resolve().parents[1]
CODE = ("study", "search_spaces", "trainables")
NEEDED = (
    "mlflow",
    "numpy",
    "pandas",
    "safetensors",
    "scipy",
    "scikit-learn",
    "soundfile",
    "torch",
    "torchaudio",
)
MODEL = "student"  # what the logged model is called
MARK = "package"  # tag with the digest of what it was made from


def save_model(package: Path, target: Path) -> None:
    """Write MLflow's model of a packed student to the folder ``target``."""
    said = json.loads((package / "detector.json").read_text())
    requirements = [f"{name}=={version(name)}" for name in NEEDED]
    if said["encoder"]["name"] == "ast" or said["encoder"]["name"].startswith("data2vec"):
        requirements.append(f"transformers=={version('transformers')}")
    with warnings.catch_warnings(action="ignore"):  # MLflow's of its own type hints, pandas' of MLflow
        import mlflow.pyfunc

        mlflow.pyfunc.save_model(
            path=str(target),
            python_model=str(ROOT / "study" / "served_model.py"),
            artifacts={"detector": str(package)},
            code_paths=[str(ROOT / name) for name in CODE],
            signature=signature(),
            input_example=(example(package), {"false_alarm_rate": DEFAULT_RATE}),
            pip_requirements=requirements,
        )


def signature() -> Any:
    """What a request holds and what its answer: see ``study/served_model.py``."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, Object, Property

    piece = Object([Property(name, DataType.double) for name in ("start_s", "end_s", "score")])
    texts = ("study", "student", "nearest", "threshold_from", "backend")
    numbers = ("score", "threshold", "distance", "false_alarm_rate")
    answers = [
        *(ColSpec(DataType.double, name, required=False) for name in numbers),
        ColSpec(DataType.boolean, "anomalous", required=False),
        *(ColSpec(DataType.string, name, required=False) for name in ("machine", *texts, "error")),
        ColSpec(DataType.long, "bank_pieces", required=False),
        ColSpec(Array(piece), "pieces", required=False),
    ]
    asked = [ColSpec(DataType.binary, "wav"), ColSpec(DataType.string, "machine", required=False)]
    rate = ParamSpec("false_alarm_rate", DataType.double, DEFAULT_RATE)
    return ModelSignature(inputs=Schema(asked), outputs=Schema(answers), params=ParamSchema([rate]))


def example(package: Path) -> Any:
    """A request: a normal recording of the first machine."""
    import pandas as pd

    machine = next(iter(json.loads((package / "detector.json").read_text())["origins"]))
    row = {"wav": (package / "example.wav").read_bytes()} | ({"machine": machine} if machine else {})
    return pd.DataFrame([row])


def register(client: Any, package: Path, experiment_id: str, run_ids: Sequence[str]) -> str:
    """Make a packed student a model of some runs and a version of the registered model; returns the version.

    Args:
        run_ids: the first is the run that trained it.

    Raises:
        Whatever MLflow raises; to call again is safe.
    """
    said = json.loads((package / "detector.json").read_text())
    name, tags = said["facts"]["study"], {MARK: identity(package), **said["facts"]}
    model = _logged(client, package, experiment_id, run_ids, tags)
    # A server looks its own models up. A database is looked up where MLflow's global address points, not this client's.
    remote = str(client.tracking_uri).startswith(("http://", "https://"))
    source = f"models:/{model.model_id}" if remote else model.artifact_location
    if not client.search_registered_models(f"name = '{name}'", max_results=1):
        what = f"The best confirmed student of the study {name}; a version for each that was best."
        client.create_registered_model(name, description=what)
    for known in client.search_model_versions(f"name = '{name}'"):
        if known.tags.get(MARK) == tags[MARK] and known.source == source:
            return str(known.version)
    what = f"Trained by {said['facts']['student']}, scored by {said['backend']}; knows {_machines(said)}."
    made = client.create_model_version(
        name, source, run_ids[0], tags=tags, description=what, model_id=model.model_id
    )
    return str(made.version)


def _logged(
    client: Any, package: Path, experiment_id: str, run_ids: Sequence[str], tags: dict[str, str]
) -> Any:
    """The logged model, made and uploaded unless it is there."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    for known in client.search_logged_models([experiment_id], f"tags.{MARK} = '{tags[MARK]}'"):
        if known.status == LoggedModelStatus.READY:
            return known
        client.delete_logged_model(known.model_id)
    model = client.create_logged_model(
        experiment_id, MODEL, run_ids[0], tags=tags, model_type="anomaly detector"
    )
    with tempfile.TemporaryDirectory() as folder:
        save_model(package, Path(folder) / MODEL)
        client.log_model_artifacts(model.model_id, str(Path(folder) / MODEL))
    for run_id in run_ids:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def register_from_here(package: Path, uri: str) -> str:
    """``register`` by the command: finds the runs of the study in the MLflow at ``uri``; returns what to tell.

    Raises:
        UserError: that MLflow does not know the study, or refuses the model.
    """
    from study.mirror import open_client, prepare_environment

    prepare_environment()
    said = json.loads((package / "detector.json").read_text())
    study, job_id = said["facts"]["study"], said["facts"]["student"]
    try:
        client = open_client(uri)
        experiment = client.get_experiment_by_name(study)
        found = {}
        if experiment is not None:
            for run in client.search_runs([experiment.experiment_id], f"tags.trial_id = '{job_id}'"):
                found[run.info.run_id] = run
            for run in client.search_runs([experiment.experiment_id], "tags.role = 'study'"):
                found[run.info.run_id] = run
        if not found:
            raise UserError(
                f"MLflow at {redact(uri)} does not know the study {study}; give its --tracking-uri, or run the study's "
                "command again, which sends everything"
            )
        number = register(client, package, experiment.experiment_id, list(found))
    except UserError:
        raise
    except Exception as error:
        from study.tracking import in_words

        raise UserError(
            f"MLflow at {redact(uri)}: {in_words(error, uri)}; the student was not registered"
        ) from error
    return (
        f"registered   {study}, version {number}: {job_id}, knows {_machines(said)}\n"
        f"serve it     {serve_command(study, number, uri)}"
    )


def serve_command(name: str, number: str, uri: str) -> str:
    """What serves a version on this machine only."""
    words = ["mlflow", "models", "serve", "--model-uri", f"models:/{name}/{number}", "--env-manager", "local"]
    words += ["--host", "127.0.0.1", "--port", "5001"]
    return f"MLFLOW_TRACKING_URI={shlex.quote(redact(uri))} {shlex.join(words)}"


def _machines(said: dict[str, Any]) -> str:
    return ", ".join(name or "one machine" for name in said["origins"])
