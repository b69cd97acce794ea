"""What the storage contract's checks are made of: the store under test, commits to give it, and what must be so.

``framework.testing`` runs the checks; they are in the ``contract_`` modules beside this one.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from framework.errors import StorageError
from framework.storage import checkpoints as stored
from framework.storage import codec
from framework.storage.chunks import Chunk, chain, diff
from framework.storage.interface import Storage
from framework.storage.records import (
    NO_TOKEN,
    CheckpointRow,
    Commit,
    JournalRow,
    JournalWrite,
    LogRow,
    NewRun,
    Retention,
    RunRecord,
    Write,
)

Factory = Callable[..., Storage]

ODD_IDS = (
    "ckpt_test_0",
    "../x",
    "../../x",
    "a/b",
    "a\\b",
    "/etc/passwd",
    ".",
    "..",
    ".hidden",
    "...",
    "CON",
    "nul.txt",
    "%2e%2e",
    "%",
    "~",
    "a~b",
    "with space ",
    " ",
    "tab\tnewline\n",
    "-rf",
    "--",
    "*?<>|:\"'",
    "ünï-cödé-☃-🐍",
    "e\u0301",
    "\u00e9",
    "\u202eright-to-left",
    "a.json",
    "a.tmp",
    "Aa",
    "$t",
    "x" * 200,
    "x" * 199 + "y",
    "☃" * 85,
    "null",
    "0",
    "run;DROP TABLE runs",
)
"""Ids that a store must take, keep apart, and never follow out of itself."""

BAD_IDS = ("", "nul\x00byte", "\x00", "lone\ud800surrogate", "x" * 1_001)
"""Ids and keys that a store must refuse with ``InvalidId``, which is also a ``ValueError``."""


class ManualClock:
    """A clock that stands still until told otherwise: seconds since the epoch."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


