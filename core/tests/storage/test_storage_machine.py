"""Storage as a state machine: random calls, by two handles on one store, against a plain model of dicts and lists."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from framework.errors import (
    CheckpointNotFound,
    CommitConflict,
    LeaseLost,
    MessageRefused,
    RunBusy,
    RunExists,
    RunNotFound,
)
from framework.schemas.run import Run, RunState
from framework.storage import codec
from framework.storage.backend import FileStorage, Storage
from framework.storage.chunks import Chunk, diff
from framework.storage.contract import commit, journal, new_run, state_at
from framework.storage.memory import MemoryStorage
from framework.storage.postgres import PostgresStorage
from framework.storage.records import Retention
from framework.storage.sqlite import SQLiteStorage
from framework.testing import ManualClock

RUNS = ("run_1", "../run 2", "RUN_1")
KEYS = ("a", "b", "c\x00c")
STEPS = ("s", "../t", "s\x00b")
Opener = Callable[[Path, ManualClock], Storage]


@dataclass
class ModelRun:
    """What a run should be, said as simply as possible."""

    created_at: float
    owner: str | None
    token: int
    lease_until: float
    state: RunState = RunState.RUNNING
    error: str | None = None
    attempts: int = 0
    states: list[dict[str, Any]] = field(default_factory=list)
    log: list[bytes] = field(default_factory=list)
    checkpoints: list[tuple[int, str]] = field(default_factory=list)
    document: str | None = None
    messages: list[tuple[str, bytes]] = field(default_factory=list)
    journal: dict[tuple[str, int], bytes] = field(default_factory=dict)
    wake_at: float | None = None

    def held(self, now: float) -> bool:
        return self.owner is not None and self.lease_until > now


class StorageMachine(RuleBasedStateMachine):
    """Calls of a store and of the model, which must agree."""

    opener: Opener
    durable: bool

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="surefoot-machine-"))
        self.clock = ManualClock()
        first = type(self).opener(self.folder, self.clock)
        self.handles = [first, type(self).opener(self.folder, self.clock)] if self.durable else [first]
        self.runs: dict[str, ModelRun] = {}
        self.documents: dict[str, str] = {}
        self.turn = 0

    def teardown(self) -> None:
        for handle in self.handles:
            handle.close()
        shutil.rmtree(self.folder)

    @property
    def store(self) -> Storage:
        """One handle or the other, in turn: what one wrote the other must see."""
        self.turn += 1
        return self.handles[self.turn % len(self.handles)]

    # --- runs ---

    @rule(run_id=st.sampled_from(RUNS), owned=st.booleans(), keys=st.sets(st.sampled_from(KEYS)))
    def open_run(self, run_id: str, owned: bool, keys: set[str]) -> None:
        state = {key: [0] for key in sorted(keys)}
        self.clock.advance(1)
        owner = "opener" if owned else None
        if run_id in self.runs:
            with pytest.raises(RunExists):
                self.store.open_run(new_run(run_id, state), owner, 30)
            return
        self.store.open_run(new_run(run_id, state), owner, 30)
        token, until = (1, self.clock.now + 30) if owned else (0, 0.0)
        self.runs[run_id] = ModelRun(self.clock.now, owner, token, until, states=[state])

    @rule(run_id=st.sampled_from(RUNS), seconds=st.sampled_from([0, 30]), gone=st.sampled_from([True, False, None]))
    def claim(self, run_id: str, seconds: float, gone: bool | None) -> None:
        run = self.runs.get(run_id)
        if run is None:
            with pytest.raises(RunNotFound):
                self.store.claim_run(run_id, "claimer", seconds)
            return
        is_alive = None if gone is None else lambda owner: not gone
        held = run.held(self.clock.now)
        if run.state is not RunState.COMPLETED and held and not gone:
            with pytest.raises(RunBusy):
                self.store.claim_run(run_id, "claimer", seconds, is_alive)
            return
        record = self.store.claim_run(run_id, "claimer", seconds, is_alive)
        if run.state is RunState.COMPLETED:
            assert record.token == run.token
            return
        crashed = run.state is RunState.RUNNING
        assert record.state is (RunState.CRASHED if crashed else run.state)
        run.attempts = run.attempts + (run.owner is not None) if crashed else 0
        run.owner, run.token, run.lease_until = "claimer", run.token + 1, self.clock.now + seconds
        run.state, run.wake_at = RunState.RUNNING, None  # the error stays until a commit with a state replaces it
        assert (record.token, record.error) == (run.token, run.error)

    @rule(run_id=st.sampled_from(RUNS), stale=st.booleans())
    def renew(self, run_id: str, stale: bool) -> None:
        run = self.runs.get(run_id)
        if run is None or stale or run.owner is None:
            with pytest.raises(RunNotFound if run is None else LeaseLost):
                self.store.renew_lease(run_id, 0 if run is None else run.token + stale, 30)
            return
        self.store.renew_lease(run_id, run.token, 30)
        run.lease_until = self.clock.now + 30

    @rule(run_id=st.sampled_from(RUNS), stale=st.booleans())
    def release(self, run_id: str, stale: bool) -> None:
        run = self.runs.get(run_id)
        self.store.release_lease(run_id, 7 if run is None else run.token + stale)
        if run is not None and not stale:
            run.owner, run.lease_until = None, 0.0

    @rule(seconds=st.sampled_from([-5, 1, 29, 31]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(run_id=st.sampled_from(RUNS))
    def delete_run(self, run_id: str) -> None:
        run = self.runs.get(run_id)
        if run is not None and run.held(self.clock.now):
            with pytest.raises(RunBusy):
                self.store.delete_run(run_id)
            return
        assert self.store.delete_run(run_id) == (run is not None or run_id in self.documents)
        self.runs.pop(run_id, None)
        self.documents.pop(run_id, None)

    # --- commits ---

    @precondition(lambda self: self.runs)
    @rule(
        data=st.data(),
        is_checkpoint=st.booleans(),
        keep=st.sampled_from([None, None, 1, 2, 3]),
        wrong=st.sampled_from([None, None, None, None, "token", "sequence", "no token"]),
        state=st.sampled_from(
            [None, None, None, RunState.FAILED, RunState.COMPLETED, RunState.RUNNING, RunState.PAUSED]
        ),
        wake_in=st.sampled_from([None, -1, 0, 20]),
        done=st.sets(st.sampled_from(STEPS), max_size=2),
        release=st.booleans(),
        replace=st.booleans(),
        log=st.sampled_from([None, b'"logged"']),
        progress=st.booleans(),
    )
    def commit(
        self,
        data: st.DataObject,
        is_checkpoint: bool,
        keep: int | None,
        wrong: str | None,
        state: RunState | None,
        wake_in: float | None,
        done: set[str],
        release: bool,
        replace: bool,
        log: bytes | None,
        progress: bool,
    ) -> None:
        run_id = data.draw(st.sampled_from(sorted(self.runs)))
        run = self.runs[run_id]
        new = dict(run.states[-1])
        for key in data.draw(st.lists(st.sampled_from(KEYS), max_size=2)):
            how = data.draw(st.sampled_from(["append", "append", "set", "delete"]))
            if how == "delete":
                new.pop(key, None)
            else:
                new[key] = [*(new.get(key, []) if how == "append" else []), len(run.states)]
        old_bytes, new_bytes = ({k: codec.encode(v) for k, v in one.items()} for one in (run.states[-1], new))
        sequence = len(run.states)
        may_replace = replace and is_checkpoint and run.checkpoints
        replaces = data.draw(st.sampled_from(run.checkpoints)) if may_replace else None
        name = None if not is_checkpoint else replaces[1] if replaces else f"ckpt_{sequence}"
        expected: type[Exception] | None = None
        token = run.token if run.owner is not None else 0
        if wrong == "token":
            token, expected = run.token + 1, LeaseLost
        elif wrong == "no token" and run.held(self.clock.now):
            token, expected = 0, RunBusy
        elif wrong == "sequence":
            sequence, expected = data.draw(st.sampled_from([sequence - 1, sequence + 1])), CommitConflict
        wake_at = None if wake_in is None or state is not RunState.PAUSED else self.clock.now + wake_in
        one = commit(
            sequence,
            run_id,
            token,
            wake_at=wake_at,
            journal_done=sorted(done),
            checkpoint_id=name,
            log=log,
            chunks=diff(old_bytes, new_bytes),
            state=state,
            error="why" if state is RunState.FAILED else None,
            release=release,
            retention=Retention(keep),
            replaces=None if replaces is None else replaces[0],
            progress=progress,
        )
        outcome = self.store.commit([one])[0]
        assert (None if outcome is None else type(outcome)) is expected, outcome
        if expected is not None:
            return
        run.states.append(new)
        run.log.append(one.record)
        if name is not None:
            run.checkpoints = [known for known in run.checkpoints if known != replaces]
            run.checkpoints.append((sequence, name))
            if keep is not None:
                run.checkpoints = run.checkpoints[-keep:]
        if state is not None:
            run.state, run.error, run.wake_at = state, one.error, wake_at
        if release:
            run.owner, run.lease_until = None, 0.0
        if progress:
            run.attempts = 0
        run.journal = {key: record for key, record in run.journal.items() if key[0] not in done}

    @precondition(lambda self: self.runs)
    @rule(
        data=st.data(),
        rows=st.lists(
            st.tuples(st.sampled_from(STEPS), st.integers(0, 3), st.sampled_from([b"", b'{"n":1}', b"\xff"]))
        ),
        stale=st.booleans(),
        progress=st.booleans(),
    )
    def write_journal(
        self, data: st.DataObject, rows: list[tuple[str, int, bytes]], stale: bool, progress: bool
    ) -> None:
        run_id = data.draw(st.sampled_from(sorted(self.runs)))
        run = self.runs[run_id]
        token = run.token + 1 if stale else run.token if run.owner is not None else 0
        outcome = self.store.commit([journal(*rows, run_id=run_id, token=token, progress=progress)])[0]
        assert (None if outcome is None else type(outcome)) is (LeaseLost if stale else None), outcome
        if not stale:
            run.attempts = 0 if progress else run.attempts
            run.journal.update({(step, number): record for step, number, record in rows})

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), keep=st.integers(0, 3))
    def prune(self, data: st.DataObject, keep: int) -> None:
        run_id = data.draw(st.sampled_from(sorted(self.runs)))
        run = self.runs[run_id]
        left = run.checkpoints[-max(1, keep) :]
        assert self.store.prune(run_id, Retention(keep)) == len(run.checkpoints) - len(left)
        run.checkpoints = left

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        run_id = data.draw(st.sampled_from(sorted(self.runs)))
        run = self.runs[run_id]
        to = data.draw(st.sampled_from([0, *(sequence for sequence, _ in run.checkpoints)]))
        if run.owner is None:
            with pytest.raises(LeaseLost):
                self.store.rewind(run_id, run.token, to)
            return
        left = [known for known in run.checkpoints if known[0] <= to]
        assert self.store.rewind(run_id, run.token, to) == len(run.checkpoints) - len(left)
        run.checkpoints = left
        run.states[to + 1 :] = [run.states[to]] * (len(run.states) - to - 1)

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def delete_checkpoints(self, data: st.DataObject) -> None:
        run_id = data.draw(st.sampled_from(sorted(self.runs)))
        run = self.runs[run_id]
        if run.held(self.clock.now):
            with pytest.raises(RunBusy):
                self.store.delete_checkpoints(run_id)
            return
        assert self.store.delete_checkpoints(run_id) == len(run.checkpoints)
        run.checkpoints = []
        run.journal = {}
        run.states[1:] = [run.states[0]] * (len(run.states) - 1)

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), new_id=st.sampled_from(RUNS), key=st.sampled_from([None, *KEYS]))
    def fork(self, data: st.DataObject, new_id: str, key: str | None) -> None:
        run_id = data.draw(st.sampled_from(sorted(self.runs)))
        run = self.runs[run_id]
        kept = [sequence for sequence, _ in run.checkpoints]
        at = data.draw(st.sampled_from([*kept, *kept, 0, len(run.states)]))
        state = dict(run.states[min(at, len(run.states) - 1)])
        chunks = []
        if key is not None:
            state[key] = [-1]
            chunks = [Chunk(key, "set", b"[-1]")]
        one = commit(at + 1, new_id, checkpoint_id="forked", chunks=chunks, state=RunState.PAUSED)
        self.clock.advance(1)
        expected = RunExists if new_id in self.runs else CheckpointNotFound if at not in kept else None
        if expected is not None:
            with pytest.raises(expected):
                self.store.fork_run(run_id, at, b"{}", one)
            return
        self.store.fork_run(run_id, at, b"{}", one)
        name = dict(run.checkpoints)[at]
        self.runs[new_id] = ModelRun(
            self.clock.now,
            None,
            0,
            0.0,
            RunState.PAUSED,
            states=[*run.states[: at + 1], state],
            log=[*run.log[:at], one.record],
            checkpoints=[(at, name), (at + 1, "forked")],
        )

    # --- messages ---

    @rule(run_id=st.sampled_from(RUNS), name=st.sampled_from(["a", "../b"]), body=st.sampled_from([b"", b"{}"]))
    def send(self, run_id: str, name: str, body: bytes) -> None:
        run = self.runs.get(run_id)
        if run is None:
            with pytest.raises(RunNotFound):
                self.store.send(run_id, name, body)
        elif run.state is RunState.COMPLETED or name in dict(run.messages):
            with pytest.raises(MessageRefused):
                self.store.send(run_id, name, body)
        else:
            self.store.send(run_id, name, body)
            run.messages.append((name, body))

    # --- documents and the store itself ---

    @rule(run_id=st.sampled_from(RUNS), goal=st.sampled_from(["g", "a/b"]))
    def save_document(self, run_id: str, goal: str) -> None:
        self.store.save_run(Run(id=run_id, goal_id=goal))
        self.documents.setdefault(run_id, goal)
        self.documents[run_id] = goal

    @precondition(lambda self: self.durable)
    @rule(index=st.integers(0, 1))
    def reopen(self, index: int) -> None:
        self.handles[index].close()
        self.handles[index] = type(self).opener(self.folder, self.clock)

    # --- agreement ---

    @invariant()
    def agrees(self) -> None:
        store, now = self.store, self.clock.now
        listed = store.list_runs()
        expected = sorted(self.runs, key=lambda run_id: (self.runs[run_id].created_at, run_id), reverse=True)
        assert [record.run_id for record in listed] == expected
        for record in listed:
            run = self.runs[record.run_id]
            crashed = run.state is RunState.RUNNING and not run.held(now)
            assert record.state is (RunState.CRASHED if crashed else run.state)
            assert (record.owner, record.token, record.lease_until) == (run.owner, run.token, run.lease_until)
            error = None if run.state is RunState.RUNNING and run.held(now) else run.error
            assert (record.error, record.recovery_attempts) == (error, run.attempts)
            assert record.sequence == len(run.states) - 1
            rows = [(row.sequence, row.checkpoint_id) for row in store.read_checkpoint_rows(record.run_id)]
            assert rows == run.checkpoints[::-1]
            assert [row.record for row in store.read_log(record.run_id)] == run.log
            assert [(each.name, each.body) for each in store.read_messages(record.run_id)] == run.messages
            calls = [((each.step, each.number), each.record) for each in store.read_journal(record.run_id)]
            assert calls == sorted(run.journal.items())
            assert record.wake_at == run.wake_at
            for sequence in {0, record.sequence, *(sequence for sequence, _ in run.checkpoints)}:
                state = {key: codec.encode(value) for key, value in run.states[sequence].items()}
                assert state_at(store, sequence, record.run_id) == state
        due = [(run.wake_at, run_id) for run_id, run in self.runs.items() if run.wake_at is not None]
        assert [record.run_id for record in store.list_due()] == [run_id for at, run_id in sorted(due) if at <= now]
        counts = {run_id: len(run.messages) for run_id, run in self.runs.items() if run.messages}
        assert store.count_messages(RUNS) == counts
        assert [record.run_id for record in store.find_runs("r")] == [one for one in ("run_1",) if one in self.runs]
        assert store.list_all_runs() == list(self.documents)
        for goal in ("g", "a/b"):
            assert store.get_runs_by_goal(goal) == [one for one, found in self.documents.items() if found == goal]


def machine(name: str, request: pytest.FixtureRequest) -> type[StorageMachine]:
    """The state machine on one backend."""
    if name == "postgresql":
        database: str = request.getfixturevalue("postgres_database")

        def opener(folder: Path, clock: ManualClock) -> Storage:
            return PostgresStorage(f"{database}?schema={folder.name.replace('-', '_')}", clock=clock)

        return type(name, (StorageMachine,), {"opener": staticmethod(opener), "durable": True})
    openers: dict[str, Opener] = {
        "memory": lambda folder, clock: MemoryStorage(clock=clock),
        "sqlite": lambda folder, clock: SQLiteStorage(folder / "runs.db", clock=clock),
        "files": lambda folder, clock: FileStorage(folder, clock=clock),
    }
    return type(name, (StorageMachine,), {"opener": staticmethod(openers[name]), "durable": name != "memory"})


@pytest.mark.parametrize("name", ["memory", "sqlite", "files", "postgresql"])
def test_store_agrees_with_the_model(name: str, request: pytest.FixtureRequest) -> None:
    few = settings(max_examples=8, stateful_step_count=25, deadline=None, database=None)
    run_state_machine_as_test(machine(name, request), settings=few)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["memory", "sqlite", "files", "postgresql"])
def test_store_agrees_with_the_model_at_length(name: str, request: pytest.FixtureRequest) -> None:
    many = settings(max_examples=250, stateful_step_count=60, deadline=None, database=None)
    run_state_machine_as_test(machine(name, request), settings=many)
