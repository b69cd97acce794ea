"""``surefoot doctor``: what is installed, whether the store is sound, and what may go wrong here."""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import click

from framework import __version__
from framework._secrets import mask
from framework.errors import SurefootError
from framework.runner.cli.app import Command
from framework.runner.cli.exits import Exit
from framework.runner.cli.output import Cell, Screen, Styled
from framework.runner.cli.settings import STORAGE_VARIABLE, Settings
from framework.runner.cli.stores import all_runs, file_of, is_default, keys_of, storage_url
from framework.runner.cli.text import ago, counted, shown_url, size
from framework.runner.cli.verifying import KEEP_LOG
from framework.schemas.run import RunState
from framework.storage.backend import Storage, open_storage
from framework.storage.encryption import EncryptedStorage
from framework.storage.records import RunRecord
from framework.storage.repair import of_lease, span
from framework.storage.sealed import KEY_FILE_VARIABLE, KEYS_VARIABLE
from framework.storage.sqlite_wal import lost_commits

Verdict = Literal["ok", "off", "warning", "problem"]

_EXTRAS = {
    "anthropic": ("anthropic", "models of Anthropic"),
    "openai": ("openai", "models of OpenAI and of endpoints like it"),
    "litellm": ("litellm", "models of other vendors"),
    "mcp": ("mcp", "tools of MCP servers"),
    "postgres": ("psycopg", "runs in PostgreSQL"),
    "encryption": ("cryptography", "runs encrypted in their store"),
    "sandbox": ("pydantic-monty", "code_execution steps of plans"),
}
"""Each extra: the distribution that it brings, and what for."""

_KEYS = ("ANTHROPIC_API_KEY", "OPENAI_API_KEY")
_OTHERS = ("OPENAI_BASE_URL", "ANTHROPIC_BASE_URL", "SUREFOOT_DEBUG", "NO_COLOR", "XDG_DATA_HOME")

_NETWORK = frozenset("nfs nfs4 cifs smb3 smbfs 9p afs ceph glusterfs lustre fuse.sshfs fuse.rclone fuse.s3fs".split())
"""File systems over a network: their locks and syncs are not what SQLite relies on (sqlite.org/howtocorrupt.html)."""

