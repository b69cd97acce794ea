"""What of the state changed since the last commit: encodes values, compares, and yields chunks.

Correctness first: a container that anybody may hold (it was written, read or passed on) is encoded again at every
commit, so a change in place is caught. Skipped are only values that cannot have changed: immutable ones under the
same identity, and containers restored from the store that nobody has read since. A key declared append-only is taken
at its word, and costs what is new.

One object under two keys (a function's return value is also its ``result``) is stored once, and as a reference under
the other key; so it is one object again after a restore, and costs nothing twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from framework.graph.memory import IMMUTABLE, PIPE_KEY, SharedMemory
from framework.storage import chunks as chunklib
from framework.storage import codec
from framework.storage.checkpoints import SCOPE_MARK, State, check_key, format_digest
from framework.storage.chunks import Chunk, state_digest

_APPENDABLE: dict[type, bytes] = {list: b"[", str: b'"'}
_REF = b'{"$t":"ref"'
_SHORT = 64
"""Texts and bytes up to this length are stored again rather than referred to."""


@dataclass(slots=True)
class _Known:
    """A key as last committed.

    ``value`` is the live object, ``data`` its bytes (``None`` for append-only keys), ``length`` and ``kind`` what an
    append needs. ``refs`` are the keys of the same scope that the bytes refer to, with the objects meant.
    """

    value: Any
    data: bytes | None
    length: int
    kind: bytes
    refs: tuple[tuple[str, Any], ...] = ()
    is_ref: bool = False


@dataclass(slots=True)
class Staged:
    """Changes not yet accepted."""

    chunks: list[Chunk]
    digest: str
    known: dict[str, _Known | None] = field(default_factory=dict)
    chains: dict[str, int] = field(default_factory=dict)
    total: int = 0


def scoped(branch: str, key: str) -> str:
    """The stored key of ``key`` in ``branch``'s own state; at the root the key itself."""
    return f"{branch}{SCOPE_MARK}{key}" if branch else key


def _unscoped(full: str) -> tuple[str, str]:
    branch, _, key = full.rpartition(SCOPE_MARK)
    return branch, key


