"""Where results are tracked: which addresses work, whether they answer, and how to show them without secrets.

``check`` finds before training what would otherwise fail in the background; it imports neither MLflow nor a
database driver, so that it costs milliseconds. No message here ever holds a password or a token.
"""

from __future__ import annotations

import configparser
import contextlib
import importlib.util
import json
import os
import re
import shlex
import socket
import sqlite3
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from trainables.errors import UserError

ALLOWED = "sqlite:///PATH, http(s)://HOST:PORT or postgresql://..."
DATABASES = {"postgresql": (5432, "psycopg"), "mysql": (3306, "pymysql"), "mssql": (1433, "pyodbc")}


def redact(uri: str) -> str:
    """``uri`` without user, password and query values."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    if "@" in rest and not scheme.startswith(("sqlite", "file")):
        rest = "***@" + rest.rpartition("@")[2]
    return scheme + separator + re.sub(r"([?&][^=&#]*=)[^&#]*", r"\1***", rest)


def scrub(text: str, uri: str) -> str:
    """``text`` (of an exception, say) with every secret of ``uri`` and of MLflow's environment hidden."""
    text = text.replace(uri, redact(uri))
    userinfo = "" if sqlite_path(uri) else uri.partition("://")[2].rpartition("@")[0]
    parts = userinfo.split(":", 1)
    secrets = [userinfo, *parts, *(unquote(p) for p in parts)]
    secrets += re.findall(r"[?&][^=&#]*=([^&#]*)", uri)
    secrets += [os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("PASSWORD", "TOKEN")]
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        if len(secret) > 2:
            text = text.replace(secret, "***")
    return re.sub(r"://[^/\s@]*@", "://***@", text)


def sqlite_path(uri: str) -> Path | None:
    """The file of a ``sqlite:///`` URI; None for any other, and for a database in memory."""
    scheme, separator, rest = uri.partition("://")
    path = rest.partition("?")[0].removeprefix("/")
    if scheme.split("+")[0] != "sqlite" or not separator or path in ("", ":memory:"):
        return None
    return Path(path)


def absolute(uri: str) -> str:
    """``uri`` independent of the working directory."""
    path = sqlite_path(uri)
    if path is None:
        return uri
    scheme, _, rest = uri.partition("://")
    query = rest.partition("?")[1] + rest.partition("?")[2]
    return f"{scheme}:///{path.absolute()}{query}"


def ui_command(tracking_uri: str, storage: Path) -> str:
    """The one line that opens the UI: a command for a database, the address of a server.

    One worker and no background jobs: MLflow's defaults start a dozen processes, none of which a study needs.
    """
    if tracking_uri.startswith(("http://", "https://")):
        return redact(tracking_uri)
    parts = ["mlflow", "ui", "--host", "127.0.0.1", "--workers", "1"]
    parts += ["--backend-store-uri", redact(tracking_uri)]
    parts += ["--artifacts-destination", str(storage / "mlartifacts")]
    return f"MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {shlex.join(parts)}"


def check(tracking_uri: str, timeout_s: float = 15.0) -> None:
    """Can results be tracked at ``tracking_uri``?

    Raises:
        UserError: no; the line names the URI without its secrets, what is wrong, and the fix.
    """
    scheme = tracking_uri.partition(":")[0].split("+")[0].lower() if ":" in tracking_uri else ""
    if scheme in ("http", "https"):
        _check_server(tracking_uri, timeout_s)
    elif scheme == "sqlite":
        _check_sqlite(tracking_uri, timeout_s)
    elif scheme in DATABASES:
        _check_database(tracking_uri, scheme, timeout_s)
    elif scheme in ("", "file"):
        folder = tracking_uri.removeprefix("file:").removeprefix("//") or "runs"
        raise UserError(
            f"tracking URI {tracking_uri!r}: MLflow no longer writes to plain folders (since 3.13); "
            f"allowed: {ALLOWED}; use sqlite:///{folder.rstrip('/')}/mlflow.db"
        )
    else:
        raise UserError(f"tracking URI {redact(tracking_uri)!r}: unknown kind {scheme!r}; allowed: {ALLOWED}")


def _check_sqlite(uri: str, timeout_s: float) -> None:
    def wrong(what: str) -> UserError:
        return UserError(
            f"tracking URI {redact(uri)!r}: {what}; give sqlite:///PATH with a file in a folder you own"
        )

    path = sqlite_path(uri)
    if path is None:
        raise wrong("names no file (a database in memory is lost when the study ends)")
    if path.is_dir():
        raise wrong(f"{path} is a folder")
    if "working_dir_files" in path.absolute().parts:  # a Ray job's throw-away copy of the project
        raise wrong(f"{path.absolute()} vanishes with the Ray job; a file below --storage stays")
    folder = path.absolute().parent
    while not os.path.lexists(folder):
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise wrong(f"cannot write in {folder} ({error.strerror})") from None
    if path.exists():
        _check_sqlite_file(uri, path, timeout_s, wrong)


