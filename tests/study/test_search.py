"""The search without Ray: every trial ends once and truthfully, whatever is killed in between."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import search_spaces
from study.config import SearchConfig, StudyConfig
from study.folder import StudyFolder
from study.search import Search, build_job, label_of
from trainables.errors import UserError
from trainables.settings import TrainingConfig, TrialConfig, build

EPOCHS = 4
RECIPES = {
    "alpha": {"shape_kind": "flat", "height": 0.5, "rate": 0.01},
    "beta": {"shape_kind": "slope", "slope": -1.0, "offset": 0.0, "rate": 0.1},
}
COMPLETE, PRUNED, FAIL, RUNNING, WAITING = (
    getattr(optuna.trial.TrialState, name) for name in ("COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING")
)


def space(trial: Any) -> dict[str, Any]:
    params: dict[str, Any] = {"shape_kind": trial.suggest_categorical("shape_kind", ["flat", "slope"])}
    if params["shape_kind"] == "flat":
        params["height"] = trial.suggest_float("height", 0.0, 1.0)
    else:
        params["slope"] = trial.suggest_float("slope", -2.0, 2.0)
        params["offset"] = trial.suggest_float("offset", -1.0, 1.0)
    params["rate"] = trial.suggest_float("rate", 1e-3, 1.0, log=True)
    return params


def value(params: dict[str, Any], epoch: int = EPOCHS) -> float:
    best = (
        params["height"] if params["shape_kind"] == "flat" else 0.5 + params["offset"] - params["slope"] ** 2
    )
    return 50.0 + 10.0 * best - abs(math.log10(params["rate"]) + 2) - 5.0 / epoch


def config(trials: int = 12, **search: Any) -> StudyConfig:
    search = {"seed": 3, "startup_trials": 4, "recipes": ("alpha", "beta"), **search}
    return StudyConfig(training=TrainingConfig(epochs=EPOCHS), search=SearchConfig(trials=trials, **search))


def open_search(path: Path, trials: int = 12, **search: Any) -> Search:
    folder = StudyFolder(path)
    return Search(config(trials, **search), folder, space=space, recipes=RECIPES, cache_dir=path / "cache")


def record(params: dict[str, Any], epoch: int) -> dict[str, Any]:
    metrics = {"official": value(params, epoch)}
    return {"epoch": epoch, "epochs": EPOCHS, "done": epoch == EPOCHS, "metrics": metrics}


def result(state: str, epoch: int, metrics: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"state": state, "reason": reason, "epoch": epoch, "metrics": metrics}


def run_one(search: Search, job: dict[str, Any], epochs: int = EPOCHS) -> None:
    """Run a job to ``epochs``: stopped if that is not the end."""
    for epoch in range(1, epochs + 1):
        search.folder.append_record(job["id"], record(job["params"], epoch))
        search.report(job["id"], epoch, value(job["params"], epoch))
    state = "finished" if epochs == EPOCHS else "stopped"
    end = result(state, epochs, {"official": value(job["params"], epochs)})
    search.folder.write_result(job["id"], end)
    search.tell(job["id"], end)


def states(search: Search) -> list[Any]:
    return [t.state for t in search.study.get_trials()]


def test_recipes_come_first_and_jobs_are_complete(tmp_path: Path) -> None:
    search = open_search(tmp_path)
    jobs = [search.ask() for _ in range(3)]
    assert [job["id"] for job in jobs] == ["t0000", "t0001", "t0002"]
    assert [job["baseline"] for job in jobs] == ["alpha", "beta", None]
    assert [job["params"] for job in jobs[:2]] == list(RECIPES.values())
    job = jobs[1]
    assert job == json.loads(json.dumps(job)) == search.folder.job("t0001")
    assert job["role"] == "trial"
    assert job["label"] == "slope"
    assert job["entry"] == "trainables.loop:train"
    assert Path(job["checkpoint_dir"]) == tmp_path / "jobs" / "t0001" / "checkpoint"
    trial = build(TrialConfig, job["trial"])
    assert trial.params == RECIPES["beta"]
    assert (trial.seed, trial.split, trial.training.epochs) == (3, "search", EPOCHS)


def test_a_confirm_job_differs_only_where_it_must(tmp_path: Path) -> None:
    common = {"params": RECIPES["alpha"], "cache_dir": tmp_path}
    folder = StudyFolder(tmp_path)
    trial = build_job(config(), folder, job_id="t0000", role="trial", baseline="alpha", **common)
    confirm = build_job(
        config(),
        folder,
        job_id="c-alpha-s7",
        role="confirm",
        seed=7,
        split="confirm",
        label="alpha",
        **common,
    )
    assert confirm["trial"] == {**trial["trial"], "seed": 7, "split": "confirm"}
    assert (confirm["label"], confirm["baseline"]) == ("alpha", None)


def test_labels_are_words() -> None:
    assert label_of({"a_kind": "ramp", "x": 0.5, "b_kind": "uniform"}) == "ramp, uniform"
    assert label_of({"x": 0.123456, "n": 2}) == "x=0.123, n=2"


def test_the_search_ends_after_its_trials_and_can_be_extended(tmp_path: Path) -> None:
    search = open_search(tmp_path, trials=5)
    while job := search.ask():
        assert not search.over
        run_one(search, job)
    assert search.over
    assert states(search) == [COMPLETE] * 5

    assert open_search(tmp_path, trials=3).over
    assert open_search(tmp_path, trials=3).ask() is None
    longer = open_search(tmp_path, trials=7)
    assert not longer.over
    ids = []
    while job := longer.ask():
        ids.append(job["id"])
        run_one(longer, job)
    assert ids == ["t0005", "t0006"]
    assert sum(t.user_attrs.get("baseline") is not None for t in longer.study.get_trials()) == 2


def test_recipes_left_out_of_a_short_search_are_run_when_it_is_extended(tmp_path: Path) -> None:
    short = open_search(tmp_path, trials=1)
    run_one(short, short.ask())
    assert short.ask() is None
    assert states(short) == [COMPLETE, WAITING]
    assert open_search(tmp_path, trials=2).ask()["baseline"] == "beta"


def test_outcomes_are_told_as_what_they_are(tmp_path: Path) -> None:
    search = open_search(tmp_path)
    whole, stopped, failed, nan = (search.ask() for _ in range(4))
    run_one(search, whole)
    run_one(search, stopped, epochs=2)
    search.report(failed["id"], 1, value(failed["params"], 1))
    search.report(failed["id"], 2, math.nan)
    search.tell(failed["id"], result("failed", 1, {"official": 70.0}, "loss is nan at step 40"))
    search.tell(nan["id"], result("finished", EPOCHS, {"official": None}))
    trials = search.study.get_trials()
    assert [t.state for t in trials] == [COMPLETE, PRUNED, FAIL, FAIL]
    assert trials[0].value == value(whole["params"])
    assert trials[1].intermediate_values == {1: value(stopped["params"], 1), 2: value(stopped["params"], 2)}
    assert list(trials[2].intermediate_values) == [1]
    assert trials[2].user_attrs["reason"] == "loss is nan at step 40"
    assert search.study.best_trial.number == 0


def test_a_second_verdict_changes_nothing(tmp_path: Path) -> None:
    search = open_search(tmp_path)
    job = search.ask()
    run_one(search, job)
    search.tell(job["id"], result("failed", 1, {}, "too late"))
    assert states(search)[0] == COMPLETE


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_seed_proposes_the_same_trials_across_restarts(tmp_path: Path, sampler: str) -> None:
    def proposals(path: Path, restart_after: int | None, seed: int = 3) -> list[dict[str, Any]]:
        search, params = open_search(path, sampler=sampler, seed=seed), []
        while job := search.ask():
            if len(params) == restart_after:  # killed between asking and running
                search = open_search(path, sampler=sampler, seed=seed)
                assert search.ask() == job
            params.append(job["params"])
            run_one(search, job, epochs=2 if len(params) % 3 == 0 else EPOCHS)
        return params

    whole = proposals(tmp_path / "a", None)
    assert len(whole) == 12
    assert len({json.dumps(p) for p in whole}) == 12
    assert proposals(tmp_path / "b", 5) == whole
    assert proposals(tmp_path / "c", 9) == whole
    assert proposals(tmp_path / "d", None, seed=4) != whole


def test_pruned_trials_teach_the_sampler(tmp_path: Path) -> None:
    def thirteenth(path: Path, told: str) -> dict[str, Any]:
        search = open_search(path, trials=13, sampler="tpe")
        for _ in range(12):
            job = search.ask()
            if told == "stopped":
                run_one(search, job, epochs=2)
            else:
                search.tell(job["id"], result("failed", 0, {}, "broken"))
        return search.ask()["params"]

    assert thirteenth(tmp_path / "a", "stopped") != thirteenth(tmp_path / "b", "failed")


def test_a_space_with_few_points_is_not_run_twice_while_there_are_others(tmp_path: Path) -> None:
    def coarse(trial: Any) -> dict[str, Any]:
        return {"n": trial.suggest_int("n", 0, 5)}

    def open_coarse() -> Search:
        return Search(
            config(8, recipes=()), StudyFolder(tmp_path), space=coarse, recipes={}, cache_dir=tmp_path
        )

    search, seen = open_coarse(), []
    while job := search.ask():
        seen.append(job["params"]["n"])
        end = result("finished", EPOCHS, {"official": float(job["params"]["n"])})
        search.folder.write_result(job["id"], end)
        search.tell(job["id"], end)
        search = open_coarse()
    assert len(seen) == 8  # eight of six points: some repeat after all, but the search ends
    assert set(seen[:5]) <= set(range(6))
    assert len(set(seen)) >= 5
    discarded = [t for t in search.study.get_trials() if "duplicate_of" in t.user_attrs]
    assert {t.state for t in discarded} == {FAIL}
    assert search.over
    assert len(search.folder.job_ids()) == 8


def test_a_journal_cut_short_is_mended(tmp_path: Path) -> None:
    search = open_search(tmp_path)
    job = search.ask()
    journal = tmp_path / "optuna.journal"
    with open(journal, "ab") as file:
        file.write(b'{"op_code": 6, "worker')
    (tmp_path / "optuna.journal.lock").symlink_to(journal)  # its holder was killed
    search = open_search(tmp_path)
    assert search.ask() == job
    run_one(search, job)
    assert states(open_search(tmp_path))[0] == COMPLETE


def test_bad_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"search\.sampler = 'grid': allowed are tpe, random"):
        open_search(tmp_path, sampler="grid")
    with pytest.raises(UserError, match="'gamma' is not a published recipe; allowed are alpha, beta"):
        open_search(tmp_path, recipes=("gamma",))
    open_search(tmp_path).ask()
    (tmp_path / "optuna.journal").unlink()
    with pytest.raises(UserError, match="knows nothing of t0000"):
        open_search(tmp_path)


def test_a_recipe_that_the_space_does_not_keep_is_refused(tmp_path: Path) -> None:
    recipes = {"alpha": {**RECIPES["alpha"], "stray": 1}}
    folder = StudyFolder(tmp_path)
    search = Search(config(recipes=("alpha",)), folder, space=space, recipes=recipes, cache_dir=tmp_path)
    with pytest.raises(UserError, match="'stray': 1"):
        search.ask()


class Interleavings(RuleBasedStateMachine):
    """Slots, crashes and reopenings in any order. ``live``: what slots are running; ``ended``: the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.home = tempfile.TemporaryDirectory()
        self.live: dict[str, tuple[dict[str, Any], int]] = {}
        self.known: dict[str, dict[str, Any]] = {}
        self.ended: dict[str, str] = {}
        self.asked: list[str] = []

    @initialize(sampler=st.sampled_from(["tpe", "random"]))
    def begin(self, sampler: str) -> None:
        self.sampler, self.trials = sampler, 8
        self.reopen()

    def reopen(self) -> None:
        self.search = open_search(Path(self.home.name), trials=self.trials, sampler=self.sampler)

    @rule()
    def ask(self) -> None:
        job = self.search.ask()
        if job is None:
            assert len(self.known) >= self.trials
            return
        assert job["id"] not in self.live
        assert job["id"] not in self.ended
        assert self.known.setdefault(job["id"], job) == job  # interrupted: the same again
        self.live[job["id"]] = (job, len(self.search.folder.records(job["id"])))
        self.asked.append(job["id"])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def epoch(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.live)))
        job, epoch = self.live[job_id]
        if epoch < EPOCHS:
            self.search.folder.append_record(job_id, record(job["params"], epoch + 1))
            if data.draw(st.booleans()):  # else killed in between: the record is kept and Optuna not told
                self.search.report(job_id, epoch + 1, value(job["params"], epoch + 1))
            self.live[job_id] = (job, epoch + 1)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), fails=st.booleans(), told=st.booleans())
    def end(self, data: st.DataObject, fails: bool, told: bool) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.live)))
        job, epoch = self.live.pop(job_id)
        if epoch == 0 or fails:
            state, reason = "failed", "broken"
        else:
            state, reason = ("finished" if epoch == EPOCHS else "stopped"), None
        end = result(state, epoch, {"official": value(job["params"], max(1, epoch))}, reason)
        self.search.folder.write_result(job_id, end)
        self.ended[job_id] = state
        if told:
            self.search.tell(job_id, end)
        else:  # killed in between
            self.crash(more=0)

    @rule(more=st.integers(0, 2))
    def crash(self, more: int) -> None:
        self.live.clear()
        self.trials += more
        self.reopen()

    @invariant()
    def truthful(self) -> None:
        if not hasattr(self, "search"):
            return
        expected = {"finished": COMPLETE, "stopped": PRUNED, "failed": FAIL}
        trials = self.search.study.get_trials(deepcopy=False)
        for trial in trials:
            job_id = f"t{trial.number:04d}"
            if job_id in self.ended:
                assert trial.state == expected[self.ended[job_id]]
            elif job_id in self.known:
                assert trial.state == RUNNING
            assert all(math.isfinite(v) for v in trial.intermediate_values.values())
        started = [t for t in trials if t.state != WAITING]
        assert len(started) == len(self.known) <= self.trials
        assert [t.user_attrs.get("baseline") for t in trials[:2]] == ["alpha", "beta"]

    def teardown(self) -> None:
        if hasattr(self, "search"):
            self.crash(more=0)
            while job := self.search.ask():
                assert job["id"] not in self.ended
                run_one(self.search, job)
                self.ended[job["id"]] = "finished"
            assert self.search.over
            final = states(self.search)
            assert len(final) == self.trials
            assert RUNNING not in final
            assert WAITING not in final
            for trial in self.search.study.get_trials():
                if trial.state == COMPLETE:
                    assert trial.value == value(trial.params)
                    assert len(trial.intermediate_values) == EPOCHS
        self.home.cleanup()


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(
    max_examples=12,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def joint(path: Path, trials: int = 12, **search: Any) -> Search:
    """A search across two systems."""
    given = config(trials, **{"recipes": ("retain-paper", "identify-encoder"), **search})
    made = dataclasses.replace(given, system="identify,retain")
    space = search_spaces.load(made.system)
    return Search(made, StudyFolder(path), space=space.space, recipes=space.RECIPES, cache_dir=path / "cache")


def test_several_systems_take_turns_each_in_its_own_space(tmp_path: Path) -> None:
    search = joint(tmp_path, trials=8, fixed={"network_kind": "encoder"})
    jobs = [job for _ in range(5) if (job := search.ask())]
    jobs += list(iter(joint(tmp_path, trials=8, fixed={"network_kind": "encoder"}).ask, None))[5:]
    assert [job["baseline"] for job in jobs[:3]] == ["retain-paper", "identify-encoder", None]
    systems = [job["params"]["system"] for job in jobs]
    assert systems == ["retain", "identify"] + 3 * ["identify", "retain"]
    for job, system in zip(jobs, systems, strict=True):
        trial = build(TrialConfig, job["trial"])
        assert trial.system == system
        assert trial.params == {k: v for k, v in job["params"].items() if k != "system"}
        own = search_spaces.load(system)
        assert {k for k in trial.params if k.endswith("_kind")} == {*own.BRANCHES, "weighting_kind"}
        assert trial.params.get("network_kind", "encoder") == "encoder"
        assert job["label"].startswith(f"{system}, ")
    names = {name for trial in search.study.get_trials() for name in trial.params}
    assert {"system", "retain.learning_rate", "identify.learning_rate"} < names
    assert "learning_rate" not in names


def test_a_fixed_value_is_in_every_trial_but_the_recipes(tmp_path: Path) -> None:
    space = search_spaces.load("retain")
    fixed = {"lambda_kind": "ramp", "lambda_start": 0.25}
    given = config(8, recipes=("paper",), fixed=fixed)
    search = Search(
        given, StudyFolder(tmp_path), space=space.space, recipes=space.RECIPES, cache_dir=tmp_path
    )
    paper, *others = iter(search.ask, None)
    assert paper["params"] == space.RECIPES["paper"]
    assert len(others) == 7
    assert all(job["params"].items() >= fixed.items() for job in others)
    assert len({job["params"]["lambda_end"] for job in others}) == 7