_OLDEST_SQLITE = (3, 35)
_VERIFIED_BYTES = 64 * 1024 * 1024
"""A larger store is read from end to end only when asked: that takes a while."""
_LITTLE_ROOM = 200 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at: what it is, how it is, and for a warning or problem what to do."""

    name: str
    verdict: Verdict
    text: str
    advice: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@click.command("doctor", cls=Command)
@click.option("--verify/--no-verify", default=None, help="Read the whole store, or leave that out. Default: if small.")
@click.pass_obj
def doctor(settings: Settings, verify: bool | None) -> int:
    """Check the installation, the store and the environment. Exit code 1 when there is a problem."""
    sections = {
        "installation": list(_installation()),
        "store": list(_store(settings, verify)),
        "environment": list(_environment()),
    }
    screen = settings.screen
    checks = [check for section in sections.values() for check in section]
    problems = sum(check.verdict == "problem" for check in checks)
    warnings = sum(check.verdict == "warning" for check in checks)
    if screen.json:
        listed = {name: [asdict(check) for check in section] for name, section in sections.items()}
        screen.document({"ok": problems == 0, "problems": problems, "warnings": warnings, **listed})
        return Exit.FAILED if problems else Exit.DONE
    width = 2 + max(len(check.name) for check in checks)
    for index, (name, section) in enumerate(sections.items()):
        if index:
            screen.say("")
        screen.say(Styled(name, "bold"))
        screen.fields([_row(screen, check) for check in section], indent=2, width=width)
    screen.say("")
    if problems:
        screen.say(Styled(f"{counted(problems, 'problem')}, {counted(warnings, 'warning')}.", "bold red"))
    else:
        screen.say(Styled("No problems." if not warnings else f"No problems, {counted(warnings, 'warning')}.", "green"))
    return Exit.FAILED if problems else Exit.DONE


def _row(screen: Screen, check: Check) -> tuple[Cell, Cell]:
    state = {"ok": "completed", "problem": "failed"}.get(check.verdict, check.verdict)
    text = check.text if check.advice is None else f"{check.text}\n{check.advice}"
    style = {"warning": "yellow", "problem": "bold red", "off": "bright_black"}.get(check.verdict, "")
    return Styled(f"{screen.mark(state)} {check.name}", style or "green"), Styled(text, style)


# --- installation -----------------------------------------------------------------------------------------------------


def _installation() -> Iterator[Check]:
    yield Check("surefoot", "ok", __version__, facts={"version": __version__})
    yield Check("python", "ok", f"{platform.python_version()} ({sys.executable})")
    linked = sqlite3.sqlite_version
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        wanted = ".".join(map(str, _OLDEST_SQLITE))
        advice = f"This library needs SQLite {wanted} or newer; use a newer build of Python."
        yield Check("sqlite", "problem", linked, advice)
    else:
        yield Check("sqlite", "ok", linked)
    for extra, (distribution, purpose) in _EXTRAS.items():
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            advice = f"pip install 'surefoot[{extra}]'"
            yield Check(extra, "off", f"not installed: {purpose}  {advice}", facts={"installed": None, "pip": advice})
        else:
            yield Check(extra, "ok", f"{version}: {purpose}", facts={"installed": version})


# --- the store --------------------------------------------------------------------------------------------------------


def _store(settings: Settings, verify: bool | None) -> Iterator[Check]:
    try:
        url = storage_url(settings)
    except SurefootError as error:
        yield Check("url", "problem", str(error))
        return
    named = "the default" if is_default(settings) else "--storage" if settings.storage else f"${STORAGE_VARIABLE}"
    yield Check("url", "ok", f"{_without_password(url)} ({named})", facts={"url": _without_password(url)})
    path = file_of(url)
    if path is not None:
        yield from _place(path)
        if not os.path.exists(path):
            yield _to_be_made(path)
            return
    if url.startswith("sqlite:") and path is not None:
        if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
            yield Check("writing", "problem", f"{path} or its folder cannot be written", "Change its owner or mode.")
            return
        lost = lost_commits(path)
        if lost is not None:  # opening it would drop what cannot be read, and with it what could be saved by hand
            yield Check("log", "problem", lost, KEEP_LOG)
            return
        yield from _sqlite(path)
    try:
        with open_storage(url, keys_of(settings)) as storage:
            yield _encryption(storage)
            yield from _contents(storage)
            yield from _left_over(storage)
            yield from _verified(storage, verify, path)
    except SurefootError as error:
        yield Check("contents", "problem", mask(str(error)))


def _nearest(path: Path) -> Path:
    """The nearest folder above ``path``, or other thing in its way, that is there."""
    folder = path.absolute().parent
    while not os.path.lexists(folder):
        folder = folder.parent
    return folder


def _to_be_made(path: Path) -> Check:
    """Whether a store that is not there can be made, as `surefoot run` would."""
    folder = _nearest(path)
    try:
        # Tried: modes do not tell of read-only mounts, quotas, access lists or file systems that have no folders.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".surefoot-doctor-"):
            pass
    except OSError as error:
        advice = f"Name another place: --storage URL, or the variable {STORAGE_VARIABLE}; or change {folder}."
        return Check("contents", "problem", f"the store cannot be made in {folder}: {error.strerror}", advice)
    return Check("contents", "off", "nothing yet: `surefoot run` makes the store")


def _place(path: Path) -> Iterator[Check]:
    folder = path.absolute() if os.path.exists(path) else _nearest(path)
    kind = file_system_of(folder)
    if kind in _NETWORK:
        yield Check(
            "file system",
            "warning",
            f"{kind}, over a network",
            "Locks and syncs of network file systems can lose or damage a store; put it on a local disk.",
        )
    elif kind is not None:
        yield Check("file system", "ok", kind)
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield Check("free space", "warning", f"cannot be told: {error.strerror}")
        return
    if free < _LITTLE_ROOM:
        advice = "A full disk stops runs; what they had committed stays. Make room, or name another store."
        yield Check("free space", "warning", size(free), advice)
    else:
        yield Check("free space", "ok", size(free))
    if os.path.exists(path) and os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
        reachable = stat.S_IMODE(path.absolute().parent.stat().st_mode) & 0o011
        if reachable:
            advice = f"Runs hold what users and models said. Keep it to yourself: chmod 700 {path.absolute().parent}"
            yield Check("privacy", "warning", "other users of this machine can read the store", advice)


def file_system_of(path: Path) -> str | None:
    """The type of the file system that ``path`` is on, by the system's table of mounts, if it has one."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    best, kind = "", ""
    resolved = str(path.resolve())
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        mount = fields[1].replace("\\040", " ")
        inside = resolved == mount or resolved.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, fields[2]
    return kind or None