class StorageUnderTest:
    """Makes stores for one check, and closes them after it.

    ``factory()`` gives a fresh, empty store; ``reopen(store)`` closes one and opens it again. A factory with a
    parameter ``clock`` is given a clock that the checks can move, and so is ``reopen``.
    """

    def __init__(self, factory: Factory, reopen: Factory | None = None) -> None:
        self._factory = factory
        self._reopen = reopen
        self._stores: list[Storage] = []
        self.clock = ManualClock() if _takes_clock(factory) else None

    def new(self) -> Storage:
        """A fresh, empty store."""
        store = self._factory(**self._options(self._factory))
        self._stores.append(store)
        return store

    def again(self, store: Storage) -> Storage:
        """The same store, closed and opened again if that is possible; else as it is."""
        if self._reopen is None:
            return store
        self._stores.remove(store)
        opened = self._reopen(store, **self._options(self._reopen))
        self._stores.append(opened)
        return opened

    def before_and_after_reopening(self, store: Storage) -> Iterator[Storage]:
        """The store, then the same as ``again`` gives it."""
        yield store
        yield self.again(store)

    def _options(self, function: Factory) -> dict[str, Any]:
        return {"clock": self.clock} if self.clock is not None and _takes_clock(function) else {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for store in self._stores:
            store.close()


Check = Callable[[StorageUnderTest], None]


def _takes_clock(function: Factory) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some built-in callables have none
        return False
    return "clock" in parameters


# --- what must be so ------------------------------------------------------------------------------------------------
# Not ``assert``: the checks are shipped, and ``python -O`` must not turn them into nothing.


def require(condition: object, text: str) -> None:
    """Raise ``AssertionError`` with ``text`` unless ``condition`` holds."""
    if not condition:
        raise AssertionError(text)


def equal(found: object, expected: object, what: str) -> None:
    """Raise ``AssertionError`` unless the two are equal and of one type."""
    if found != expected or type(found) is not type(expected):
        raise AssertionError(f"{what}: expected {expected!r:.500}, found {found!r:.500}")


@contextlib.contextmanager
def raises(kind: type[BaseException], what: str) -> Iterator[None]:
    """Raise ``AssertionError`` unless the block raises ``kind``."""
    try:
        yield
    except kind:
        return
    except Exception as error:
        raise AssertionError(f"{what}: expected {kind.__name__}, but {error!r:.300} was raised") from error
    raise AssertionError(f"{what}: expected {kind.__name__}, but nothing was raised")


# --- what to give it ------------------------------------------------------------------------------------------------


def new_run(run_id: str = "run_1", state: Mapping[str, Any] | None = None, **fields: Any) -> NewRun:
    """A run to accept, with an initial state."""
    chunks = [Chunk(key, "set", codec.encode(value)) for key, value in (state or {}).items()]
    defaults: dict[str, Any] = {
        "executor_type": "graph",
        "goal_id": "goal_1",
        "fingerprint": "f1",
        "definition": b'{"nodes":["a"]}',
        "header": b'{"input_keys":[]}',
        "chunks": chunks,
    }
    return NewRun(run_id=run_id, **{**defaults, **fields})


def commit(sequence: int, run_id: str = "run_1", token: int = NO_TOKEN, **fields: Any) -> Commit:
    """A commit; a checkpoint named after its sequence unless ``checkpoint_id`` is given (``None``: no checkpoint)."""
    checkpoint_id = fields.pop("checkpoint_id", f"ckpt_{sequence}")
    defaults: dict[str, Any] = {
        "record": codec.encode([{"kind": "step", "node": f"n{sequence}"}]),
        "checkpoint_id": checkpoint_id,
        "checkpoint": None if checkpoint_id is None else codec.encode({"v": 1, "step_number": sequence}),
    }
    return Commit(run_id=run_id, token=token, sequence=sequence, **{**defaults, **fields})


def journal(
    *rows: tuple[str, int, bytes], run_id: str = "run_1", token: int = NO_TOKEN, progress: bool = False
) -> JournalWrite:
    """Journal rows, each given as its step, number and record."""
    return JournalWrite(run_id, token, [JournalRow(*row) for row in rows], progress)


def accept(store: Storage, *commits: Write) -> None:
    """Commit, and raise ``AssertionError`` when any is refused."""
    for one, outcome in zip(commits, store.commit(commits), strict=True):
        if outcome is not None:
            what = f"Commit {one.sequence}" if isinstance(one, Commit) else "A journal write"
            raise AssertionError(f"{what} of run {one.run_id!r} was refused: {outcome!r}") from outcome


def refuse(store: Storage, one: Write, kind: type[Exception], what: str) -> Exception:
    """Commit, and raise ``AssertionError`` unless it is refused as ``kind`` and leaves no trace."""
    before = snapshot(store, one.run_id)
    try:
        outcome = store.commit([one])[0]
    except StorageError as error:
        outcome = error
    if not isinstance(outcome, kind):
        raise AssertionError(f"{what}: expected {kind.__name__}, found {outcome!r}")
    equal(snapshot(store, one.run_id), before, f"{what}: what is stored after the refusal")
    return outcome


class Writer:
    """Commits states to a run one after the other, and knows what each was."""

    def __init__(self, store: Storage, run_id: str = "run_1", state: Mapping[str, Any] | None = None) -> None:
        self.store = store
        self.run_id = run_id
        self.states: list[dict[str, bytes]] = [{key: codec.encode(value) for key, value in (state or {}).items()}]
        store.open_run(new_run(run_id, state))

    @property
    def sequence(self) -> int:
        """That of the last commit."""
        return len(self.states) - 1

    def write(self, state: Mapping[str, Any], /, **fields: Any) -> int:
        """Commit the difference to the last state; its sequence."""
        new = {key: codec.encode(value) for key, value in state.items()}
        chunks = diff(self.states[-1], new)
        accept(self.store, commit(self.sequence + 1, self.run_id, chunks=chunks, **fields))
        self.states.append(new)
        return self.sequence

    def check(self, store: Storage, sequences: Sequence[int], what: str) -> None:
        """Raise ``AssertionError`` unless exactly these checkpoints are retained, each with its exact state."""
        rows = list(store.read_checkpoint_rows(self.run_id))
        equal([row.sequence for row in rows], sorted(sequences, reverse=True), f"{what}: the retained checkpoints")
        for sequence in {0, *sequences, self.sequence}:
            equal(state_at(store, sequence, self.run_id), self.states[sequence], f"{what}: the state at {sequence}")


def state_at(store: Storage, sequence: int, run_id: str = "run_1") -> dict[str, bytes]:
    """The encoded state at a sequence, made from its chunks."""
    chunks = store.read_chunks(run_id, sequence)
    deleted = [chunk.key for chunk in chunks if chunk.op == "delete"]
    require(not deleted, f"read_chunks gave chunks of the deleted keys {deleted!r}")
    return dict(stored.fold(chunks).values)


def digest_of(chunks: Sequence[Chunk]) -> str:
    """The digest of the state that chunks make from nothing."""
    chains: dict[str, int] = {}
    for chunk in chunks:
        chains[chunk.key] = chain(chains.get(chunk.key, 0), chunk)
    return stored.format_digest(chains.values())


def snapshot(
    store: Storage, run_id: str = "run_1"
) -> tuple[RunRecord, list[LogRow], list[CheckpointRow], list[Chunk], list[Chunk], list[JournalRow]] | None:
    """Everything that the store says of a run, or ``None`` when it has none of this id."""
    try:
        record = store.find_run(run_id)
    except StorageError:
        return None
    if record is None:
        return None
    return (
        record,
        store.read_log(run_id),
        list(store.read_checkpoint_rows(run_id)),
        store.read_chunks(run_id, 0),
        store.read_chunks(run_id, record.sequence),
        store.read_journal(run_id),
    )


def race(count: int, function: Callable[[int], Any]) -> list[Any]:
    """Call ``function`` with 0 .. count - 1 in as many threads at one moment; per call the result or the exception."""
    results: list[Any] = [None] * count
    barrier = threading.Barrier(count)

    def work(index: int) -> None:
        barrier.wait()
        try:
            results[index] = function(index)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def growing_states() -> Iterator[dict[str, Any]]:
    """States as agents make them: a growing list and text, values replaced, deleted and set again. Without end."""
    messages: list[Any] = []
    for step in itertools.count(1):
        messages = [*messages, {"role": "user", "content": f"message {step}", "at": (step, None)}]
        state: dict[str, Any] = {"messages": messages, "text": "é" * step, "step": step, "fixed": "same"}
        if step % 3 == 0:
            state["sometimes"] = [step]
        if step % 5 == 0:
            messages = messages[-2:]
        if step % 7 != 0:
            state["input"] = "as given"
        yield state


KEEP_ALL = Retention(None)
KEEP_ONE = Retention(1)
