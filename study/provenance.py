"""Where a study's numbers come from: the content of ``study.json``, written before anything is trained.

Configuration and its identity, the command without secrets, versions, hardware, and the notes that belong under
every table. A folder that holds another study under the same name is refused here.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.config import differences, identity
from study.folder import StudyFolder
from study.tracking_uri import redact
from trainables.errors import UserError
from trainables.settings import to_dict

if TYPE_CHECKING:
    from study.config import StudyConfig

ROOT = Path(__file__).resolve().parents[1]
REPORTED_VERSIONS = ("ray", "torch", "torchaudio", "optuna", "mlflow", "numpy", "scikit-learn")


def describe(config: StudyConfig, folder: StudyFolder, notes: Sequence[str]) -> dict[str, Any]:
    """What ``study.json`` says; ``hardware`` is that of an earlier run, if there was one.

    Raises:
        UserError: the folder holds another study of that name.
    """
    known = folder.study()
    if known is not None and known["identity"] != identity(config):
        changed = "; ".join(differences(known["config"], config)) or "the content of a file it reads"
        raise UserError(
            f"--name {config.name}: {folder.path} holds another study ({changed}); choose another name or storage"
        )
    return {
        "name": config.name,
        "config": to_dict(config),
        "identity": identity(config),
        "command": command_line(),
        "versions": {"python": platform.python_version(), "commit": commit()}
        | {name: version(name) for name in REPORTED_VERSIONS},
        "hardware": (known or {}).get("hardware"),
        "notes": list(notes),
        "created": known["created"] if known else datetime.now(UTC).isoformat(timespec="seconds"),
    }


def command_line() -> str:
    """The command as it was given, to be given again, without the passwords of the addresses in it."""
    words = [Path(sys.executable).name, *sys.argv]
    return shlex.join(redact(word) if "://" in word else word for word in words)


def hardware() -> dict[str, Any]:
    """What the connected Ray has: cores and GPUs of all nodes, processor and memory of this one."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    facts: dict[str, Any] = {
        "processor": processor(),
        "cores": sum(int(node.get("CPU", 0)) for node in nodes),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.system(),
    }
    if gpus := sum(int(node.get("GPU", 0)) for node in nodes):
        mark = "accelerator_type:"
        kinds = sorted({key.removeprefix(mark) for node in nodes for key in node if key.startswith(mark)})
        facts["gpus"] = f"{gpus} x {' or '.join(kinds)}" if kinds else gpus
    return facts | ({"nodes": len(nodes)} if len(nodes) > 1 else {})


def processor() -> str:
    """Its name, or else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The commit of this checkout, with a mark if files differ from it; ``unknown`` outside of git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
