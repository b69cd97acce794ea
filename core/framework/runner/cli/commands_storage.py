"""``surefoot storage``: the store as a whole: make it smaller, encrypt it, change its keys and see which are in use."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import click

from framework._secrets import mask
from framework.errors import NotEncrypted
from framework.runner.cli.app import Group
from framework.runner.cli.compacting import compact
from framework.runner.cli.confirming import agreed, consent_options
from framework.runner.cli.exits import CommandError, Exit, usage_error
from framework.runner.cli.output import Cell, Column, Styled
from framework.runner.cli.settings import Settings
from framework.runner.cli.stores import command_for, file_of, keys_of, open_store, storage_url
from framework.runner.cli.text import counted, shown_url
from framework.storage.backend import Storage, open_plain
from framework.storage.encryption import EncryptedStorage, KeyRing
from framework.storage.encryption_keys import write_key_file
from framework.storage.encryption_rotation import Progress, Rotated, count_keys, encrypt_plain
from framework.storage.sealed import KEY_FILE_VARIABLE, KEYS_VARIABLE

_TELL_SECONDS = 2.0


@click.group("storage", cls=Group)
def storage() -> None:
    """Care for the store as a whole: make it smaller, encrypt it, change its keys.

    Keys are given with --key-file, $SUREFOOT_ENCRYPTION_KEYS (id:base64key, several separated by commas) or
    $SUREFOOT_ENCRYPTION_KEY_FILE. The last key encrypts; all decrypt.
    """


storage.add_command(compact)


# --- keys -----------------------------------------------------------------------------------------------------------


@storage.command("keys", short_help="Show which keys are in use.")
@click.pass_obj
def keys(settings: Settings) -> int:
    """Show the keys' ids, and how many contents of the store each encrypts. Reads the store from end to end."""
    screen = settings.screen
    with open_store(settings) as store:
        encrypted = _encrypted(store, settings)
        counts, ring = encrypted.count_keys(), encrypted.keys
    rows = [(key_id, counts.pop(key_id, 0), key_id == ring.newest, True) for key_id in ring]
    rows += [(key_id, count, False, False) for key_id, count in sorted(counts.items())]
    lacking = any(not given for _, _, _, given in rows)
    if screen.json:
        names = ("id", "contents", "encrypts", "given")
        screen.document({"keys": [dict(zip(names, row, strict=True)) for row in rows]})
        return Exit.FAILED if lacking else Exit.DONE
    table: list[list[Cell]] = []
    for key_id, count, newest, given in rows:
        use: Cell = "encrypts" if newest else "decrypts" if count else "not needed any more"
        if not given:
            use = Styled("not given" if key_id else "plain: refused", "bold red")
        table.append([key_id or "(none)", f"{count:,}", use])
    screen.table([Column("key"), Column("contents", right=True), Column("use", grow=True)], table)
    return Exit.FAILED if lacking else Exit.DONE


