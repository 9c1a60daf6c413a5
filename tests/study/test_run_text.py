"""Names, metrics and notes of runs within MLflow's limits."""

from __future__ import annotations

from study import run_text


def test_metrics_are_few_finite_and_named_as_mlflow_wants() -> None:
    many = {f"fan/{i}/auc": 1.0 for i in range(99)} | {f"plain{i}": 1.0 for i in range(50)}
    odd = {"nan": float("nan"), "inf": float("inf"), "yes": True, "none": None, "text": "x", "weird(%)": 1}
    headline = {"official": 1.0, "low/official": 2.0, "stationary/low/official": 3.0, "loss/tag": 4.0}
    kept = run_text.metrics({"metrics": {**many, **odd, **headline}})
    assert len(kept) == 55
    assert len(run_text.metrics({"metrics": {f"plain{i}": 1.0 for i in range(99)}})) == run_text.MAX_METRICS
    assert {"official", "low/official", "weird___"} <= set(kept)
    assert not {"fan/0/auc", "nan", "inf", "yes", "none", "text"} & set(kept)
    assert run_text.metrics({"metrics": headline}) == headline
    assert run_text.finite({"a//../b": 1}) == {"a/b": 1.0}
