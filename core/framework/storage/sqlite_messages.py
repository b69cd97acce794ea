"""Messages in the SQLite file: left once under a name, read in order, counted cheaply."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence

from framework.errors import MessageRefused
from framework.storage.records import Damage, Message
from framework.storage.sqlite_schema import row_crc


def leave(db: sqlite3.Connection, run_pk: int, message: Message) -> None:
    """Write a message inside the caller's transaction. Raises ``MessageRefused`` when its name is taken."""
    try:
        db.execute(
            "INSERT INTO messages (run_pk, name, body, sent_at, crc) VALUES (?, ?, ?, ?, ?)",
            (run_pk, message.name, message.body, message.sent_at, _crc(message)),
        )
    except sqlite3.IntegrityError:
        raise MessageRefused(message.run_id, message.name, "one of this name was left before.") from None
    db.execute("UPDATE runs SET messaged = 1 WHERE pk = ? AND messaged = 0", (run_pk,))


def read(db: sqlite3.Connection, run_id: str, on_damage: Callable[[Damage], None] | None) -> list[Message]:
    """The messages of a run in the order they were left; see ``Storage.read_messages``."""
    rows = db.execute(
        "SELECT name, CAST(body AS BLOB) AS body, sent_at, crc FROM messages WHERE run_pk = "
        "(SELECT pk FROM runs WHERE run_id = ?) ORDER BY pk",
        (run_id,),
    ).fetchall()
    found = []
    for row in rows:
        message = Message(run_id, row["name"], row["body"], row["sent_at"])
        if _crc(message) == row["crc"]:
            found.append(message)
        elif on_damage is not None:
            on_damage(Damage(run_id, None, f"message {message.name!r}", "it does not match its checksum"))
    return found


def count(db: sqlite3.Connection, run_ids: Sequence[str]) -> dict[str, int]:
    """How many messages each of the runs has; those without any are left out."""
    rows = db.execute(
        "SELECT runs.run_id, count(*) FROM json_each(?) AS wanted JOIN runs ON runs.run_id = wanted.value "
        "JOIN messages ON messages.run_pk = runs.pk GROUP BY runs.run_id",
        (json.dumps(list(run_ids)),),
    )
    return {row[0]: row[1] for row in rows}


def _crc(message: Message) -> int:
    return row_crc(message.name, message.body, message.sent_at)
