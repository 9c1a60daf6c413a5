"""What SECURITY.md promises of the source: nothing is unpickled or evaluated, nothing listens for strangers."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    p for package in ("study", "trainables", "search_spaces") for p in (ROOT / package).rglob("*.py")
)
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
# Handles of Ray's own actors, from one process of a cluster to another: whoever can send one has the token.
HANDLES = {
    ("study/worker.py", "ray.cloudpickle.dumps"),
    ("study/worker.py", "ray.cloudpickle.loads"),
    ("study/slots.py", "ray.cloudpickle.loads"),
}
WANTED = {  # what a call with this name has to be given
    "torch.load": {"weights_only": True},
    "from_pretrained": {"local_files_only": True},
    "AutoConfig.from_pretrained": {"trust_remote_code": False},
}
FORBIDDEN_VALUES = {"allow_pickle": True, "shell": True, "weights_only": False, "trust_remote_code": True}
FORBIDDEN_CALLS = r"(^|\.)(eval|exec|os\.system|popen|torch\.hub\.load|urlretrieve|urlopen|extractall)$"


def dangers(text: str, name: str = "") -> list[str]:
    """What in a module's source could run code that came with data."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = [module or ""] if module else [alias.name for alias in node.names]
            found += [f"{name}:{node.lineno}: import {n}" for n in names if n.split(".")[0] in PICKLES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        wrong = any(
            re.search(rf"(^|\.){re.escape(call)}$", called) and given.get(key) is not value
            for call, needs in WANTED.items()
            for key, value in needs.items()
        )
        wrong |= any(given.get(key) is value for key, value in FORBIDDEN_VALUES.items())
        wrong |= bool(re.search(FORBIDDEN_CALLS, called))
        wrong |= called.startswith("yaml.") and called != "yaml.safe_load"
        wrong |= bool(re.search(r"pickle\.\w+$", called)) and (name, called) not in HANDLES
        if wrong and not (
            called.endswith(".eval") and not node.args
        ):  # a module of torch that stops training
            found.append(f"{name}:{node.lineno}: {called}")
    return found


def test_nothing_runs_code_that_came_with_data() -> None:
    assert [d for path in MODULES for d in dangers(path.read_text(), str(path.relative_to(ROOT)))] == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.unsafe_load(text)",
        "ray.cloudpickle.loads(data)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "transformers.AutoConfig.from_pretrained(path, local_files_only=True)",
        "model_class.from_pretrained(path)",
    ],
)
def test_the_search_for_dangers_finds_them(text: str) -> None:
    assert dangers(text)


def test_the_search_for_dangers_lets_pass_what_is_none() -> None:
    assert dangers("torch.load(p, weights_only=True)\nmodel.eval()\nyaml.safe_load(t)\nnp.load(p)") == []


def test_what_the_makefile_starts_listens_on_this_machine_alone(tmp_path: Path) -> None:
    assert "--host 127.0.0.1" in (ROOT / "Makefile").read_text()
    asked = ["make", "-s", "-o", "env", "ui", f"STORAGE={tmp_path}"]
    for words in ("--host 0.0.0.0", "--host=0.0.0.0", "--port 5001 -h 0.0.0.0"):
        done = subprocess.run(
            [*asked, f"ARGS={words}"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert "127.0.0.1" in done.stderr
        assert "cluster/mlflow/server.sh" in done.stderr


def test_a_ray_of_our_own_has_its_dashboard_on_this_machine_alone() -> None:
    started = [
        node
        for node in ast.walk(ast.parse((ROOT / "study/cluster.py").read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "ray.init"
    ]
    hosts = [k.value.value for n in started for k in n.keywords if k.arg == "dashboard_host"]  # type: ignore[attr-defined]
    assert hosts == ["127.0.0.1"]  # the other call attaches to a cluster that is there


def test_every_head_that_cluster_files_start_keeps_its_dashboard_to_itself() -> None:
    for path in (ROOT / "cluster").rglob("*"):
        for line in path.read_text().splitlines() if path.is_file() else []:
            if "ray start --head" in line and not line.lstrip().startswith("#"):
                assert "--dashboard-host=127.0.0.1" in line, path
