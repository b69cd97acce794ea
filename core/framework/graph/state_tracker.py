"""What of the state changed since the last commit: encodes values, compares, and yields chunks.

Correctness first: a container that anybody may hold (it was written, read or passed on) is looked at again at every
commit, so a change in place is caught. Not encoded are only values that provably give the same bytes: immutable ones
under the same identity, containers restored from the store that nobody has read since, and lists and dicts that hold
the very objects they held (see ``shadows``); of a list that grew, only the new part is. A key declared append-only is
taken at its word, and not even looked at.

One object under two keys (a function's return value is also its ``result``) is stored once, and as a reference under
the other key; so it is one object again after a restore, and costs nothing twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from framework.graph.memory import IMMUTABLE, PIPE_KEY, SharedMemory
from framework.graph.shadows import Shadow, shadow_of
from framework.graph.sole_holders import held_by_these_only
from framework.storage import chunks as chunklib
from framework.storage import codec
from framework.storage.checkpoints import SCOPE_MARK, State, check_key, format_digest
from framework.storage.chunks import Chunk, state_digest

_APPENDABLE: dict[type, bytes] = {list: b"[", str: b'"'}
_SHADOWED = frozenset({list, dict})
_REF = b'{"$t":"ref"'
_WORTH_A_SHADOW = 2048
"""Bytes from which a value's shadow is kept; shorter ones are encoded as fast as compared."""
_SHORT = 64
"""Texts and bytes up to this length are stored again rather than referred to."""


