"""The winner of a study as MLflow serves it: ``mlflow models serve``, or ``mlflow.pyfunc.load_model``.

MLflow runs this file when it loads the model (models from code): nothing is pickled. A request carries the bytes of
recordings, never paths: who may ask a server shall not be able to make it read its own disk. Each recording is answered
as ``study/score.py`` prints it; one that cannot be scored is answered with ``error`` and spoils no other.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class ServedDetector(PythonModel):
    """Scores recordings given as bytes."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the folder that ``Detector.save`` wrote."""
        from study.detector import load_detector

        self.detector = load_detector(Path(context.artifacts["detector"]))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """One answer for each row of ``wav`` (bytes of a wav or flac file) and ``machine``.

        Raises:
            MlflowException: a rate of false alarms that is none.
        """
        from mlflow.exceptions import MlflowException

        from trainables.errors import UserError
        from trainables.scoring.threshold import DEFAULT_RATE, check_rate

        try:
            rate = check_rate(float((params or {}).get("false_alarm_rate", DEFAULT_RATE)))
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        machines = model_input["machine"] if "machine" in model_input else [None] * len(model_input)
        return [
            self._answer(number, wav, machine if isinstance(machine, str) else None, rate)
            for number, (wav, machine) in enumerate(zip(model_input["wav"], machines, strict=True), 1)
        ]

    def _answer(self, number: int, wav: bytes, machine: str | None, rate: float) -> dict[str, Any]:
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:  # what it is, its content says
            file.write(wav)
            file.flush()
            return self.detector.line(Path(file.name), machine, rate, name=f"recording {number}")


set_model(ServedDetector())
