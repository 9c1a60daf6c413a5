"""``mlflow/server.sh`` for real: PostgreSQL, users with passwords, host names that are allowed and one that is not.

Studies are told by their trackers, without training: three processes at once write to the one server.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from study import trial_store
from study.tracking_uri import check
from tests.processes import end, free_ports, wait_for
from trainables.errors import UserError

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
ADMIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "test-%40-password"}
STUDY = """
import sys
from pathlib import Path
from tests.study.mirrored_study import Study, job, record, result
name, uri, root = sys.argv[1:]
study = Study(Path(root), uri, name)
study.json["identity"] = name
study.tracker.start(study.json, "")
for number in range(2):
    one = job(f"t{number:04d}")
    study.begin(one)
    for epoch in (1, 2):
        study.report(one, epoch, table=epoch == 2)
    study.end(one, result(2))
study.tracker.finish("FINISHED")
sys.exit(study.tracker.close(240))
"""


SEARCH = """
import sys
from pathlib import Path
from study.config import StudyConfig, resolve
from study.folder import StudyFolder
from study.search import Search
config = resolve(StudyConfig(), ["search.recipes=[]"], trials=int(sys.argv[2]))
search = Search(config, StudyFolder(Path(sys.argv[1])), space=lambda trial: {"x": trial.suggest_float("x", 0.0, 1.0)},
                recipes={}, cache_dir=Path(sys.argv[1]))
while (job := search.ask()) is not None:
    result = {"state": "finished", "reason": None, "epoch": 1, "metrics": {"official": 50 + job["params"]["x"]}}
    search.folder.write_result(job["id"], result)
    search.tell(job["id"], result)
assert search.over
"""


def program(name: str) -> str | None:
    """Where it is; Debian keeps PostgreSQL's own away from PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *map(str, folders)]))


@pytest.fixture(scope="module")
def database(short_folder: Path) -> Iterator[str]:
    """The URI of a PostgreSQL of its own, without the database's name."""
    with postgresql(short_folder) as made:
        yield made.uri


@dataclass
class Postgresql:
    """A server with password authentication that can be stopped and started again."""

    uri: str
    command: list[str]
    options: dict[str, object]
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, start_new_session=True, **self.options)  # type: ignore[call-overload]
        wait_for(lambda: answers(f"{self.uri}/postgres"), "PostgreSQL's start", 60)

    def stop(self) -> None:
        """Break every connection off, as a restart of its machine does."""
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)
            end(self.process)