def _check_sqlite_file(uri: str, path: Path, timeout_s: float, wrong: Any) -> None:
    connection = sqlite3.connect(path, timeout=timeout_s, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        tables = {
            name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        }
        rows = (
            connection.execute("SELECT version_num FROM alembic_version")
            if "alembic_version" in tables
            else []
        )
        versions = {version for (version,) in rows}
        connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        raise wrong(f"cannot use {path} ({error})") from None
    finally:
        connection.close()
    known, latest = _schema_revisions()
    if tables and not versions:
        raise wrong(f"{path} is a database of something other than MLflow")
    if not versions <= known:
        raise UserError(
            f"tracking URI {redact(uri)!r}: made by a newer MLflow than the one installed; "
            "upgrade mlflow, or give another file"
        )
    if versions and versions != latest:
        raise UserError(
            f"tracking URI {redact(uri)!r}: made by an older MLflow; copy the file, then run: "
            f"mlflow db upgrade {redact(uri)}"
        )


def _schema_revisions() -> tuple[set[str], set[str]]:
    """All database revisions that the installed MLflow knows, and its latest, without importing it."""
    spec = importlib.util.find_spec("mlflow")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    known: set[str] = set()
    replaced: set[str] = set()
    for file in (folder / "store/db_migrations/versions").glob("*.py"):
        text = file.read_text()
        known.update(re.findall(r"^revision\b.*?=\s*[\"'](\w+)", text, re.M))
        for line in re.findall(r"^down_revision\b.*?=(.*)$", text, re.M):
            replaced.update(re.findall(r"[\"'](\w+)[\"']", line))
    return known, known - replaced


def _check_database(uri: str, scheme: str, timeout_s: float) -> None:
    port, driver = DATABASES[scheme]
    driver = uri.partition(":")[0].partition("+")[2] or driver
    if importlib.util.find_spec(driver) is None:
        raise UserError(f"tracking URI {redact(uri)!r}: needs the Python package {driver}; install it")
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname or "localhost", parts.port or port
    except ValueError:
        raise UserError(f"tracking URI {redact(uri)!r}: not an address; allowed: {ALLOWED}") from None
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except OSError as error:
        raise UserError(
            f"tracking URI {redact(uri)!r}: no database answers at {host}:{port} "
            f"({error.strerror or error}); start it or correct the address"
        ) from None


def _check_server(uri: str, timeout_s: float) -> None:
    import requests

    def wrong(what: str, fix: str) -> UserError:
        return UserError(f"tracking URI {redact(uri)!r}: {what}; {fix}")

    start = (
        "start it (mlflow server), correct the address, or leave --tracking-uri out to track in a local file"
    )
    headers, auth = _credentials()
    verify: bool | str = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or (
        os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() not in ("true", "1")
    )
    try:
        # The address of the experiments, not /health, which answers whatever host name it is asked under.
        answer = requests.get(
            f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search",
            params={"max_results": "1"},
            headers=headers,
            auth=auth,
            timeout=timeout_s,
            verify=verify,
        )
    except requests.exceptions.SSLError:
        raise wrong("its certificate is not trusted", "set MLFLOW_TRACKING_SERVER_CERT_PATH") from None
    except requests.exceptions.Timeout:
        raise wrong(f"no answer within {timeout_s:g} s", start) from None
    except requests.exceptions.ConnectionError as error:
        refused = "refused" in str(error)
        raise wrong("connection refused" if refused else "cannot be reached", start) from None
    except (requests.exceptions.RequestException, ValueError):
        raise wrong("not an address", f"allowed: {ALLOWED}") from None
    if answer.status_code in (401, 403) and any(
        os.environ.get(f"MLFLOW_TRACKING_{x}") for x in ("AUTH", "AWS_SIGV4")
    ):
        return  # it is there; only MLflow's own plugin can sign requests to it
    if answer.status_code == 401 and auth:
        fix = "correct MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or ~/.mlflow/credentials"
        raise wrong(f"it refuses the user {auth[0]!r} with this password (401)", fix)
    if answer.status_code == 401:
        raise wrong(
            "it wants a user and password (401)",
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
        )
    if answer.status_code == 403 and "Invalid Host header" in answer.text:
        host = urlsplit(uri).netloc.rpartition("@")[2]
        raise wrong(
            "it does not answer under this host name (403 Invalid Host header)",
            f"start it with --allowed-hosts {host}",
        )
    if answer.status_code == 403:
        raise wrong("this user may not read experiments (403)", "ask its administrator for permission")
    if answer.status_code >= 500:
        raise wrong(f"it fails (HTTP {answer.status_code})", "look into its log, or try again later")
    try:
        body = answer.json()
    except json.JSONDecodeError:
        body = None
    if (
        answer.status_code != 200
        or not isinstance(body, dict)
        or body.keys() - {"experiments", "next_page_token"}
    ):
        raise wrong(
            f"something answers, but not an MLflow server (HTTP {answer.status_code})", "correct the address"
        )


def _credentials() -> tuple[dict[str, str], tuple[str, str] | None]:
    """Headers and basic authentication from where MLflow takes them: environment, ~/.mlflow/credentials."""
    file = configparser.ConfigParser()
    with contextlib.suppress(configparser.Error):
        file.read(Path("~/.mlflow/credentials").expanduser())
    user, password = (
        os.environ.get(name.upper()) or file.get("mlflow", name, fallback="") or ""
        for name in ("mlflow_tracking_username", "mlflow_tracking_password")
    )
    if user and password:
        return {}, (user, password)
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return ({"Authorization": f"Bearer {token}"} if token else {}), None
