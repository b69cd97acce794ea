"""Which store a command works on, and which run a short id means."""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from framework.errors import RunNotFound, SurefootError
from framework.runner.cli.exits import CommandError, not_found, usage_error
from framework.runner.cli.settings import STORAGE_VARIABLE, Settings
from framework.runner.cli.text import ago, command_line, shown_url
from framework.schemas.run import RunState
from framework.storage.backend import Storage, open_storage
from framework.storage.ownership import is_alive
from framework.storage.records import RunRecord
from framework.storage.sealed import KEY_FILE_VARIABLE as KEY_FILE
from framework.storage.sealed import KEYS_VARIABLE as KEYS

if TYPE_CHECKING:
    from framework.storage.encryption_keys import KeyRing

LATEST = "latest"

RESUMABLE = (RunState.PAUSED, RunState.FAILED, RunState.CANCELLED, RunState.CRASHED)
"""States of a run that can go on: not finished, and nobody works on it."""

_PAGE = 500
_SHOWN = 8


def storage_url(settings: Settings) -> str:
    """The URL of the store: ``--storage``, else ``$SUREFOOT_STORAGE``, else the user's own."""
    from framework.runner.places import default_storage_url  # noqa: PLC0415 - it is cheap, but not needed for --help

    return settings.storage or default_storage_url()


def is_default(settings: Settings) -> bool:
    """Whether the store is the user's own, which nobody named."""
    return not (settings.storage or os.environ.get(STORAGE_VARIABLE, "").strip())


def file_of(url: str) -> Path | None:
    """The file or folder behind a storage URL, or ``None`` when it has none."""
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.scheme == "sqlite" and len(path) > 1:
        return Path(path[1:] if path.startswith("/") else path)
    return Path(path) if parts.scheme == "file" and path else None


def open_store(settings: Settings, *, create: bool = False) -> Storage:
    """The store of this command; close it (``with open_store(settings) as storage:``).

    ``create`` makes one that does not exist; without it only the user's own is made, and a URL that leads nowhere is an
    error: a store misspelt must not look like an empty one. Raises ``CommandError``, ``StorageError``.
    """
    url = storage_url(settings)
    if url.startswith("memory:"):
        raise usage_error(
            "--storage memory:// would be gone with this command; name a file, such as sqlite:///runs.db, or run "
            "without a store: surefoot run --no-checkpoints."
        )
    path = file_of(url)
    if path is not None and not os.path.exists(path):  # Path.exists raises where it may not look
        if is_default(settings):
            _make_private(path.parent)
        elif not create:
            raise not_found(
                f"There is no store at {shown_url(url)} ({path.absolute()} does not exist). Check --storage or "
                f"${STORAGE_VARIABLE}; `surefoot run` makes a store that is not there."
            )
    try:
        return open_storage(url, keys_of(settings))
    except SurefootError as error:
        if shown_url(url) == url:
            raise
        raise CommandError(str(error).replace(url, shown_url(url))) from None


def keys_of(settings: Settings) -> KeyRing | None:
    """The encryption keys of this command: ``--key-file``, else those of the environment; ``None`` without any.

    Raises ``StorageError``.
    """
    if not settings.key_file and not any(os.environ.get(name, "").strip() for name in (KEYS, KEY_FILE)):
        return None
    from framework.storage.encryption_keys import KeyRing  # noqa: PLC0415 - few stores are encrypted

    return KeyRing.from_file(settings.key_file) if settings.key_file else KeyRing.from_environment()


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(
            f"The folder for runs, {folder}, cannot be made: {error.strerror}. Name another place: --storage URL, or "
            f"the variable {STORAGE_VARIABLE}."
        ) from error