@dataclass(slots=True)
class _Known:
    """A key as last committed.

    ``value`` is the live object, ``parts`` its bytes in pieces (``None`` for append-only keys), ``length`` and ``kind``
    what an append needs, ``shadow`` what it held (see ``shadows``; shared by successive ones of a growing list).
    ``refs`` are the keys of the same scope that the bytes refer to, with the objects meant.
    """

    value: Any
    parts: list[bytes] | None
    length: int
    kind: bytes
    refs: tuple[tuple[str, Any], ...] = ()
    is_ref: bool = False
    shadow: Shadow | None = None

    def data(self) -> bytes | None:
        """The stored bytes of the whole value."""
        if self.parts is None:
            return None
        if len(self.parts) > 1:
            self.parts[:] = [chunklib.join_appends(self.parts[0], self.parts[1:])]
        return self.parts[0]


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
            kept = None if self._is_append_only(key, value) and not is_ref else [data]
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
            if known is None:
                self._forget(full)
                continue
            if full not in self._known:
                branch, key = _unscoped(full)
                self._keys.setdefault(branch, set()).add(key)
            self._known[full] = known
            if full in staged.chains:
                self._chains[full] = staged.chains[full]
        self._total = staged.total

    def _forget(self, full: str) -> None:
        branch, key = _unscoped(full)
        self._known.pop(full, None)
        self._chains.pop(full, None)
        keys = self._keys.get(branch, set())
        keys.discard(key)
        if not keys:
            self._keys.pop(branch, None)

    def rebase(self, chains: Mapping[str, int]) -> None:
        """Take the keys' chains anew: the store comes to the same values by other chunks than were accepted."""
        self._chains = dict(chains)
        self._total = state_digest(self._chains.values())

    def _stage_scope(self, staged: Staged, branch: str, memory: SharedMemory) -> None:
        own = memory.own
        homes: dict[int, str] | None = None
        sealed = self._seal(branch, memory)
        prefix = scoped(branch, "")
        for key, value in own.items():
            known = self._known.get(prefix + key if branch else key)
            if (
                known is not None
                and known.value is value
                and (type(value) in IMMUTABLE or not (memory.is_exposed(key) or key in sealed))
                and (not known.refs or all(own.get(target) is meant for target, meant in known.refs))
            ):
                continue
            if homes is None:
                homes = self._homes(branch, own)
            made = len(staged.chunks)
            try:
                self._stage_value(staged, branch, key, value, known, homes)
            except BaseException:
                for each in sealed:
                    memory.expose(each)
                raise
            if key in sealed and made < len(staged.chunks):
                memory.expose(key)  # what it holds is stored only once this is accepted
        keys = self._keys.get(branch)
        for key in sorted(keys.difference(own)) if keys else ():
            self._add(staged, Chunk(prefix + key, "delete", b""), None)

    def _seal(self, branch: str, memory: SharedMemory) -> set[str]:
        """The keys of containers that nobody else holds any more: they are looked at once again, and then no more."""
        sealed = set()
        for key in memory.take_idle():
            known = self._known.get(scoped(branch, key))
            if known is None or memory.own[key] is not known.value:
                continue
            # In this order: a thread that is handed the value from here on says so, and one that has it is counted.
            memory.seal(key)
            # A shadow of just what the value holds refers once to each container inside it.
            inside = 0 if known.shadow is None else 1
            same = known.shadow is None or known.shadow.is_same(known.value)
            if same and held_by_these_only(known, key, memory.holders, inside):
                sealed.add(key)
            else:
                memory.expose(key)
        return sealed

    def _homes(self, branch: str, own: Mapping[str, Any]) -> dict[int, str]:
        """For each object worth sharing, by identity, the key under which it is stored itself.

        The key where it is stored already, if any; then a declared one; the pipe's ``result`` last.
        """
        if len(set(map(id, own.values()))) == len(own) and dict not in map(type, own.values()):
            return {}  # no object is there twice, neither under two keys nor in a dict
        homes: dict[int, tuple[int, str]] = {}
        shareable = [(key, value) for key, value in own.items() if _is_shareable(value)]
        if len(shareable) < 2:
            return {}
        for key, value in shareable:
            full = scoped(branch, key)
            known = self._known.get(full)
            if known is not None and known.value is value and not known.is_ref:
                rank = 0
            elif self._is_append_only(key, value):
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
        full = scoped(branch, key)
        if known is None:
            check_key(key)
        written, refs = _with_refs(branch, key, value, homes) if homes else (value, ())
        is_ref = isinstance(written, codec.StateRef)
        declared = self._is_append_only(key, value) and not is_ref
        if declared and known is not None and known.kind == _APPENDABLE[type(value)] and len(value) >= known.length:
            if len(value) == known.length:
                staged.known[full] = _Known(value, None, known.length, known.kind)
                return
            tail = codec.encode(value[known.length :], f"{_path(key)}[{known.length}:]")
            if tail[:1] == known.kind:
                grown = _Known(value, None, len(value), known.kind)
                self._add(staged, Chunk(full, "append", tail[1:-1]), grown)
                return
        if written is value and known is not None and known.shadow is not None and not declared:
            if known.shadow.is_same(value):
                staged.known[full] = known if known.value is value else replace(known, value=value)
                return
            if known.shadow.begins(value) and self._stage_growth(staged, full, value, known):
                return
        # Before the bytes and looked at after them: a thread that a node left behind may change the value meanwhile.
        shadow = shadow_of(value) if written is value and not declared and type(value) in _SHADOWED else None
        data = codec.encode(written, _path(key))
        chunk = chunklib.diff_value(full, known.data() if known is not None else None, data)
        now = _Known(value, None if declared else [data], _length(value), data[:1], refs, is_ref)
        if shadow is not None and len(data) >= _WORTH_A_SHADOW and shadow.is_same(value):
            now.shadow = shadow
        if chunk is None:
            staged.known[full] = now
        else:
            self._add(staged, chunk, now)

    def _stage_growth(self, staged: Staged, full: str, value: list[Any], known: _Known) -> bool:
        """Stage the new part of a list whose old part is the same."""
        assert known.shadow is not None
        assert known.parts is not None
        tail = value[len(known.shadow) :]
        shadow = known.shadow.grown(tail)
        if shadow is None:
            return False
        data = codec.encode(tail, f"{_path(_unscoped(full)[1])}[{len(known.shadow)}:]")
        if not shadow.is_same(value):
            return False
        now = _Known(value, [*known.parts, data[1:-1]], len(value), known.kind, shadow=shadow)
        self._add(staged, Chunk(full, "append", data[1:-1]), now)
        return True

    def _add(self, staged: Staged, chunk: Chunk, known: _Known | None) -> None:
        before = self._chains.get(chunk.key, 0)
        chunk = chunklib.summed(chunk)
        after = chunklib.chain(before, chunk)
        staged.chunks.append(chunk)
        staged.known[chunk.key] = known
        staged.chains[chunk.key] = after
        # The state's digest is the exclusive or of its chains: only what changes has to be counted.
        staged.total ^= before ^ after

    def _is_append_only(self, key: str, value: Any) -> bool:
        return key in self._append_only and type(value) in _APPENDABLE


def _path(key: str) -> str:
    return f"state.{key}" if key.isidentifier() else f"state[{key!r}]"


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
