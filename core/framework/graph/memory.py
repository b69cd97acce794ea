"""``SharedMemory``: the state of a run while it runs, with permissions, and the overlays that branches work on."""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from framework.errors import UnstorableValue

logger = logging.getLogger(__name__)

PIPE_KEY = "result"
"""The key every function and LLM node puts its return value under. It stays in its branch unless declared."""

IMMUTABLE = frozenset({str, int, float, bool, type(None), bytes, complex})
"""Types whose values cannot change under the same identity, so a value handed out needs no second look."""


@dataclass(frozen=True, slots=True)
class _Borrowed:
    """A branch's own copy of a value from outside; ``data`` is how it was stored then, ``None`` without such a form."""

    value: Any
    data: bytes | None


@dataclass(eq=False)
class SharedMemory:
    """The named values a run works on.

    Values are shared by reference, never copied: a list that is read and changed in place is changed for all. An empty
    permission set means "no restriction", so a node that declares no output keys may write anything.

    Inside a branch of a fan-out the memory is an overlay: what the branch writes stays its own until the join, and a
    container read from the state outside is a copy of the branch's own, so no branch can see what another does.
    """

    _data: dict[str, Any] = field(default_factory=dict)
    _allowed_read: frozenset[str] = frozenset()
    _allowed_write: frozenset[str] = frozenset()
    _parent: SharedMemory | None = None
    _borrowed: dict[str, _Borrowed] = field(default_factory=dict)
    _exposed: set[str] = field(default_factory=set)
    _written: set[str] = field(default_factory=set)
    _touched: set[str] = field(default_factory=set)
    _snapshots: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=2))

    def read(self, key: str) -> Any:
        """The value of ``key``, or ``None`` when absent. Raises ``PermissionError`` for a key not readable here."""
        if self._allowed_read and key not in self._allowed_read:
            raise PermissionError(
                f"This node may not read state key {key!r}; its input_keys are {sorted(self._allowed_read)}."
            )
        return self.peek(key)

    def peek(self, key: str) -> Any:
        """The value of ``key`` or ``None``, whatever the permissions: for the framework's own nodes."""
        if key in self._data:
            value = self._data[key]
            if type(value) not in IMMUTABLE:
                self._exposed.add(key)
                self._touched.add(key)
            return value
        return None if self._parent is None else self._borrow(key)

    def write(self, key: str, value: Any) -> None:
        """Set ``key``. Raises ``PermissionError`` for a key not writable here."""
        if self._allowed_write and key not in self._allowed_write:
            raise PermissionError(
                f"This node may not write state key {key!r}; its output_keys are {sorted(self._allowed_write)}."
            )
        self.put(key, value)

    def put(self, key: str, value: Any) -> None:
        """Set ``key``, whatever the permissions: for the framework itself."""
        self._data[key] = value
        self._written.add(key)
        self._borrowed.pop(key, None)
        if type(value) not in IMMUTABLE:
            # Whoever wrote it may have kept it, and may change it later.
            self._exposed.add(key)
            self._touched.add(key)

    def read_all(self) -> dict[str, Any]:
        """All readable values by key, in a new dict."""
        keys: Iterable[str] = self.keys()
        if self._allowed_read:
            keys = [key for key in keys if key in self._allowed_read]
        return {key: self.peek(key) for key in keys}

    def keys(self) -> list[str]:
        """All keys, those of the state around a branch first."""
        if self._parent is None:
            return list(self._data)
        return list(dict.fromkeys([*self._parent.keys(), *self._data]))

    def with_permissions(self, read_keys: Iterable[str], write_keys: Iterable[str]) -> SharedMemory:
        """A view of the same data that reads and writes only these keys; none given means all."""
        return SharedMemory(
            self._data,
            frozenset(read_keys),
            frozenset(write_keys),
            self._parent,
            self._borrowed,
            self._exposed,
            self._written,
            self._touched,
            self._snapshots,
        )

    # --- for executors ------------------------------------------------------------------------------------------

    def branch(self) -> SharedMemory:
        """An overlay of this memory for one branch. This memory must not change while the overlay lives."""
        return SharedMemory(_parent=self)

    @property
    def own(self) -> dict[str, Any]:
        """The values of this memory itself: all of them at the root, what a branch wrote in an overlay."""
        return self._data

    def view(self) -> dict[str, Any]:
        """All values as they are, for the framework to look at without keeping or changing them."""
        if self._parent is None:
            return self._data
        borrowed = {key: borrowed.value for key, borrowed in self._borrowed.items()}
        return {**self._parent.view(), **self._data, **borrowed}

    def is_exposed(self, key: str) -> bool:
        """Whether anybody may hold the container under ``key`` and change it in place."""
        return key in self._exposed

    def take_idle(self) -> list[str]:
        """The keys of exposed containers that were not handed out or written since the last call."""
        idle = [key for key in self._exposed if key not in self._touched and key in self._data]
        self._touched.clear()
        return idle

    def seal(self, key: str) -> None:
        """Nobody holds the container under ``key``, until it is handed out or written again."""
        self._exposed.discard(key)

    def expose(self, key: str) -> None:
        """Somebody may hold the container under ``key`` after all."""
        self._exposed.add(key)

    @property
    def holders(self) -> tuple[dict[str, Any], ...]:
        """The dicts of this memory itself that refer to its values, the last snapshots among them."""
        return (self._data, *self._snapshots)

    def restored(self, key: str, value: Any) -> None:
        """Put back a value read from the store: nobody else holds it."""
        self._data[key] = value

    def snapshot(self) -> dict[str, Any]:
        """What ``roll_back`` needs to undo the writes from here on; not changes inside containers."""
        self._written.clear()
        taken = dict(self._data)
        self._snapshots.append(taken)
        return taken

    def roll_back(self, snapshot: dict[str, Any]) -> None:
        """Undo the writes since ``snapshot`` was taken."""
        self._data.clear()
        self._data.update(snapshot)
        self._borrowed.clear()
        self._written.clear()

    def take_written(self) -> set[str]:
        """The keys written since the last ``snapshot``, even with the value they had."""
        written = set(self._written)
        self._written.clear()
        return written

    def settle(self) -> None:
        """At the end of a branch's step: what it changed in place in its copies counts as written by it."""
        for key, borrowed in list(self._borrowed.items()):
            if self._parent is not None and _changed(borrowed, self._parent._raw(key)):
                self.put(key, borrowed.value)

    def _raw(self, key: str) -> Any:
        """The value as this memory has it, without handing it out."""
        if key in self._data:
            return self._data[key]
        if key in self._borrowed:
            return self._borrowed[key].value
        return None if self._parent is None else self._parent._raw(key)

    def _borrow(self, key: str) -> Any:
        if key in self._borrowed:
            return self._borrowed[key].value
        assert self._parent is not None
        value = self._parent._raw(key)
        if type(value) in IMMUTABLE:
            return value
        data = _stored_form(value)
        self._borrowed[key] = _Borrowed(isolated(value, key) if data is None else _codec().decode(data), data)
        return self._borrowed[key].value


