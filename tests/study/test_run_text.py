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


PARAMS = {"lambda_kind": "constant", "lambda_value": 0.5, "curriculum_kind": "fixed", "snr_db": 0.0}
PARAMS |= {
    "weighting_kind": "fixed",
    "w_tag": 0.1,
    "w_mix": 1.0,
    "learning_rate": 0.002,
    "align_level": "tokens",
}
PARAMS |= {"spec_time_fraction": 0.1, "spec_mel_fraction": 0.0}
TRIAL = {"system": "retain", "seed": 3, "split": "search", "encoder": {"name": "tiny"}}
TRIAL |= {"corpus": {"kind": "factory"}, "training": {"epochs": 5, "steps_per_epoch": 40}}


def test_a_note_says_what_was_run_and_what_came_out() -> None:
    job = {"id": "t0000", "role": "trial", "baseline": "paper", "label": "constant, fixed, fixed"}
    job |= {"trial": TRIAL, "params": PARAMS}
    metrics = {"official": 89.9, "low/official": 77.9, "gap_closed": 0.09}
    result = {"state": "finished", "epoch": 5, "metrics": metrics, "duration_s": 40.4}
    first, outcome, choices, circumstances = run_text.job_note(job, "quick", result).split("\n\n")
    assert (
        first
        == "Search trial **t0000** of study quick, published recipe or reference *paper*: constant, fixed, fixed."
    )
    assert outcome == (
        "**Finished** after epoch 5 in 40 s. Official score 89.9 of 100 (low SNR 77.9); 9 % of the "
        "teacher-to-oracle gap closed at low SNR."
    )
    assert choices.startswith("Lambda 0.5; training SNR 0 dB; tagging : alignment 0.1 : 1; ")
    assert circumstances == (
        "Trained with 5 epochs of 40 steps, seed 3. Scored on the machines of split search, corpus factory, "
        "encoder tiny."
    )
    worse = run_text.job_note(job, "quick", {**result, "metrics": {**metrics, "gap_closed": -0.04}})
    assert "at low SNR worse than the frozen teacher, by 4 % of its gap to the oracle." in worse
    frozen = {
        "id": "b-teacher",
        "role": "baseline",
        "trial": {**TRIAL, "system": "frozen"},
        "params": {"reference": 1},
    }
    assert "Trained" not in run_text.job_note(frozen, "quick", result)


def test_the_note_of_a_study_begins_with_what_came_out() -> None:
    def ended(
        job_id: str, role: str, official: float, **more: str
    ) -> tuple[dict[str, object], dict[str, object]]:
        return {"id": job_id, "role": role, **more}, {"state": "finished", "metrics": {"official": official}}

    jobs = [
        ended("t0001", "trial", 91.0, label="ramp"),
        ended("b-teacher", "baseline", 88.0, baseline="teacher"),
        ended("c-best-s0", "confirm", 92.0, baseline="paper"),
        ended("c-best-s1", "confirm", 93.0),
        ended("c-teacher-s0", "confirm", 90.0, baseline="teacher"),
    ]
    config = {"system": "retain", "training": TRIAL["training"], "encoder": {"name": "tiny"}}
    note = run_text.study_note("12 trials.", jobs, config | {"confirm": {"seeds": 2, "recipes": ["paper"]}})
    assert note.split("\n\n") == [
        "12 trials.",
        "**On machines that no trial has seen**, official: best 92.5 (2 seeds), teacher 90.0. Intervals are in "
        "findings.md.",
        "Best of the search (an optimistic figure): **t0001 ramp**, official 91.0.",
        "References: teacher 88.0.",
        "Runs: 4 finished.",
        "A trial trains the encoder tiny for 5 epochs of 40 steps; it is judged by the official score, in points, on "
        "the search machines. The best and paper are then trained again with 2 seeds and scored on machines that no "
        "trial has seen.",
    ]