def _sqlite(path: Path) -> Iterator[Check]:
    """The file itself, read without the library: also when the library refuses it."""
    try:
        connection = sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=rw", uri=True, timeout=5)
    except sqlite3.Error as error:
        yield Check("opening", "problem", str(error))
        return
    try:
        mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
        if mode == "wal":
            yield Check("journal", "ok", "WAL")
        else:
            advice = "Opening it with this library sets WAL, unless the file system does not allow it."
            yield Check("journal", "warning", mode, advice)
        row = connection.execute("SELECT value FROM meta WHERE name = 'schema_version'").fetchone()
        yield Check("version", "ok", str(row[0]) if row else "none", facts={"schema_version": row[0] if row else None})
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
        yield Check("writing", "ok", "possible")
    except sqlite3.Error as error:
        busy = "locked" in str(error)
        who = "Another process writes for long, or hangs; see who has the file open."
        yield Check("reading", "warning" if busy else "problem", str(error), who if busy else None)
    finally:
        connection.close()
    files = [each for each in (path, Path(f"{path}-wal"), Path(f"{path}-shm")) if each.exists()]
    closed = [each for each in files if not os.access(each, os.R_OK | os.W_OK)]
    if closed:
        yield Check("files", "problem", f"{closed[0]} cannot be read or written", "Change its owner or mode.")
    yield Check("size", "ok", size(sum(each.stat().st_size for each in files)))


def _contents(storage: Storage) -> Iterator[Check]:
    counts: dict[str, int] = {}
    newest = 0.0
    for run in all_runs(storage):
        counts[run.state.value] = counts.get(run.state.value, 0) + 1
        newest = max(newest, run.updated_at)
    listing = ", ".join(f"{counts[state.value]} {state.value}" for state in RunState if state.value in counts)
    yield Check("runs", "ok", listing or "none", facts={"runs": counts})
    if crashed := counts.get(RunState.CRASHED.value, 0):
        what = "1 run has lost its process" if crashed == 1 else f"{counted(crashed, 'run')} have lost their processes"
        yield Check("crashed", "warning", what, f"`surefoot recover` resumes {'it' if crashed == 1 else 'them'}.")
    ahead = newest - time.time()
    if ahead > 5:
        yield Check(
            "clock",
            "warning",
            f"the newest run was written {ago(ahead).removesuffix(' ago')} in the future",
            "This machine's clock went back. Leases last longer than they should until it has caught up.",
        )


def _encryption(storage: Storage) -> Check:
    if not isinstance(storage, EncryptedStorage):
        return Check("encryption", "off", "none", facts={"keys": []})
    keys = storage.keys
    others = f"; to decrypt: {', '.join(keys.ids[:-1])}" if len(keys) > 1 else ""
    return Check("encryption", "ok", f"AES-256-GCM, key {keys.newest}{others}", facts={"keys": list(keys.ids)})