@storage.command("new-key", short_help="Add a new key to a file.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("key_id", metavar="[ID]", required=False)
@click.pass_obj
def new_key(settings: Settings, file: Path, key_id: str | None) -> int:
    """Add a new random key to FILE, which is made when missing. It encrypts from now on, wherever the file is used.

    ID is the key's name; without one it is the date, such as 2026-05-01, or 2026-05-01-2 for a second one of that day.
    """
    screen = settings.screen
    ring = KeyRing.from_file(file) if os.path.lexists(file) else None
    name = key_id or _of_today(ring)
    made = KeyRing([(name, os.urandom(32))]) if ring is None else ring.with_key(name)
    write_key_file(file, made)
    if screen.json:
        screen.document({"file": str(file), "added": name, "keys": list(made.ids)})
        return Exit.DONE
    screen.say(f"Key {name} is in {file}; only you can read it.")
    screen.note("Keep a copy apart from the store: without its keys nobody can read it.")
    if ring is not None:
        screen.note("Encrypt what older keys encrypt with it:")
        screen.note("  ", command_for(settings, "storage", "rotate-keys"), wrap=False)
    return Exit.DONE


def _of_today(ring: KeyRing | None) -> str:
    today = time.strftime("%Y-%m-%d")
    names = itertools.chain([today], (f"{today}-{number}" for number in itertools.count(2)))
    return next(name for name in names if ring is None or name not in ring)


@storage.command("drop-key", short_help="Remove a key that is not needed any more from a file.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("key_id", metavar="ID")
@click.pass_obj
def drop_key(settings: Settings, file: Path, key_id: str) -> int:
    """Remove the key ID from FILE, unless the store still needs it. Other stores that use FILE are not looked at."""
    screen = settings.screen
    ring = KeyRing.from_file(file)
    with _plain(settings) as store:
        left = ring.without(key_id, count_keys(store))
    write_key_file(file, left)
    if screen.json:
        screen.document({"file": str(file), "dropped": key_id, "keys": list(left.ids)})
    else:
        screen.say(f"Key {key_id} is no longer in {file}; nothing in the store needs it.")
        screen.note("Backups of the store made before its content was encrypted anew still do.")
    return Exit.DONE


# --- rotation -------------------------------------------------------------------------------------------------------


@storage.command("rotate-keys", short_help="Encrypt everything with the newest key.")
@click.pass_obj
def rotate_keys(settings: Settings) -> int:
    """Encrypt everything that an older key encrypts with the newest one.

    Runs may go on meanwhile. It may be stopped at any moment, and goes on where it was when called again.
    """
    with open_store(settings) as store:
        encrypted = _encrypted(store, settings)
        done = encrypted.rotate_keys(_Telling(settings))
        counts = encrypted.count_keys()
    return _told(settings, done, encrypted.keys, dict(counts))


@storage.command("encrypt", short_help="Encrypt a store that is not encrypted.")
@consent_options
@click.pass_obj
def encrypt(settings: Settings, yes: bool, dry_run: bool) -> int:
    """Encrypt a store that is not encrypted, as a whole, with the newest key. Nothing may use it meanwhile.

    From then on it opens only with the keys. If it is stopped, call it again: until it is done the store does not open
    with the keys.
    """
    screen, ring = settings.screen, _ring(settings)
    with _plain(settings) as store:
        counts = count_keys(store)
        plain = counts.pop("", 0)
        if not plain:
            screen.say("There is nothing to encrypt: no content is plain.")
            return Exit.DONE
        screen.say(f"{counted(plain, 'content')} would be encrypted with key {ring.newest}.")
        screen.note("Make a backup first. What the disk keeps of deleted files may show old content afterwards.")
        if not agreed(settings, "Encrypt the store?", yes=yes, dry_run=dry_run):
            if screen.json:
                screen.document({"would_encrypt": plain, "replaced": 0})
            return Exit.DONE
        done = encrypt_plain(store, ring, _Telling(settings))
        counts = count_keys(store)
    return _told(settings, done, ring, dict(counts))


class _Telling:
    """Says now and then how far a rotation is."""

    def __init__(self, settings: Settings) -> None:
        self._screen = settings.screen
        self._next = time.monotonic() + _TELL_SECONDS

    def __call__(self, progress: Progress) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _TELL_SECONDS
            self._screen.note(
                f"{progress.runs_done:,} of {progress.runs:,} runs, {progress.replaced:,} contents encrypted anew"
            )


def _told(settings: Settings, done: Rotated, ring: KeyRing, counts: dict[str, int]) -> int:
    screen = settings.screen
    older = {key_id: count for key_id, count in counts.items() if key_id != ring.newest and count}
    failed = bool(done.damage or older)
    if screen.json:
        damage = [{"run_id": each.run_id, "where": each.where, "problem": each.problem} for each in done.damage]
        screen.document(
            {"ok": not failed, "key": ring.newest, "runs": done.runs, "replaced": done.replaced, "left": older}
            | {"damage": damage}
        )
        return Exit.FAILED if failed else Exit.DONE
    if done.replaced or older:
        runs = counted(done.runs, "run")
        screen.say(f"{counted(done.replaced, 'content')} of {runs} encrypted with key {ring.newest}.")
    else:
        screen.say(f"There is nothing to do: all contents are encrypted with key {ring.newest}.")
    for each in done.damage:
        screen.warning(f"not encrypted anew: {mask(each.problem)}")
    if older:
        listing = ", ".join(f"{count:,} with {key_id or 'none'}" for key_id, count in sorted(older.items()))
        screen.warning(
            f"Others are still encrypted with another key: {listing}. A process that has not got the new key yet wrote "
            "them, or they are damaged. Call this again when all have it."
        )
    elif len(ring) > 1:
        others = ", ".join(key_id for key_id in ring if key_id != ring.newest)
        screen.note(f"Nothing in this store needs the other keys any more ({others}): they may be dropped.")
    return Exit.FAILED if failed else Exit.DONE


# --- stores ---------------------------------------------------------------------------------------------------------


def _ring(settings: Settings) -> KeyRing:
    ring = keys_of(settings)
    if ring is None:
        raise usage_error(
            f"No keys are given: use --key-file, {KEYS_VARIABLE} or {KEY_FILE_VARIABLE}. `surefoot storage new-key "
            "FILE` makes one."
        )
    return ring


def _encrypted(store: Storage, settings: Settings) -> EncryptedStorage:
    if not isinstance(store, EncryptedStorage):
        _ring(settings)
        raise NotEncrypted(f"The store {store.url} is not encrypted.")
    return store


def _plain(settings: Settings) -> Storage:
    """The store below any encryption. Raises ``CommandError``, ``StorageError``."""
    url = storage_url(settings)
    path = file_of(url)
    if path is not None and not os.path.exists(path):
        raise CommandError(f"There is no store at {shown_url(url)}.", Exit.NOT_FOUND)
    return open_plain(url)