class StateTracker:
    """Follows one run's state from commit to commit. ``append_only`` are keys of the run's state."""

    def __init__(self, append_only: Iterable[str] = ()) -> None:
        self._append_only = frozenset(append_only)
        self._known: dict[str, _Known] = {}
        self._chains: dict[str, int] = {}
        self._keys: dict[str, set[str]] = {}
        self._total = 0

    def load(self, state: State, values: Mapping[str, Any]) -> None:
        """Begin from a stored state and the live values made of it, both by stored key."""
        self._known, self._keys = {}, {}
        for full, data in state.values.items():
            branch, key = _unscoped(full)
            value = values[full]
            is_ref = data.startswith(_REF)
            refs = self._refs_in(data, branch, values) if _REF in data else ()
            kept = None if self._is_append_only(full, value) and not is_ref else data
            self._known[full] = _Known(value, kept, _length(value), data[:1], refs, is_ref)
            self._keys.setdefault(branch, set()).add(key)
        self._chains = dict(state.chains)
        self._total = state_digest(self._chains.values())

    def _refs_in(self, data: bytes, branch: str, values: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
        plain = codec.decode(data)
        found = [plain] if isinstance(plain, codec.StateRef) else list(plain.values()) if type(plain) is dict else []
        return tuple((_unscoped(item.key)[1], values[item.key]) for item in found if isinstance(item, codec.StateRef))

    def stage(self, scopes: Mapping[str, SharedMemory], over: Iterable[str] = ()) -> Staged:
        """The chunks that bring the stored state to these memories, by branch id (``""`` the run's own).

        Memories not given are taken as unchanged; branches in ``over`` are gone, and their keys with them. Nothing is
        taken as committed until ``accept``. Raises ``UnstorableValue`` naming the path.
        """
        staged = Staged([], "", total=self._total)
        for branch, memory in scopes.items():
            self._stage_scope(staged, branch, memory)
        for branch in over:
            for key in sorted(self._keys.get(branch, ())):
                self._add(staged, Chunk(scoped(branch, key), "delete", b""), None)
        staged.digest = format_digest([staged.total])
        return staged

    def accept(self, staged: Staged) -> None:
        """Take staged changes as committed."""
        for full, known in staged.known.items():
            branch, key = _unscoped(full)
            if known is None:
                self._known.pop(full, None)
                self._chains.pop(full, None)
                keys = self._keys.get(branch, set())
                keys.discard(key)
                if not keys:
                    self._keys.pop(branch, None)
                continue
            self._known[full] = known
            self._keys.setdefault(branch, set()).add(key)
            if full in staged.chains:
                self._chains[full] = staged.chains[full]
        self._total = staged.total

    def rebase(self, chains: Mapping[str, int]) -> None:
        """Take the keys' chains anew: the store comes to the same values by other chunks than were accepted."""
        self._chains = dict(chains)
        self._total = state_digest(self._chains.values())

    def _stage_scope(self, staged: Staged, branch: str, memory: SharedMemory) -> None:
        own = memory.own
        homes: dict[int, str] | None = None
        for key, value in own.items():
            known = self._known.get(scoped(branch, key))
            if (
                known is not None
                and known.value is value
                and (type(value) in IMMUTABLE or not memory.is_exposed(key))
                and all(own.get(target) is meant for target, meant in known.refs)
            ):
                continue
            if homes is None:
                homes = self._homes(branch, own)
            self._stage_value(staged, branch, key, value, known, homes)
        for key in sorted(self._keys.get(branch, set()).difference(own)):
            self._add(staged, Chunk(scoped(branch, key), "delete", b""), None)

    def _homes(self, branch: str, own: Mapping[str, Any]) -> dict[int, str]:
        """For each object worth sharing, by identity, the key under which it is stored itself.

        The key where it is stored already, if any; then a declared one; the pipe's ``result`` last.
        """
        homes: dict[int, tuple[int, str]] = {}
        for key, value in own.items():
            if not _is_shareable(value):
                continue
            full = scoped(branch, key)
            known = self._known.get(full)
            if known is not None and known.value is value and not known.is_ref:
                rank = 0
            elif self._is_append_only(full, value):
                rank = 1
            else:
                rank = 3 if key == PIPE_KEY else 2
            found = homes.get(id(value))
            if found is None or rank < found[0]:
                homes[id(value)] = (rank, key)
        return {identity: key for identity, (_, key) in homes.items()}

    def _stage_value(
        self, staged: Staged, branch: str, key: str, value: Any, known: _Known | None, homes: Mapping[int, str]
    ) -> None:
        check_key(key)
        full = scoped(branch, key)
        path = f"state.{key}" if key.isidentifier() else f"state[{key!r}]"
        written, refs = _with_refs(branch, key, value, homes)
        is_ref = isinstance(written, codec.StateRef)
        declared = self._is_append_only(full, value) and not is_ref
        if declared and known is not None and known.kind == _APPENDABLE[type(value)] and len(value) >= known.length:
            if len(value) == known.length:
                staged.known[full] = _Known(value, None, known.length, known.kind)
                return
            tail = codec.encode(value[known.length :], f"{path}[{known.length}:]")
            if tail[:1] == known.kind:
                grown = _Known(value, None, len(value), known.kind)
                self._add(staged, Chunk(full, "append", tail[1:-1]), grown)
                return
        data = codec.encode(written, path)
        chunk = chunklib.diff_value(full, known.data if known is not None else None, data)
        now = _Known(value, None if declared else data, _length(value), data[:1], refs, is_ref)
        if chunk is None:
            staged.known[full] = now
        else:
            self._add(staged, chunk, now)

    def _add(self, staged: Staged, chunk: Chunk, known: _Known | None) -> None:
        before = self._chains.get(chunk.key, 0)
        after = chunklib.chain(before, chunk)
        staged.chunks.append(chunk)
        staged.known[chunk.key] = known
        staged.chains[chunk.key] = after
        # The state's digest is the exclusive or of its chains: only what changes has to be counted.
        staged.total ^= before ^ after

    def _is_append_only(self, full: str, value: Any) -> bool:
        return _unscoped(full)[1] in self._append_only and type(value) in _APPENDABLE


def _is_shareable(value: Any) -> bool:
    """Whether two keys holding this very object are worth a reference: containers, and long texts and bytes."""
    if type(value) is str or type(value) is bytes:
        return len(value) > _SHORT
    return type(value) not in IMMUTABLE


def _with_refs(branch: str, key: str, value: Any, homes: Mapping[int, str]) -> tuple[Any, tuple[tuple[str, Any], ...]]:
    """``value`` as it is written: a reference when another key is its home, also for the entries of a dict."""
    home = homes.get(id(value), key)
    if home != key:
        return codec.StateRef(scoped(branch, home)), ((home, value),)
    if type(value) is not dict:
        return value, ()
    shared = {
        name: home for name, item in value.items() if _is_shareable(item) and (home := homes.get(id(item), key)) != key
    }
    if not shared:
        return value, ()
    written = {
        name: codec.StateRef(scoped(branch, shared[name])) if name in shared else item for name, item in value.items()
    }
    return written, tuple((home, value[name]) for name, home in shared.items())


def _length(value: Any) -> int:
    return len(value) if type(value) in _APPENDABLE else 0
