"""The folder ``cluster/`` as a whole: shell, compose, Dockerfile, versions, the commands at the head of each file."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from study.command import parse
from trainables.errors import UserError

FILES = (
    "aws.yaml",
    "gcp.yaml",
    "onprem.yaml",
    "fake.yaml",
    "kuberay.yaml",
    "slurm.sbatch",
    "Dockerfile",
    "mlflow/server.sh",
    "mlflow/compose.yaml",
)
SCRIPTS = ("cluster/slurm.sbatch", "cluster/mlflow/server.sh", ".ci/run")
# Long options of sbatch (Slurm 23) that a study may need.
SBATCH = [
    "account",
    "array",
    "begin",
    "chdir",
    "comment",
    "constraint",
    "cpus-per-gpu",
    "cpus-per-task",
    "dependency",
    "error",
    "exclude",
    "exclusive",
    "export",
    "gpus",
    "gpus-per-node",
    "gpus-per-task",
    "gres",
    "job-name",
    "kill-on-bad-exit",
    "mail-type",
    "mail-user",
    "mem",
    "mem-per-cpu",
    "mem-per-gpu",
    "nodelist",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "partition",
    "qos",
    "requeue",
    "reservation",
    "signal",
    "time",
    "wait",
]


def commands(root: Path, name: str) -> dict[int, str]:
    """The numbered commands at the head of a file, each on one line."""
    found: dict[int, str] = {}
    number = 0
    for line in (root / "cluster" / name).read_text().splitlines():
        if not line.startswith("#"):
            break
        numbered = re.match(r"#   (\d)  (.*)", line)
        if numbered:
            number = int(numbered[1])
            found[number] = numbered[2]
        elif number and line.startswith("#       "):
            found[number] = f"{found[number].removesuffix(chr(92)).rstrip()} {line[1:].strip()}"
        else:
            number = 0
    return found


def shellcheck(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert program, "shellcheck is in requirements.lock"
    return subprocess.run([program, *arguments], input=text, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", FILES)
def test_it_starts_with_the_three_commands_that_use_it(name: str, root: Path) -> None:
    found = commands(root, name)
    assert sorted(found) == [1, 2, 3]
    if name.startswith("mlflow"):
        return
    assert name in "".join(found.values()), "the commands use the file they are in"


@pytest.mark.parametrize("name", FILES)
def test_its_commands_are_shell(name: str, root: Path) -> None:
    for command in commands(root, name).values():
        text = re.sub(r"\s&\s", " & ", command).replace("...", "X")
        checked = shellcheck("--shell=bash", "--exclude=SC2046,SC2034,SC2155,SC1083", "-", text=f"{text}\n")
        assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("name", FILES)
def test_the_study_it_runs_is_one(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets, options and settings in the commands, and in an entrypoint, are ones that study/run.py takes."""
    monkeypatch.setenv("HOME", "/nonexistent")
    text = " ".join(commands(root, name).values())
    if name == "kuberay.yaml":
        job = [d for d in yaml.safe_load_all((root / "cluster" / name).read_text()) if d["kind"] == "RayJob"]
        text = job[0]["spec"]["entrypoint"]
    asked = re.findall(r"(?:study/run\.py|slurm\.sbatch)((?: --\S+ (?!--)\S+)+)", text)
    if not asked:
        assert name.endswith(("compose.yaml", "Dockerfile"))
    for words in asked:
        assert parse(shlex.split(words)).config.slots.count >= 1


