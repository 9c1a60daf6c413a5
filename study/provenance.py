"""Where a study's numbers come from: the content of ``study.json``, written before anything is trained.

Configuration and its identity, the identity of the corpus, the command without secrets, versions, hardware, and the
notes that belong under every table. A folder that holds another study under the same name is refused here, and so is
a study whose recordings have changed. Which code ran is told twice: the commit of the checkout, unknown in a copy
(``ray job submit`` uploads one), and a digest of the source files, which a checkout and its copies share.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study.config import differences, file_digests, identity
from study.folder import StudyFolder
from study.tracking_uri import redact
from trainables.errors import UserError
from trainables.files import content_digest
from trainables.settings import to_dict

if TYPE_CHECKING:
    from study.config import StudyConfig
    from study.preflight import Preflight

ROOT = Path(__file__).resolve().parents[1]
PACKAGES, SOURCES = ("study", "search_spaces", "trainables"), (".py", ".json", ".safetensors")
REPORTED_VERSIONS = ("ray", "torch", "torchaudio", "optuna", "mlflow", "numpy", "scikit-learn")


def describe(config: StudyConfig, folder: StudyFolder, found: Preflight) -> dict[str, Any]:
    """What ``study.json`` says; ``hardware`` is that of an earlier run, if there was one.

    Raises:
        UserError: the folder holds another study of that name, or this one with other recordings.
    """
    from trainables.scoring import grid

    known = folder.study()
    if known is not None and known["identity"] != identity(config):
        changed = "; ".join(differences(known["config"], config)) or "the content of a file it reads"
        raise UserError(
            f"--name {config.name}: {folder.path} holds another study ({changed}); choose another name or storage"
        )
    if known is not None and known.get("corpus", found.corpus_identity) != found.corpus_identity:
        raise UserError(
            f"--name {config.name}: {_changed(folder.corpus_files(), found.files)} since this study began; put the "
            "recordings back, or choose another name"
        )
    return {
        "name": config.name,
        "config": to_dict(config),
        "identity": identity(config),
        "corpus": found.corpus_identity,
        "files": file_digests(config),
        "grid": grid.REVISION,
        "data": dict(found.data),
        "command": command_line(),
        "versions": {
            "python": platform.python_version(),
            "commit": commit(),
            "source": source(),
            "trainables": source(packages=("trainables",)),  # what a trial computes with
        }
        | {name: version(name) for name in REPORTED_VERSIONS},
        "hardware": (known or {}).get("hardware"),
        "notes": list(found.notes),
        "created": known["created"] if known else datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Which recordings differ, the first three by name."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if not before or not names:
        return "the corpus has changed"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'has' if len(names) == 1 else 'have'} changed"


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


def source(root: Path = ROOT, packages: Sequence[str] = PACKAGES) -> str:
    """A digest of the project's code and weights under ``root``: the same for a checkout and its copies."""
    hasher = hashlib.sha256()
    for package in packages:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in SOURCES and path.is_file():
                hasher.update(f"{path.relative_to(root).as_posix()} {content_digest(path)}\n".encode())
    return hasher.hexdigest()[:12]


def commit(root: Path = ROOT) -> str:
    """The commit of the checkout ``root``, with a mark if files differ from it; ``unknown`` outside of git."""
    if not (root / ".git").exists():
        return "unknown"  # a copy may lie within somebody else's checkout
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
