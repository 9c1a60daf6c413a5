"""A connected Ray: the cluster that is there, or one started for this study and stopped with it.

    with attach_or_start(config.slots, storage) as cluster: ...

Inside a Ray job, under ``ray symmetric-run`` or with RAY_ADDRESS set, the study attaches to that cluster and leaves
it as it was. Otherwise it starts Ray on this machine: dashboard on 127.0.0.1 (Ray Train needs its State API),
token authentication as Ray's default has it, gone when the process ends, however it ends. Its log folder goes too,
unless something failed; then its place is said. What cannot work (no cluster there, another version, a folder that
other nodes do not see, too few resources) is a ``UserError`` before anything is trained.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from study import resources
from study.command import JOB_CONFIG
from trainables.errors import UserError

if TYPE_CHECKING:
    from study.config import SlotsConfig

ROOT = Path(__file__).resolve().parents[1]
OBJECT_STORE_BYTES = 128 << 20  # jobs and records are small; arrays go through files
TEMP_BYTES = 200 << 20  # for Ray's logs and, where shared memory is small, its object store
PROBE_S = 120.0  # for a node to start a worker and look
SOCKET_PATH_ROOM = 40  # Ray's sockets lie some 60 characters below its folder, of 107 a path may have


@dataclass(kw_only=True)
class Cluster:
    """What the study runs on. ``own`` says whether it was started here; who sets ``failed`` wants Ray's logs kept."""

    own: bool
    address: str
    dashboard: str
    text: str
    failed: bool = False


def attaches() -> bool:
    """Whether this process belongs to a Ray cluster that exists."""
    if os.environ.get("RAY_ADDRESS") or os.environ.get(JOB_CONFIG):
        return os.environ.get("RAY_ADDRESS") != "local"
    with contextlib.suppress(OSError):
        return b"symmetric-run" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    return False


@contextlib.contextmanager
def attach_or_start(slots: SlotsConfig, storage: Path) -> Iterator[Cluster]:
    """Ray, connected, with enough for ``slots`` and, on every node, this project and the folder ``storage``.

    If this process is connected already, it stays as it is.

    Raises:
        UserError: no cluster at RAY_ADDRESS, one that cannot run this study, or too few CPUs or GPUs.
    """
    import ray

    with _environment(), _signal_handler():
        if ray.is_initialized():
            yield _look(ray.get_runtime_context().gcs_address, "", slots, storage, own=False)
            return
        own = not attaches()
        if own:
            resources.describe(slots, resources.of_machine())
        earlier, failed = _sessions(), False
        try:
            context = _start() if own else _attach()
            address = os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
            cluster = _look(address, context.dashboard_url or "", slots, storage, own=own)
            yield cluster
            failed = cluster.failed
        except KeyboardInterrupt:
            raise
        except UserError:
            own = own and ray.is_initialized()  # one that does not start has said where its logs are
            raise
        except BaseException:
            failed = True
            raise
        finally:
            ray.shutdown()
            for session in sorted(_sessions() - earlier) if own else ():
                if failed:
                    print(f"Ray's logs are kept in {session / 'logs'}", file=sys.stderr)
                else:
                    shutil.rmtree(session, ignore_errors=True)


def _sessions() -> set[Path]:
    """The folders of this process's own Rays: Ray puts the process id at the end of their names."""
    return set(_ray_folder().glob(f"session_*_{os.getpid()}"))


def _ray_folder() -> Path:
    from ray._common.utils import get_default_ray_temp_dir

    return Path(_temp_dir() or get_default_ray_temp_dir())


def _look(address: str, dashboard: str, slots: SlotsConfig, storage: Path, *, own: bool) -> Cluster:
    supply = resources.of_machine() if own else resources.of_cluster()
    text = resources.describe(slots, supply)
    _require_state_api()
    if not own:
        _require_nodes(storage)
    return Cluster(own=own, address=address, dashboard=dashboard, text=text)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What Ray and its processes shall find in the environment; put back at the end."""
    from study.slots import ray_environment

    before = dict(os.environ)
    for name, value in ray_environment().items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _signal_handler() -> Iterator[None]:
    """``ray.init`` replaces the handler of SIGTERM; a handler that was set before belongs to the command."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread, where Ray sets none either
            signal.signal(signal.SIGTERM, before)


def _start() -> Any:
    import ray

    _require_private_token()
    _require_room()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    for attempt in (1, 2, 3):
        # A port chosen here makes the address known before anything starts, so that Ray Train's clean-up, which
        # asks for the cluster of "this machine", finds this one when several studies run side by side.
        port = _free_port()
        os.environ["RAY_GCS_SERVER_PORT"] = str(port)
        os.environ["RAY_ADDRESS"] = f"{ray.util.get_node_ip_address()}:{port}"
        try:
            return ray.init(
                address="local",
                num_cpus=resources.num_cpus(),
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=_temp_dir(),
            )
        except Exception as error:
            ray.shutdown()
            if attempt == 3:
                raise UserError(
                    f"Ray does not start on this machine ({_one_line(error)}); its logs are in "
                    f"{_ray_folder() / 'session_latest' / 'logs'}"
                ) from error