@contextlib.contextmanager
def postgresql(short_folder: Path) -> Iterator[Postgresql]:
    if not (program("initdb") and program("postgres")):
        if os.environ.get("CI"):
            pytest.fail("PostgreSQL is missing, which .ci/run installs")
        pytest.skip("needs PostgreSQL's initdb and postgres (Debian: postgresql)")
    owner = (
        {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
    )  # it refuses to run as root
    (port,) = free_ports(1)
    data, password = short_folder / "data", short_folder / "password"
    short_folder.chmod(0o755)
    password.write_text("p@ss")
    data.mkdir()
    if owner:
        shutil.chown(data, **owner)
        shutil.chown(password, **owner)
    made = [
        program("initdb"),
        "-D",
        str(data),
        "-U",
        "study",
        "-A",
        "scram-sha-256",
        f"--pwfile={password}",
        "-N",
    ]
    subprocess.run(made, check=True, capture_output=True, **owner)  # type: ignore[call-overload]
    settings = ["fsync=off", "listen_addresses=127.0.0.1", f"unix_socket_directories={data}"]
    started = [
        program("postgres"),
        "-D",
        str(data),
        "-p",
        str(port),
        *(w for s in settings for w in ("-c", s)),
    ]
    uri = f"postgresql://study:p%40ss@127.0.0.1:{port}"
    with open(short_folder / "postgres.log", "wb") as log:
        server = Postgresql(uri, started, {"stdout": log, "stderr": log, **owner})
        try:
            server.start()
            yield server
        finally:
            server.stop()


def answers(uri: str) -> bool:
    import psycopg

    with contextlib.suppress(psycopg.OperationalError):
        psycopg.connect(uri).close()
        return True
    return False


def execute(uri: str, statement: str) -> list[tuple[object, ...]]:
    import psycopg

    connection = psycopg.connect(uri)
    try:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


@dataclass
class Server:
    port: int
    database: str
    artifacts: Path

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture(scope="module")
def server(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Started by the script, as its second command says."""
    folder = tmp_path_factory.mktemp("mlflow")
    (port,) = free_ports(1)
    execute(f"{database}/postgres", "CREATE DATABASE mlflow")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MLFLOW_BACKEND_STORE_URI": f"{database}/mlflow",
        "MLFLOW_ARTIFACTS_DESTINATION": str(folder / "artifacts"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN["MLFLOW_TRACKING_PASSWORD"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "test" * 8,
        "MLFLOW_HOST": "0.0.0.0",
        "MLFLOW_PORT": str(port),
        "TMPDIR": str(folder),
    }
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            ["bash", "cluster/mlflow/server.sh"],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    made = Server(port, f"{database}/mlflow", folder / "artifacts")

    def up() -> bool:
        assert process.poll() is None, (folder / "server.log").read_text()
        try:
            check(made.uri, timeout_s=10)
        except UserError as error:
            return "401" in str(error)
        return True

    try:
        wait_for(up, "the server's start", 180)
        yield made
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        assert not list(folder.glob("tmp.*")), "the file with the database's password goes with the server"
    finally:
        end(process)


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ADMIN.items():
        monkeypatch.setenv(name, value)


def test_several_studies_at_once(server: Server, tmp_path: Path) -> None:
    environment = os.environ | ADMIN | {"PYTHONPATH": str(ROOT)}
    names = ["one", "two", "three"]
    studies = [
        subprocess.Popen(
            [sys.executable, "-c", STUDY, name, server.uri, str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in names
    ]
    said = [study.communicate(timeout=280)[0] for study in studies]
    assert [study.returncode for study in studies] == [0, 0, 0], said
    rows = execute(
        server.database,
        "SELECT e.name, t.value, count(*) FROM runs r JOIN experiments e USING (experiment_id) "
        "JOIN tags t ON t.run_uuid = r.run_uuid AND t.key = 'role' WHERE r.status = 'FINISHED' GROUP BY 1, 2",
    )
    assert sorted(rows) == sorted(
        (name, role, n) for name in names for role, n in (("study", 1), ("trial", 2))
    )
    metrics = execute(server.database, "SELECT count(*) FROM metrics WHERE key = 'official'")
    assert metrics == [(3 * 2 * 2,)]
    assert len(list(server.artifacts.rglob("knn.json"))) == 3 * 2


def test_without_a_password_or_with_a_wrong_one_it_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UserError, match=r"it wants a user and password \(401\); set MLFLOW_TRACKING_USERNAME"
    ):
        check(server.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-password")
    with pytest.raises(UserError, match=r"it refuses the user 'admin' with this password \(401\)") as refused:
        check(server.uri)
    assert "wrong-password" not in str(refused.value)


def test_a_wrong_password_ends_the_command_with_one_line(server: Server, tmp_path: Path) -> None:
    environment = os.environ | ADMIN | {"MLFLOW_TRACKING_PASSWORD": "wrong-password"}
    asked = [sys.executable, "study/run.py", "--tracking-uri", server.uri, "--storage", str(tmp_path)]
    started = time.monotonic()
    done = subprocess.run(
        asked, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: tracking URI")
    assert len(done.stderr.splitlines()) == 1
    assert time.monotonic() - started < 30, "before Ray starts"


@pytest.mark.usefixtures("admin")
def test_it_answers_only_under_the_names_allowed(server: Server) -> None:
    check(server.uri)
    check(f"http://localhost:{server.port}")
    with pytest.raises(UserError, match=rf"start it with --allowed-hosts 127\.0\.0\.2:{server.port}"):
        check(f"http://127.0.0.2:{server.port}")


def test_several_searches_share_the_same_postgresql(database: str, tmp_path: Path) -> None:
    execute(f"{database}/postgres", "CREATE DATABASE optuna")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "STUDY_OPTUNA_URL": f"{database}/optuna"}
    names = ["one", "two", "three"]
    for trials in (3, 5):  # the second time each goes on
        searches = [
            subprocess.Popen(
                [sys.executable, "-c", SEARCH, str(tmp_path / name), str(trials)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for name in names
        ]
        said = [search.communicate(timeout=200)[0] for search in searches]
        assert [search.returncode for search in searches] == [0, 0, 0], said
        rows = execute(
            f"{database}/optuna",
            "SELECT split_part(s.study_name, '-', 1), count(*) FROM trials t JOIN studies s USING (study_id) "
            "WHERE t.state = 'COMPLETE' GROUP BY 1",
        )
        assert sorted(rows) == sorted((name, trials) for name in names)


def test_a_search_waits_for_a_postgresql_that_is_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.study.test_trial_store import Answer, end, open_search

    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    try:
        with postgresql(folder) as server:
            monkeypatch.setenv("STUDY_OPTUNA_URL", f"{server.uri}/postgres")
            search = open_search(tmp_path / "one")
            for number in range(3):
                server.stop()
                with Answer(server.start):
                    job = search.ask()
                assert job is not None
                assert job["id"] == f"t{number:04d}"
                server.stop()
                with Answer(server.start):
                    search.report(job["id"], 1, 50.0)
                    end(search, job)
            assert search.ask() is None
            search.study._storage._backend.engine.dispose()  # type: ignore[attr-defined]
            rows = execute(f"{server.uri}/postgres", "SELECT number, state FROM trials ORDER BY number")
            assert [(number, str(state)) for number, state in rows] == [(n, "COMPLETE") for n in range(3)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_wrong_password_for_trials_is_one_line(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDY_OPTUNA_URL", database.replace("p%40ss", "test-wrong") + "/postgres")
    with pytest.raises(UserError, match="password authentication failed") as refused:
        trial_store.check()
    assert "test-wrong" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_server_says_what_it_lacks() -> None:
    lean = {"PATH": os.environ["PATH"], "MLFLOW_BACKEND_STORE_URI": "postgresql://nobody@localhost/mlflow"}
    done = subprocess.run(
        ["bash", "cluster/mlflow/server.sh"], cwd=ROOT, env=lean, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "MLFLOW_ARTIFACTS_DESTINATION: is not set: a folder or a bucket" in done.stderr
