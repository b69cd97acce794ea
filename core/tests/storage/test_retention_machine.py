"""Retention as a state machine: random runs, parts, forks, pins and sweeps against a plain model of what must stay.

After each step everything that must be there has exactly its state at every checkpoint it keeps, can be claimed and
forked; everything else is gone, and nothing of it is left.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from framework.errors import RunPinned
from framework.schemas.retention import RetentionPolicy
from framework.schemas.run import Run, RunState
from framework.storage import codec
from framework.storage.backend import FileStorage, Storage
from framework.storage.chunks import diff
from framework.storage.contract import accept, commit, journal, new_run, state_at
from framework.storage.memory import MemoryStorage
from framework.storage.postgres import PostgresStorage
from framework.storage.records import Retention
from framework.storage.retention_records import SweepReport
from framework.storage.sqlite import SQLiteStorage
from framework.storage.sweeping import COMPLETED, FAILED, UNFINISHED, sweep
from framework.testing import ManualClock

Opener = Callable[[Path, ManualClock], Storage]
TABLES = ("steps", "checkpoints", "chunks", "journal", "messages", "pins")
KEYS = ("a", "b", "c")
ENDS = (RunState.COMPLETED, RunState.FAILED, RunState.CANCELLED, RunState.PAUSED)


@dataclass
class Model:
    """A run as it should be. ``checkpoints`` are those kept, with when they were made."""

    parent: str | None
    created_at: float
    updated_at: float
    state: RunState = RunState.CRASHED
    states: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: dict[int, float] = field(default_factory=dict)
    pins: set[int] = field(default_factory=set)
    fingerprint: str = ""

    def prune(self, going: Callable[[int], bool]) -> None:
        newest = max(self.checkpoints, default=0)
        gone = [each for each in self.checkpoints if each not in self.pins and each != newest and going(each)]
        for each in gone:
            del self.checkpoints[each]


class RetentionMachine(RuleBasedStateMachine):
    opener: Opener

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="surefoot-retention-"))
        self.clock = ManualClock()
        self.store = self.opener(self.folder, self.clock)
        self.runs: dict[str, Model] = {}
        self.gone: set[str] = set()
        self.made = 0

    def teardown(self) -> None:
        if isinstance(self.store, PostgresStorage):
            database = self.store._database
            database.transaction("drop it", lambda at, again: database.execute(at, "DROP SCHEMA {schema} CASCADE"))
        self.store.close()
        shutil.rmtree(self.folder)

    def pick(self, data: st.DataObject) -> tuple[str, Model]:
        run_id = data.draw(st.sampled_from(sorted(self.runs)), "run")
        return run_id, self.runs[run_id]

    def name(self) -> str:
        self.made += 1
        return f"run {self.made}"

    # --- runs ---

    @rule(data=st.data(), part=st.booleans(), definition=st.sampled_from(["f1", "f2"]))
    def begin(self, data: st.DataObject, part: bool, definition: str) -> None:
        parent = self.pick(data)[0] if part and self.runs else None
        run_id = self.name()
        initial = {"a": [1], "input": self.made}
        self.store.open_run(new_run(run_id, initial, parent_run_id=parent, fingerprint=definition))
        self.store.save_run(Run(id=run_id, goal_id="g"))
        self.runs[run_id] = Model(parent, self.clock.now, self.clock.now, states=[initial], fingerprint=definition)

    @precondition(lambda self: self.runs)
    @rule(
        data=st.data(),
        keep=st.sampled_from([None, None, 1, 2]),
        ends=st.sampled_from([None, RunState.COMPLETED, RunState.COMPLETED, *ENDS]),
        change=st.dictionaries(st.sampled_from(KEYS), st.sampled_from([None, "x", [1], [1, 2], "xy"]), max_size=3),
    )
    def go_on(self, data: st.DataObject, keep: int | None, ends: RunState | None, change: dict[str, Any]) -> None:
        run_id, model = self.pick(data)
        old = model.states[-1]
        new = {key: value for key, value in {**old, **change}.items() if value is not None}
        chunks = diff(*({key: codec.encode(value) for key, value in each.items()} for each in (old, new)))
        sequence = len(model.states)
        retention = Retention(keep)
        accept(self.store, commit(sequence, run_id, chunks=chunks, state=ends, retention=retention))
        accept(self.store, journal(("s", sequence, b"1"), run_id=run_id))
        model.states.append(new)
        model.checkpoints[sequence] = self.clock.now
        if ends is not None:
            model.state, model.updated_at = ends, self.clock.now
        if keep is not None:
            newest = sorted(model.checkpoints)[-keep:]
            model.prune(lambda each: each not in newest)

    @rule(whole=st.sampled_from(ENDS), part=st.sampled_from([None, *ENDS]))
    def finish_a_family(self, whole: RunState, part: RunState | None) -> None:
        """Families that ended are what sweeps are about; chance alone rarely makes one."""
        root = self.name()
        for run_id, parent, state in ((root, None, whole), (self.name(), root, part)):
            self.store.open_run(new_run(run_id, {"a": 1}, parent_run_id=parent, fingerprint="f3"))
            accept(self.store, commit(1, run_id, state=state))
            self.store.save_run(Run(id=run_id, goal_id="g"))
            at, shown = self.clock.now, state or RunState.CRASHED
            self.runs[run_id] = Model(parent, at, at, shown, [{"a": 1}] * 2, {1: at}, fingerprint="f3")

    @rule(state=st.sampled_from(ENDS), pinned=st.sampled_from([0, 2, 3]))
    def finish_a_pinned_run(self, state: RunState, pinned: int) -> None:
        """A run that stays though a rule takes it, with checkpoints that may grow too old."""
        run_id = self.name()
        self.store.open_run(new_run(run_id, {"a": 1}, fingerprint="f3"))
        for number in range(1, 5):
            accept(self.store, commit(number, run_id, state=state if number == 4 else None))
        self.store.save_run(Run(id=run_id, goal_id="g"))
        self.store.pin(run_id, f"ckpt_{pinned}" if pinned else None)
        at = self.clock.now
        made = dict.fromkeys(range(1, 5), at)
        self.runs[run_id] = Model(None, at, at, state, [{"a": 1}] * 5, made, {pinned}, fingerprint="f3")

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        run_id, model = self.pick(data)
        if not model.checkpoints:
            return
        at = data.draw(st.sampled_from(sorted(model.checkpoints)), "checkpoint")
        fork_id = self.name()
        self.store.fork_run(run_id, at, b"{}", commit(at + 1, fork_id, state=RunState.PAUSED))
        states = [model.states[0], *([{}] * (at - 1)), model.states[at], model.states[at]]
        self.runs[fork_id] = Model(
            None,
            self.clock.now,
            self.clock.now,
            RunState.PAUSED,
            states,
            {at: self.clock.now, at + 1: self.clock.now},  # what is copied is as old as the copy
            fingerprint=model.fingerprint,
        )

    @rule(seconds=st.integers(1, 50))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)

    # --- pins ---

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), pin=st.booleans())
    def pin(self, data: st.DataObject, pin: bool) -> None:
        run_id, model = self.pick(data)
        at = data.draw(st.sampled_from([0, *sorted(model.checkpoints)]), "what")
        row = next((row for row in self.store.read_checkpoint_rows(run_id) if row.sequence == at), None)
        name = None if row is None else row.checkpoint_id
        if pin:
            assert self.store.pin(run_id, name).sequence == at
            model.pins.add(at)
        else:
            assert self.store.unpin(run_id, name) == (at in model.pins)
            model.pins.discard(at)

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), force=st.booleans())
    def delete(self, data: st.DataObject, force: bool) -> None:
        run_id, model = self.pick(data)
        if model.pins and not force:
            with pytest.raises(RunPinned):
                self.store.delete_run(run_id)
        else:
            assert self.store.delete_run(run_id, force=force)
            self.forget([run_id])

    # --- sweeps ---

    @rule(
        max_age=st.sampled_from([None, 20, 60]),
        keep_completed=st.sampled_from([None, 0, 0, 2]),
        keep_failed=st.sampled_from([None, 0, 1]),
        unfinished=st.sampled_from([None, None, None, 40]),
        smallest=st.sampled_from([False, False, True]),
    )
    def sweep(
        self,
        max_age: int | None,
        keep_completed: int | None,
        keep_failed: int | None,
        unfinished: int | None,
        smallest: bool,
    ) -> None:
        policy = RetentionPolicy(
            max_age=None if max_age is None else timedelta(seconds=max_age),
            keep_completed=keep_completed,
            keep_failed=keep_failed,
            unfinished_max_age=None if unfinished is None else timedelta(seconds=unfinished),
            max_total_bytes=0 if smallest else None,
        )
        foretold = sweep(self.store, policy, dry_run=True, rest=lambda took, stop: None)
        self.check()  # it changed nothing
        report: SweepReport = sweep(self.store, policy, rest=lambda took, stop: None)
        expected = self.expected(policy)
        assert sorted(each.run_id for each in report.removed) == sorted(expected)
        said = (foretold.runs, foretold.parts, foretold.checkpoints, foretold.removed, foretold.kept, foretold.rules)
        assert said == (report.runs, report.parts, report.checkpoints, report.removed, report.kept, report.rules)
        self.forget([each for root in expected for each in self.family(root)])
        if max_age is not None:
            before = self.clock.now - max_age
            count = sum(len(model.checkpoints) for model in self.runs.values())
            for model in self.runs.values():
                if 0 not in model.pins:
                    young = [each for each, at in sorted(model.checkpoints.items()) if at >= before]
                    first = young[0] if young else len(model.states)
                    model.prune(set(range(first)).__contains__)
            assert count - sum(len(model.checkpoints) for model in self.runs.values()) == report.checkpoints

    def expected(self, policy: RetentionPolicy) -> list[str]:
        """The runs that a policy takes, said as plainly as possible."""
        now = self.clock.now
        roots = [run_id for run_id, model in self.runs.items() if model.parent not in self.runs]
        roots.sort(key=lambda each: (self.runs[each].updated_at, each))
        states = (*COMPLETED, *FAILED, *(UNFINISHED if policy.unfinished_max_age is not None else ()))
        going = []
        kinds = ((COMPLETED, policy.keep_completed), (FAILED, policy.keep_failed), (UNFINISHED, None))
        for kind, keep in kinds:
            ended = [each for each in roots if self.runs[each].state in kind]
            age = policy.unfinished_max_age if kind is UNFINISHED else policy.max_age
            for place, run_id in enumerate(ended):
                is_old = age is not None and self.runs[run_id].updated_at < now - age.total_seconds()
                is_over = keep is not None and place < len(ended) - keep
                is_too_much = policy.max_total_bytes is not None and kind is not UNFINISHED
                if is_old or is_over or is_too_much:
                    going.append(run_id)

        def may_go(run_id: str) -> bool:
            return all(self.runs[each].state in states and not self.runs[each].pins for each in self.family(run_id))

        return [each for each in going if may_go(each)]

    def family(self, run_id: str) -> list[str]:
        found = [run_id]
        for each in found:
            found += [key for key, model in self.runs.items() if model.parent == each]
        return found

    def forget(self, run_ids: list[str]) -> None:
        self.gone.update(run_ids)
        for each in run_ids:
            del self.runs[each]

    # --- what must be so ---

    @rule()
    def reopen(self) -> None:
        if isinstance(self.store, MemoryStorage):
            return
        self.store.close()
        self.store = self.opener(self.folder, self.clock)

    @invariant()
    def check(self) -> None:
        assert sorted(run.run_id for run in self.store.list_runs(limit=1000)) == sorted(self.runs)
        for run_id, model in self.runs.items():
            run = self.store.find_run(run_id)
            assert run is not None
            assert (run.state, run.sequence) == (model.state, len(model.states) - 1)
            rows = [row.sequence for row in self.store.read_checkpoint_rows(run_id)]
            assert rows == sorted(model.checkpoints, reverse=True)
            for sequence in {0, *rows, len(model.states) - 1}:
                expected = {key: codec.encode(value) for key, value in model.states[sequence].items()}
                assert state_at(self.store, sequence, run_id) == expected
            assert {pin.sequence for pin in self.store.list_pins([run_id])} == model.pins
            assert self.store.load_run(run_id) is not None or run.header == b"{}"  # a fork has no document
            assert self.store.definition(model.fingerprint) is not None
        for run_id in self.gone:
            assert self.store.load_run(run_id) is None
            assert self.store.read_journal(run_id) == []

    def no_orphans(self) -> None:
        while self.store.purge(1.0):
            pass
        assert self.store.verify().ok
        tables = [f"{table} WHERE run_pk NOT IN (SELECT pk FROM %runs)" for table in TABLES]
        for what in (*tables, "definitions WHERE fingerprint NOT IN (SELECT fingerprint FROM %runs)"):
            query = f"SELECT count(*) FROM %{what}"
            if isinstance(self.store, SQLiteStorage):
                assert self.store._db.execute(query.replace("%", "")).fetchone()[0] == 0, what
            elif isinstance(self.store, PostgresStorage):
                assert self.store._database.query("count", query.replace("%", "{schema}.")) == [(0,)], what

    @precondition(lambda self: self.runs)
    @rule(data=st.data())
    def all_is_well(self, data: st.DataObject) -> None:
        """Nothing is left over, and any run can be taken up."""
        self.no_orphans()
        run_id, model = self.pick(data)
        if model.state is not RunState.COMPLETED:
            claimed = self.store.claim_run(run_id, "me", 5)
            assert claimed.sequence == len(model.states) - 1
            self.store.release_lease(run_id, claimed.token)
            model.state, model.updated_at = RunState.CRASHED, self.clock.now


def open_memory(folder: Path, clock: ManualClock) -> Storage:
    return MemoryStorage(clock=clock)


def open_sqlite(folder: Path, clock: ManualClock) -> Storage:
    return SQLiteStorage(folder / "runs.db", clock=clock)


def open_files(folder: Path, clock: ManualClock) -> Storage:
    return FileStorage(folder, clock=clock)


def open_postgres(database: str) -> Opener:
    """Stores in one database, each in a schema named after its folder."""

    def opener(folder: Path, clock: ManualClock) -> Storage:
        return PostgresStorage(f"{database}?schema={folder.name.lower().replace('-', '_')}", clock=clock)

    return opener


def run_machine(opener: Opener, examples: int, steps: int) -> None:
    machine = type("Machine", (RetentionMachine,), {"opener": staticmethod(opener)})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None)
    )


@pytest.mark.parametrize(
    ("opener", "examples"), [(open_memory, 40), (open_sqlite, 4), (open_files, 3)], ids=["memory", "sqlite", "files"]
)
def test_retention_keeps_what_it_must(opener: Opener, examples: int) -> None:
    run_machine(opener, examples, 25)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("opener", [open_memory, open_sqlite, open_files], ids=["memory", "sqlite", "files"])
def test_retention_keeps_what_it_must_at_length(opener: Opener) -> None:
    run_machine(opener, 1000 if opener is open_memory else 100, 50)


def test_retention_keeps_what_it_must_in_postgresql(postgres_database: str) -> None:
    run_machine(open_postgres(postgres_database), 2, 15)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_retention_keeps_what_it_must_in_postgresql_at_length(postgres_database: str) -> None:
    run_machine(open_postgres(postgres_database), 40, 50)