def find_run(storage: Storage, given: str, *, latest: Sequence[RunState] | None = None) -> RunRecord:
    """The run that ``given`` means: its id, the beginning of exactly one id, or ``latest``.

    ``latest`` is the newest run that is no part of another, of those in the states ``latest`` when given. The record's
    state is as ``standing`` says. Raises ``CommandError``: exit code 4 when there is none, 2 when several begin so
    (they are listed).
    """
    if given == LATEST:
        for record in all_runs(storage, None if latest is None else {*latest, RunState.RUNNING}):
            if record.parent_run_id is None and (latest is None or record.state in latest):
                return record
        raise _nothing_latest(storage, latest)
    exact = storage.find_run(given)
    if exact is not None:
        return standing(exact)
    # One indexed query decides; only who finds nothing pays for reading every id.
    if len(matching := [standing(record) for record in storage.find_runs(given, limit=2)]) == 1:
        return matching[0]
    if matching:
        raise _ambiguous(given, [record for record in all_runs(storage) if record.run_id.startswith(given)])
    ids = [record.run_id for record in all_runs(storage)]
    close = difflib.get_close_matches(given, [*ids, LATEST], n=3, cutoff=0.6)
    meant = f" Did you mean {' or '.join(close)}?" if close else " `surefoot runs list` shows those it has."
    raise not_found(f"{RunNotFound(given)}{meant}")


def all_runs(storage: Storage, states: Collection[RunState] | None = None) -> Iterator[RunRecord]:
    """Every run, newest first, read page by page; ``states`` are the store's. Their state is as ``standing`` says."""
    before: RunRecord | None = None
    wanted = None if states is None else list(states)
    while page := storage.list_runs(wanted, limit=_PAGE, before=before):
        yield from map(standing, page)
        before = page[-1]


def standing(record: RunRecord) -> RunRecord:
    """The record with its state as it can be told from here: a running run whose process is certainly gone is
    crashed, though its lease lasts a little longer."""
    if record.state is RunState.RUNNING and (record.owner is None or is_alive(record.owner) is False):
        return replace(record, state=RunState.CRASHED)
    return record


def _nothing_latest(storage: Storage, states: Sequence[RunState] | None) -> CommandError:
    if states is None or not storage.list_runs(limit=1):
        return not_found("There are no runs in this store yet. `surefoot run AGENT` starts one.")
    if storage.list_runs([RunState.RUNNING], limit=1):
        return not_found("No run waits to go on; the unfinished ones are running. `surefoot runs list` shows them.")
    return not_found("No run waits to go on: all are completed. `surefoot runs list` shows them.")


def _ambiguous(given: str, matching: Sequence[RunRecord]) -> CommandError:
    now = time.time()
    listed = "\n".join(
        f"  {record.run_id}  {record.state.value}, {ago(now - record.updated_at)}" for record in matching[:_SHOWN]
    )
    more = f"\n  and {len(matching) - _SHOWN} more" if len(matching) > _SHOWN else ""
    return usage_error(f"{given!r} is the beginning of {len(matching)} run ids; give more of it:\n{listed}{more}")


def facts_of(record: RunRecord) -> dict[str, Any]:
    """What was recorded with the run when it was started: ``agent_path``, ``agent_name``, ``model``, ``mock``, ..."""
    from framework.storage import codec  # noqa: PLC0415 - only few commands look into a run

    header = codec.decode(record.header) if record.header else {}
    facts = header.get("metadata")
    return dict(facts) if isinstance(facts, dict) else {}


def agent_of(record: RunRecord) -> str | None:
    """The name of the agent that a run is of; ``None`` when that was not recorded, or cannot be read."""
    try:
        name = facts_of(record).get("agent_name")
    except SurefootError:
        return None
    return str(name) if name is not None else None


def is_of_folder(record: RunRecord, folder: Path) -> bool:
    """Whether a run is of the agent in ``folder``: it was started there, or in a folder of the same name that has no
    agent any more."""
    try:
        facts = facts_of(record)
    except SurefootError:
        return False
    recorded = facts.get("agent_path")
    if not isinstance(recorded, str):
        return False
    if os.path.realpath(recorded) == os.path.realpath(folder):
        return True
    return facts.get("agent_name") == folder.name and not (Path(recorded) / "agent.json").is_file()


def command_for(settings: Settings, *words: str) -> str:
    """A ``surefoot`` command as a user would type it next, with the ``--storage`` of this one."""
    storage = ["--storage", shown_url(settings.storage)] if settings.storage else []
    keys = ["--key-file", settings.key_file] if settings.key_file else []
    return command_line("surefoot", words, [*storage, *keys])
