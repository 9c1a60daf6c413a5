"""Tracking addresses: found wanting before training, in one line, without their secrets."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from study.tracking import check, redact, ui_command
from study.tracking_uri import _schema_revisions, scrub, sqlite_path
from tests.study.bad_server import BadServer
from trainables.errors import UserError

CANARY = "s3cr3tCANARY"


@pytest.fixture
def bad_server() -> Iterator[BadServer]:
    server = BadServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """As far as ``check`` looks: a database whose version is the installed MLflow's."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    (latest,) = _schema_revisions()[1]
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE alembic_version (version_num TEXT)")
        db.execute("INSERT INTO alembic_version VALUES (?)", (latest,))
        db.execute("CREATE TABLE runs (name TEXT)")
    db.close()
    return path.read_bytes()


def test_check_accepts_sqlite(tmp_path: Path, empty_store: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    check(f"sqlite:///{tmp_path}/new/deeper/mlflow.db")
    assert not (tmp_path / "new").exists()
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    check(f"sqlite:///{tmp_path}/mlflow.db")
    (tmp_path / "empty.db").touch()
    monkeypatch.chdir(tmp_path)
    check("sqlite:///empty.db")
    assert sqlite_path("sqlite:////a/b.db?timeout=3") == Path("/a/b.db")


def test_check_refuses(tmp_path: Path, empty_store: bytes) -> None:
    (tmp_path / "file").write_text("not a database, and long enough to be read as a header of one " * 20)
    for version in ("older", "newer", "foreign"):
        (tmp_path / f"{version}.db").write_bytes(empty_store)
        with sqlite3.connect(tmp_path / f"{version}.db") as db:
            if version == "foreign":
                db.execute("DROP TABLE alembic_version")
            else:
                revision = "451aebb31d03" if version == "older" else "ffffffffffff"
                db.execute("UPDATE alembic_version SET version_num = ?", (revision,))
        db.close()
    for uri, words in (
        (f"sqlite:///{tmp_path}", "is a folder"),
        (f"sqlite:///{tmp_path}/file/mlflow.db", "cannot write in"),
        (f"sqlite:///{tmp_path}/file", "file is not a database"),
        ("sqlite:///:memory:", "names no file"),
        (f"sqlite:///{tmp_path}/working_dir_files/copy/mlflow.db", "vanishes with the Ray job"),
        ("sqlite://", "names no file"),
        (f"sqlite:///{tmp_path}/older.db", f"mlflow db upgrade sqlite:///{tmp_path}/older.db"),
        (f"sqlite:///{tmp_path}/newer.db", "newer MLflow"),
        (f"sqlite:///{tmp_path}/foreign.db", "something other than MLflow"),
        ("runs/mlruns", "use sqlite:///runs/mlruns/mlflow.db"),
        ("file:///data/mlruns", "use sqlite:////data/mlruns/mlflow.db"),
        (f"ftp://me:{CANARY}@host", "unknown kind 'ftp'"),
        (f"oracle://me:{CANARY}@host/db", "allowed: sqlite:///PATH"),
        (f"mssql+nodriver://me:{CANARY}@host/db", "needs the Python package nodriver"),
        (f"postgresql+json://me:{CANARY}@127.0.0.1:1/db", "no database answers at 127.0.0.1:1"),
    ):
        with pytest.raises(UserError) as error:
            check(uri, timeout_s=1)
        message = str(error.value)
        assert words in message
        assert message.startswith(f"tracking URI {redact(uri)!r}: ")
        assert "\n" not in message
        assert CANARY not in message


def test_check_tells_servers_apart(bad_server: BadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def complaint(uri: str = bad_server.uri, timeout_s: float = 10) -> str:
        with pytest.raises(UserError) as error:
            check(uri, timeout_s)
        assert "\n" not in str(error.value)
        return str(error.value)

    host = bad_server.uri.removeprefix("http://")
    for status, body, words in (
        (500, b"", "it fails (HTTP 500)"),
        (401, b"", "it wants a user and password (401)"),
        (403, b"Invalid Host header - possible DNS rebinding", f"start it with --allowed-hosts {host}"),
        (403, b"no", "may not read experiments"),
        (404, b"no such page", "not an MLflow server (HTTP 404)"),
        (200, b"<html>log in</html>", "not an MLflow server"),
        (200, b'{"version": "7"}', "not an MLflow server"),
    ):
        bad_server.status, bad_server.body = status, body
        assert words in complaint()
    bad_server.body = b'{"experiments": []}'
    check(bad_server.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "abc")
    check(bad_server.uri)
    assert bad_server.seen[-1] == "Bearer abc"
    check(bad_server.uri.replace("http://", "http://me:pass@"))
    assert bad_server.seen[-1].startswith("Basic ")
    bad_server.silent = True
    assert "no answer within 0.2 s" in complaint(timeout_s=0.2)
    assert "not an address" in complaint("http://")
    bad_server.close()
    assert "connection refused" in complaint()


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://host:5000", "http://host:5000"),
        (f"http://user:{CANARY}@host:5000/a", "http://***@host:5000/a"),
        (f"https://user:{CANARY}@{CANARY}@host", "https://***@host"),
        (f"https://user:{CANARY}/{CANARY}?x@host", "https://***@host"),
        (f"https://host/?token={CANARY}&b={CANARY}#f", "https://host/?token=***&b=***#f"),
        (f"postgresql+psycopg2://me:{CANARY}@db/x?sslmode=a", "postgresql+psycopg2://***@db/x?sslmode=***"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("runs", "runs"),
    ],
)
def test_redact(uri: str, shown: str) -> None:
    assert redact(uri) == shown
    assert CANARY not in scrub(f"GET {uri}/api failed at {uri}", uri)


def test_scrub(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "http://me:pass%2Fword@host"
    assert scrub("no pass/word or pass%2Fword for me2 at http://x:y@host", uri) == (
        "no *** or *** for me2 at http://***@host"
    )
    assert scrub("no such file: /home/me@work/a.db", "sqlite:////home/me@work/a.db").endswith("me@work/a.db")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", CANARY)
    assert scrub(f"denied: {CANARY}", uri) == "denied: ***"


def test_ui_command(tmp_path: Path) -> None:
    command = ui_command("sqlite:///runs/mlflow.db", Path("runs"))
    assert "mlflow ui --host 127.0.0.1 " in command
    assert "--backend-store-uri sqlite:///runs/mlflow.db" in command
    assert ui_command(f"http://u:{CANARY}@host:5000", Path("runs")) == "http://***@host:5000"
