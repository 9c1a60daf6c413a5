"""What is committed: no addresses of registries, no paths of one machine, no secrets, nothing large; a whole lock."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LARGEST_BYTES = 5_000_000

# In pieces, so that this file passes its own test.
REGISTRIES = [
    "pypi" + r"\.(org|python)",
    "files." + r"pythonhosted",
    "download." + r"pytorch",
    "anaconda" + r"\.(org|com)",
    r"[a-z0-9-]+" + r"\.jfrog\.io",
    "artifact" + r"ory\.",
    "/simple" + r"/?(\s|$)",
    "--(extra-)?index" + "-url",
    "--find" + "-links",
]
MACHINES = [
    "/(home|Users)" + r"/[a-z][\w.-]*/",
    "/ro" + "ot/",
    "/wo" + "rk/",
    "/tmp/" + r"(?!ray)[a-z]{1,8}/",
    r"[A-Z]:" + r"\\Users",
]
SECRETS = [
    "AKIA" + "[0-9A-Z]{16}",
    "gh[pousr]_" + "[A-Za-z0-9]{30,}",
    "hf_" + "[A-Za-z0-9]{30,}",
    "-----BEGIN " + "[A-Z ]*PRIVATE KEY",
    r"(?i)\b(password|secret|token)\b\s*[:=]\s*[\"'](?!test|fake|wrong|\*)[A-Za-z0-9+/_-]{16,}[\"']",
]


def tracked() -> list[Path]:
    """Files under version control, or all that an archive of them holds."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def hits(pattern: str) -> list[str]:
    found = []
    for path in tracked():
        data = path.read_bytes()
        if b"\0" in data:
            continue
        for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
            if re.search(pattern, line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    return found


@pytest.mark.parametrize("pattern", REGISTRIES)
def test_names_no_registry(pattern: str) -> None:
    assert hits(pattern) == []


@pytest.mark.parametrize("pattern", MACHINES)
def test_names_no_folder_of_one_machine(pattern: str) -> None:
    assert hits(pattern) == []


@pytest.mark.parametrize("pattern", SECRETS)
def test_holds_no_secret(pattern: str) -> None:
    assert hits(pattern) == []


@pytest.mark.parametrize(
    ("patterns", "text"),
    [
        (REGISTRIES, "see https://pypi" + ".org/project/ray"),
        (REGISTRIES, "--index" + "-url https://example.com"),
        (MACHINES, "cd /home" + "/anna/study"),
        (SECRETS, "key = AKIA" + "ABCDEFGHIJKLMNOP"),
        (SECRETS, "token = " + "'0123456789abcdef0123'"),
    ],
)
def test_the_patterns_find_what_they_are_for(patterns: list[str], text: str) -> None:
    assert any(re.search(pattern, text) for pattern in patterns)


def test_no_file_is_large() -> None:
    assert [(p.name, p.stat().st_size) for p in tracked() if p.stat().st_size > LARGEST_BYTES] == []


def test_the_lock_is_whole() -> None:
    text = (ROOT / "requirements.lock").read_text()
    blocks = re.split(r"\n(?=[A-Za-z0-9])", text)[1:]
    assert len(blocks) > 100
    for block in blocks:
        assert re.match(r"[\w.-]+(\[[\w,-]+\])?==\S+", block), block.splitlines()[0]
        assert "--hash=sha256:" in block, block.splitlines()[0]
    assert "://" not in text
    assert " @ " not in text


def test_the_lock_covers_the_project() -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in project["dependencies"] + project["optional-dependencies"]["dev"]:
        name = re.match(r"[\w.-]+", wanted)
        assert name
        assert name[0].lower() in pinned, wanted
        exact = re.search(r"==([\w.]+)$", wanted)
        assert not exact or pinned[name[0].lower()] == exact[1], wanted


def test_make_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.M)
    assert phony
    help_ = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert sorted(re.findall(r"make ([a-z-]+) ", help_)) == sorted(phony[1].split())