def _codec() -> Any:
    from framework.storage import codec  # noqa: PLC0415 - which needs pydantic, and this module does not

    return codec


def _stored_form(value: Any) -> bytes | None:
    try:
        data: bytes = _codec().encode(value)
    except UnstorableValue:
        return None
    return data


def _changed(borrowed: _Borrowed, original: Any) -> bool:
    """Whether a branch changed its copy in place.

    Judged by the stored form. A value without one (a client, a lock) is compared when its copies are equal to it at
    all; otherwise nobody can tell, and only an explicit write counts.
    """
    if borrowed.data is not None:
        return _stored_form(borrowed.value) != borrowed.data
    return not _equal(borrowed.value, original) and _equal(isolated(original, "a value"), original)


def isolated(value: Any, what: str) -> Any:
    """A deep copy for a branch's own use; the value itself when it cannot be copied (a client, a lock), logged."""
    try:
        return copy.deepcopy(value)
    except Exception as error:  # any class may refuse to be copied, each in its own way
        logger.warning("%r is shared between branches: %s cannot be copied (%s)", what, type(value).__name__, error)
        return value


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception as error:  # noqa: BLE001 - arrays and the like compare to something that is no truth value
        logger.debug("values of type %s cannot be compared (%s)", type(one).__name__, error)
        return False
