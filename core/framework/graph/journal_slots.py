"""Which message belongs to which wait: one name in the store for one wait.

So the store's rule that a name is taken once decides, in its own transaction, between two senders, and between a sender
and a wait that times out.

A wait for a signal is the first, second ... of its name in the run. Its number is a row of the run's journal under a
step of its own, ``SIGNALS``: it outlives the attempts, and the step that waited. An answer to a question is named after
the question; when the node refuses it, the next answer has another name.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from framework.storage import codec
from framework.storage.records import JournalRow

SIGNALS = "signals"
"""The step, in the journal, of the numbers of waits. No step of a run is called so: their keys have a ``#``."""

CLOSED = b""
"""The message that a wait leaves under its own name when it times out; no value is encoded so."""

QUESTION = re.compile(r"#\d+/")
"""What the ids of questions have in them, as in ``shop#1/q01234567``. Signals are not called so, so that a mistyped id
is never taken for one."""

_SIGNAL = re.compile(r"signal:(\d+):(.*)", re.DOTALL)


def signal_message(name: str, occurrence: int) -> str:
    """The message for the run's ``occurrence``-th wait for the signal ``name``."""
    return f"signal:{occurrence}:{name}"


def signal_of(message: str) -> tuple[str, int] | None:
    """The signal that a message is, and its occurrence; ``None`` for another message."""
    found = _SIGNAL.fullmatch(message)
    return (found[2], int(found[1])) if found is not None else None


def answer_message(question: str, number: int) -> str:
    """The message for the ``number``-th answer to a question; there is a second one when the node refused the first."""
    return f"answer:{question}" if number == 1 else f"answer:{question}:{number}"


def is_answer(message: str, question: str) -> bool:
    """Whether a message is an answer to the question, the first or a later one."""
    return message == f"answer:{question}" or message.startswith(f"answer:{question}:")


@dataclass(frozen=True, slots=True)
class Claim:
    """One wait has the ``occurrence``-th place among those for ``name``. ``wait`` is the same in all its attempts."""

    name: str
    occurrence: int
    wait: str
    step: str

    def row(self, number: int) -> JournalRow:
        """As a row of the journal. A mark, which is no call to whoever reads the calls."""
        plain = {"kind": "mark", "cleared": False, "signal": self.name, "occurrence": self.occurrence}
        return JournalRow(SIGNALS, number, codec.encode({**plain, "wait": self.wait, "step": self.step}, "claim"))

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Claim:
        """What ``row`` wrote, parsed."""
        return cls(row["signal"], row["occurrence"], row["wait"], row["step"])


@dataclass(slots=True)
class Claims:
    """The claims of one run, as its one owner knows them."""

    loaded: bool = False
    _by_wait: dict[str, Claim] = field(default_factory=dict)
    _last: int = 0
    _damaged: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def load(self, rows: Iterable[JournalRow]) -> None:
        """Take up what is recorded, once. A row that is damaged has an empty record."""
        with self._lock:
            if self.loaded:
                return
            for row in rows:
                self._last = max(self._last, row.number)
                if not row.record:
                    self._damaged += 1
                    continue
                claim = Claim.of_row(codec.decode(row.record))
                self._by_wait[claim.wait] = claim
            self.loaded = True

    def take(self, name: str, wait: str, step: str) -> tuple[int, JournalRow | None]:
        """The wait's occurrence, and the row that has to be written when it is new."""
        with self._lock:
            found = self._by_wait.get(wait)
            if found is not None:
                return found.occurrence, None
            taken = [each.occurrence for each in self._by_wait.values() if each.name == name]
            # A damaged claim may be one for this name: its place, and so its value, is nobody else's.
            last = max(0, *taken, len(taken) + self._damaged)
            claim = self._by_wait[wait] = Claim(name, last + 1, wait, step)
            self._last += 1
            return claim.occurrence, claim.row(self._last)


_claims: WeakKeyDictionary[Any, Claims] = WeakKeyDictionary()


def claims_of(store: Any) -> Claims:
    """Those of the run whose journal ``store`` is."""
    return _claims.setdefault(store, Claims())