def _attach() -> Any:
    import ray
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available,
    )

    address = os.environ.get("RAY_ADDRESS") or "auto"
    _require_address(address)
    # Ray looks for a token by itself only where no address is given; without one it tries for 20 seconds.
    logging.getLogger("ray").setLevel(logging.ERROR)
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        return ray.init(
            address="auto",
            runtime_env=_runtime_env(),
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:
        ray.shutdown()
        fix = "start it, correct RAY_ADDRESS, or unset it to use this machine alone"
        if "AuthToken" in _chain(error) or "AuthenticationError" in _chain(error):
            fix = "put its token into RAY_AUTH_TOKEN or ~/.ray/auth_token and set RAY_AUTH_MODE=token"
        raise UserError(f"RAY_ADDRESS = {address!r}: cannot connect ({_one_line(error)}); {fix}") from error


def _require_address(address: str) -> None:
    """Refuse at once what Ray would try for more than a minute."""
    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS = {address!r}: a study runs inside the cluster; submit it with 'ray job submit "
            "--working-dir . -- python study/run.py ...', or unset RAY_ADDRESS to use this machine alone"
        )
    host, _, port = address.rpartition(":")
    if address == "auto" or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS = {address!r}: no Ray cluster answers there ({error.strerror or error}); start it, "
            "correct RAY_ADDRESS, or unset it to use this machine alone"
        ) from None


def _runtime_env() -> dict[str, Any]:
    """Where workers find the project: the uploaded folder of a job, or the same path on every node."""
    given: Mapping[str, Any] = (json.loads(os.environ.get(JOB_CONFIG) or "{}") or {}).get("runtime_env") or {}
    if given.get("working_dir") or "PYTHONPATH" in (given.get("env_vars") or {}):
        return {}
    return {"env_vars": {"PYTHONPATH": str(ROOT)}}


def _require_private_token() -> None:
    """Ray writes its token readable for all users of the machine; whoever has it can run code as this one.

    Raises:
        UserError: token authentication is switched off.
    """
    if (mode := os.environ.get("RAY_AUTH_MODE") or "token") != "token":
        raise UserError(
            f"RAY_AUTH_MODE = {mode!r}: Ray's ports are open to the network, and without a token whoever reaches them "
            "can run code as you; unset RAY_AUTH_MODE"
        )
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = Path("~/.ray/auth_token").expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # no home to keep it in


def _require_room() -> None:
    """Ray on a full disk starts, and hangs later."""
    folder = _ray_folder()
    while not folder.exists():
        folder = folder.parent
    if (free := shutil.disk_usage(folder).free) < TEMP_BYTES:
        raise UserError(
            f"{_ray_folder()}: {free / 1e6:.0f} MB free, Ray's temporary files need {TEMP_BYTES / 1e6:.0f} MB; make "
            "room, or set RAY_TMPDIR to a folder on another disk"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _temp_dir() -> str | None:
    """None (Ray's own choice) unless that is too long a path for its sockets."""
    chosen = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return "/tmp/ray" if len(chosen) > SOCKET_PATH_ROOM else None


def _require_state_api() -> None:
    from ray.util.state import list_nodes

    try:
        list_nodes(limit=1, timeout=30)
    except Exception as error:
        raise UserError(
            f"Ray's State API does not answer ({_one_line(error)}), and Ray Train hangs without it; start the head "
            "with its dashboard (pip package ray[default], no --include-dashboard=false)"
        ) from error


def _require_nodes(storage: Path) -> None:
    """Each node that is up can import this project and write where the results go."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def look(folder: str, token: str, node: str) -> str:
        """What is wrong on this node. Nested, so that it travels by value: the project may be missing there."""
        import importlib.util
        from pathlib import Path

        if importlib.util.find_spec("trainables") is None:
            return "cannot import this project"
        try:
            if token not in (Path(folder) / f"probe-{token}").read_text():
                return f"another file system at {folder}"
            (Path(folder) / f"probe-{token}-{node}").touch()
        except OSError as error:
            return f"cannot use {folder} ({error.strerror})"
        return ""

    token = uuid.uuid4().hex[:8]
    storage.mkdir(parents=True, exist_ok=True)
    (storage / f"probe-{token}").write_text(token)
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    probe = ray.remote(num_cpus=0, max_retries=0)(look)
    try:
        answers = {
            node: probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                str(storage), token, node
            )
            for node in nodes
        }
        ray.wait(list(answers.values()), num_returns=len(answers), timeout=PROBE_S)
        for node, answer in answers.items():
            try:
                wrong = ray.get(answer, timeout=0)
            except Exception as error:
                wrong = f"runs nothing ({_one_line(error)})"
            if wrong:
                raise UserError(f"Ray node {nodes[node]}: {wrong}; {_node_fix(wrong)}")
    finally:
        for file in storage.glob(f"probe-{token}*"):
            file.unlink(missing_ok=True)


def _node_fix(wrong: str) -> str:
    if "project" in wrong:
        return f"put it under {ROOT} there too, or submit with 'ray job submit --working-dir . -- ...'"
    if "runs nothing" in wrong:
        return "look at 'ray status' and at that node's logs"
    return "give --storage a folder that all nodes share"


def _chain(error: BaseException | None) -> str:
    text = ""
    while error is not None:
        text, error = f"{text} {error!r}", error.__cause__ or error.__context__
    return text


def _one_line(error: BaseException, limit: int = 200) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