def test_a_wrong_option_in_such_a_command_is_named() -> None:
    with pytest.raises(UserError, match=r"slots\.gpus"):
        parse(shlex.split("--preset factory --set slots.gpus=1"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_pass_shellcheck(name: str, root: Path) -> None:
    checked = shellcheck(str(root / name))
    assert checked.returncode == 0, checked.stdout


def test_shellcheck_finds_what_it_is_for() -> None:
    assert "SC2086" in shellcheck("--shell=bash", "-", text="rm -rf $folder\n").stdout


def sbatch_problems(text: str) -> list[str]:
    lines = text.splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    found = [
        f"{line}: after the first command" for line in lines[first_command:] if line.startswith("#SBATCH")
    ]
    for line in lines[:first_command]:
        option = re.match(r"#SBATCH --([a-z-]+)(=\S+)?$", line)
        if line.startswith("#SBATCH") and (not option or option[1] not in SBATCH):
            found.append(line)
    return found


def test_slurm_knows_the_options(root: Path) -> None:
    text = (root / "cluster" / "slurm.sbatch").read_text()
    assert sbatch_problems(text) == []
    assert "#SBATCH --ntasks-per-node=1" in text
    assert sbatch_problems(text.replace("--ntasks-per-node", "--tasks-per-nodes")) == [
        "#SBATCH --tasks-per-nodes=1"
    ]


def test_slurm_hands_symmetric_run_what_it_takes(root: Path) -> None:
    from ray.scripts.scripts import start
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args, symmetric_run

    text = (root / "cluster" / "slurm.sbatch").read_text()
    line = re.search(r"ray symmetric-run(.*?) -- python", text.replace("\\\n", " "), re.S)
    assert line
    used = re.findall(r"--[a-z-]+", line[1])
    own = {option for parameter in symmetric_run.params for option in parameter.opts}
    assert set(used) <= own | {option for parameter in start.params for option in parameter.opts}
    curate_and_validate_ray_start_args([*(w for w in used if w not in own), "--address=a:1"])


SERVICE = {
    "image",
    "restart",
    "environment",
    "volumes",
    "healthcheck",
    "depends_on",
    "command",
    "ports",
    "user",
}
BELOW = {
    "healthcheck": {"test", "interval", "timeout", "retries", "start_period"},
    "depends_on": {"database"},
}


def compose_problems(config: dict[str, Any]) -> list[str]:
    found = [f"{key}" for key in config.keys() - {"name", "services", "volumes", "networks", "secrets"}]
    for name, service in config["services"].items():
        found += [f"{name}.{key}" for key in service.keys() - SERVICE]
        found += [f"{name}.{k}.{x}" for k, known in BELOW.items() for x in set(service.get(k, {})) - known]
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            if not source.startswith("."):
                found += [] if source in config["volumes"] else [f"{name}.volumes: {source}"]
    return found


def test_compose_is_whole(root: Path) -> None:
    config = yaml.safe_load((root / "cluster/mlflow/compose.yaml").read_text())
    assert compose_problems(config) == []
    config["services"]["mlflow"]["enviroment"] = {}
    assert compose_problems(config) == ["mlflow.enviroment"]
    assert all(port.startswith("127.0.0.1:") for port in config["services"]["mlflow"]["ports"])


def test_compose_gives_the_server_what_it_wants(root: Path) -> None:
    config = yaml.safe_load((root / "cluster/mlflow/compose.yaml").read_text())
    script = (root / "cluster/mlflow/server.sh").read_text()
    wanted = set(re.findall(r'^: "\$\{(\w+):\?', script, re.M))
    assert wanted
    assert wanted <= config["services"]["mlflow"]["environment"].keys()
    # What needs a value from outside is made by the first command, or has a default.
    text = (root / "cluster/mlflow/compose.yaml").read_text()
    made = set(re.findall(r'"([A-Z_]+)=\$\(openssl', text))
    assert set(re.findall(r"\$\{([A-Z_]+)[:}](?!-)", text)) - {"ALLOWED_HOSTS"} == made
    used = {word for word in config["services"]["mlflow"]["command"] if "/" in word}
    assert all((root / word).is_file() for word in used)


def test_the_image_is_the_lock_on_a_supported_python(root: Path) -> None:
    text = (root / "cluster" / "Dockerfile").read_text()
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    bases = re.findall(r"^FROM (\S+)$", text, re.M)
    assert len(bases) == 1
    python = re.fullmatch(r"python:3\.(\d+)-slim", bases[0])
    assert python, "a plain name, on no private host"
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"]).groups()  # type: ignore[union-attr]
    assert int(low) <= int(python[1]) < int(high)
    installs = re.findall(r"pip install.*", text)
    assert installs
    assert all("--require-hashes -r" in line for line in installs)
    copied = [source for line in re.findall(r"^COPY (.*)$", text, re.M) for source in line.split()[:-1]]
    assert all((root / source).exists() for source in copied)
    kept = re.findall(r"^!(\S+)$", (root / "cluster" / "Dockerfile.dockerignore").read_text(), re.M)
    assert sorted(kept) == sorted(copied)


def test_versions_equal_the_lock_s(root: Path) -> None:
    """Whatever names a package with a version, or this project's image, names the one that is pinned."""
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (root / "requirements.lock").read_text(), re.M))
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    for file in sorted(p for p in (root / "cluster").rglob("*") if p.is_file()):
        text = file.read_text()
        for name, named in re.findall(r"\b([a-z][\w-]+)==(\d[\w.]*)", text):
            assert pinned.get(name) == named, file
        for tag in re.findall(r"retain-study:(\d[\w.]*)", text):
            assert tag == version, file
        for ray_version in re.findall(r"rayVersion: '?([\d.]+)", text):
            assert ray_version == pinned["ray"], file
    for needed in ("boto3", "google-api-python-client", "psycopg-binary", "flask-wtf"):
        assert needed in pinned, "`ray up` and MLflow's server need it"


def test_images_come_from_nowhere_in_particular(root: Path) -> None:
    images = set()
    for file in (root / "cluster").rglob("*"):
        if file.is_file():
            images |= set(re.findall(r"^\s*(?:image:|FROM) (\S+)", file.read_text(), re.M))
    assert images
    assert all("/" not in image and ":" in image for image in images), images


def test_make_help_and_the_readme_list_the_files(root: Path) -> None:
    help_ = subprocess.run(["make", "-s"], cwd=root, capture_output=True, text=True, check=True).stdout
    readme = (root / "README.md").read_text()
    for name in FILES:
        assert f"cluster/{name}" in help_, name
        assert name in readme, name