def _left_over(storage: Storage) -> Iterator[Check]:
    """Leases that nobody can have meant, and what no run needs."""
    mends = "`surefoot checkpoints verify --repair` mends it, and says what it does."
    now = time.time()
    leases = [(run, found) for run in all_runs(storage) if (found := of_lease(run, now)) is not None]
    wrong = [found for _, found in leases if found.serious]
    held = [run for run, found in leases if found.repair is not None]
    if wrong:
        advice = mends if wrong[0].repair else wrong[0].advice
        yield Check("leases", "problem", f"{wrong[0].run_id}: {wrong[0].problem}", advice, {"wrong": len(wrong)})
    elif held:
        yield _held(held, now)
    strays = storage.find_strays()
    if any(not stray.harmless for stray in strays):
        first = next(stray for stray in strays if not stray.harmless)
        yield Check("strays", "problem", f"{first.name}: {first.problem}", mends, {"strays": len(strays)})
    elif strays:
        what = f"{counted(len(strays), 'left-over')} of crashes; first {strays[0].name}: {strays[0].problem}"
        yield Check("strays", "warning", what, mends, {"strays": len(strays)})


def _held(runs: Sequence[RunRecord], now: float) -> Check:
    """Runs that are held by processes that are gone: whoever is elsewhere cannot tell, and waits."""
    left = span(max(run.lease_until for run in runs) - now)
    if one := len(runs) == 1:
        what = f"1 run is held by a process that is gone, for {left} more"
    else:
        what = f"{counted(len(runs), 'run')} are held by processes that are gone, for up to {left} more"
    unfinished = any(run.state in (RunState.RUNNING, RunState.CRASHED) for run in runs)
    taker = "`surefoot recover`" if unfinished else "A resume"
    it = "it" if one else "them"
    advice = (
        f"{taker} takes {it} over at once on this machine; others wait for the lease{'' if one else 's'}, or release "
        f"{it}: `surefoot checkpoints verify --repair`."
    )
    return Check("leases", "warning", what, advice, {"held": len(runs)})


def _verified(storage: Storage, verify: bool | None, path: Path | None) -> Iterator[Check]:
    wanted = verify
    if wanted is None:
        wanted = path is not None and path.is_file() and path.stat().st_size <= _VERIFIED_BYTES
    if not wanted:
        yield Check("verify", "off", "not read from end to end; `surefoot doctor --verify` does")
        return
    report = storage.verify()
    counts = {"run": report.runs, "checkpoint": report.checkpoints, "chunk": report.chunks}
    read = ", ".join(counted(count, noun) for noun, count in counts.items())
    if report.ok:
        yield Check("verify", "ok", f"{read}: all sound")
        return
    first = report.damage[0]
    yield Check(
        "verify",
        "problem",
        f"{read}: {len(report.damage)} damaged; first {first.where} of run {first.run_id}",
        "`surefoot checkpoints verify` lists them. Resumes use the newest checkpoint that can be read.",
        {"damage": len(report.damage)},
    )


# --- environment ------------------------------------------------------------------------------------------------------


def _environment() -> Iterator[Check]:
    for name in _KEYS:
        present = bool(os.environ.get(name))
        yield Check(name, "ok" if present else "off", "set" if present else "not set", facts={"set": present})
    if os.environ.get(KEYS_VARIABLE):
        yield Check(KEYS_VARIABLE, "ok", "set", facts={"set": True})  # its keys are shown nowhere
    for name in (STORAGE_VARIABLE, KEY_FILE_VARIABLE, *_OTHERS):
        if os.environ.get(name):
            yield Check(name, "ok", _without_password(os.environ[name]))
    now = time.time()
    moment = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < 1_700_000_000:  # November 2023, before this library was
        yield Check("clock", "problem", moment, "The system's clock is not set; leases and times of runs need it.")
    else:
        yield Check("clock", "ok", moment)
    encoding = (sys.stdout.encoding or "").lower()
    if encoding.replace("-", "") != "utf8":
        yield Check("encoding", "warning", encoding, "Other characters are shown as escapes. Set PYTHONUTF8=1.")


def _without_password(text: str) -> str:
    return mask(shown_url(text) if "://" in text else text)
