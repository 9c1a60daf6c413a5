"""The presets, and the command line that chooses among them; the options are frozen here."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from study import presets
from study.command import Command, parse, parser, storage_folder
from study.config import resolve
from trainables.errors import UserError


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_is_a_study_that_validates(name: str, tmp_path: Path) -> None:
    own = {"stems": [f"corpus.manifest={tmp_path / 'm.csv'}"]}
    own["dcase"] = [f"corpus.root={tmp_path}", "corpus.year=2023"]
    config = resolve(presets.load(name), own.get(name, []))
    assert config.preset == name
    assert config.search.trials >= 12
    assert ("paper" in config.search.recipes) == (config.system != "frozen")
    assert presets.one_liner(name).endswith(".") or ":" in presets.one_liner(name)


def test_quick_is_small_and_runs_on_one_core() -> None:
    quick = presets.quick()
    assert quick.slots.count * quick.slots.workers * quick.slots.cpus_per_worker <= 1
    assert (quick.slots.count, quick.slots.workers, quick.slots.gpus_per_worker) == (2, 1, 0)


def test_stems_asks_for_its_manifest() -> None:
    with pytest.raises(UserError, match=r"corpus\.manifest"):
        resolve(presets.load("stems"))


def test_dcase_asks_for_folder_and_year(tmp_path: Path) -> None:
    for given, missing in (
        ([], r"corpus\.root = None: .* needs the folder"),
        ([f"corpus.root={tmp_path}"], r"corpus\.year = None: allowed are 2020 to 2026"),
        ([f"corpus.root={tmp_path}", "corpus.year=2019"], r"corpus\.year = 2019: allowed are 2020 to 2026"),
        (["corpus.kind=factory", "corpus.noise=factory"], r"corpus\.noise = 'factory': .* does not read it"),
    ):
        with pytest.raises(UserError, match=missing):
            resolve(presets.load("dcase"), given)


def test_an_unknown_preset_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean quick\? Allowed: quick, factory, stems"):
        presets.load("quik")


def test_the_options_are_these() -> None:
    options = {option for action in parser()._actions for option in action.option_strings}
    assert options == {
        "-h",
        "--help",
        "--preset",
        "--set",
        "--trials",
        "--storage",
        "--tracking-uri",
        "--name",
        "--dry-run",
        "--reproduce",
    }


def test_without_arguments_it_is_quick_in_runs() -> None:
    command = parse([])
    root = Path(__file__).resolve().parents[2]
    assert command.config.preset == "quick"
    assert command.storage == root / "runs"
    assert command.folder == root / "runs" / command.config.name
    assert command.tracking_uri == f"sqlite:///{root}/runs/mlflow.db"
    assert not command.dry_run


def test_arguments_reach_the_command(tmp_path: Path) -> None:
    arguments = (
        "--preset factory --set training.epochs=4 --set search.seed=3 --trials 20 --name mine --dry-run"
    )
    command = parse([*arguments.split(), "--storage", str(tmp_path), "--tracking-uri", "http://host:5000"])
    assert (command.config.training.epochs, command.config.search.seed) == (4, 3)
    assert (command.config.search.trials, command.config.name) == (20, "mine")
    assert command == Command(
        config=command.config, storage=tmp_path, tracking_uri="http://host:5000", dry_run=True
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trails", "3"], ["--trails", "did you mean --trials?", "--storage"]),
        (["--trail=3"], ["--trail: unknown option", "--trials"]),
        (["--trials", "many"], ["'many' is no whole number", "--trials 20"]),
        (["--trials"], ["--trials", "expected one argument"]),
        (["--trials", "0"], ["search.trials = 0"]),
        (["quick"], ["quick: not an option", "--set key=value"]),
        (["--preset", "slow"], ["--preset slow", "quick, factory, stems"]),
        (["--storage", "s3://bucket"], ["s3://bucket", "not a folder"]),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        parse(arguments)
    assert "\n" not in str(refused.value)
    for part in words:
        assert part in str(refused.value)


def test_storage_and_tracking_follow_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STUDY_STORAGE", "shared")
    assert parse([]).storage == tmp_path / "shared"
    assert parse(["--storage", "mine"]).storage == tmp_path / "mine"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")
    assert parse([]).tracking_uri == "http://host"


def test_in_the_throw_away_copy_of_a_job_results_go_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path("/tmp/ray/session_x/runtime_resources/working_dir_files/_ray_pkg_0")
    assert storage_folder(root=copy) == Path.home() / "study-runs"
    assert storage_folder("/shared/runs", root=copy) == Path("/shared/runs")
    monkeypatch.setattr(os, "getcwd", lambda: str(copy))
    with pytest.raises(UserError, match="throw-away copy"):
        storage_folder("runs", root=copy)


def test_help_teaches_quickly_and_imports_nothing_heavy(root: Path) -> None:
    code = (
        "import sys, atexit; sys.argv[0] = 'study/run.py'\n"
        "heavy = {'torch', 'ray', 'mlflow', 'optuna', 'numpy', 'scipy', 'sklearn', 'matplotlib'}\n"
        "atexit.register(lambda: print('HEAVY', sorted(heavy & set(sys.modules))))\n"
        "from study.command import parse\nparse(['--help'])\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "100"},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    for name in presets.PRESETS:
        assert presets.one_liner(name) in done.stdout
    for part in (
        "ray job submit --working-dir . --",
        "--set slots.gpus_per_worker=1",
        "training.epochs",
        "exit codes",
    ):
        assert part in done.stdout


def test_the_examples_in_the_help_are_commands_that_parse(tmp_path: Path) -> None:
    text = parser().format_help().replace("\\\n", " ")
    examples = [
        line.split("study/run.py", 1)[1].split()
        for line in text.splitlines()
        if re.match(r" +(python|ray) ", line)
    ]
    assert len(examples) == 6
    for arguments in examples:
        assert parse([*arguments, "--storage", str(tmp_path)]).storage == tmp_path
