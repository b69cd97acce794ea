"""Every backend meets the storage contract, and the contract notices a store that does not."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from framework.errors import MessageRefused
from framework.schemas.run import RunState
from framework.storage.backend import FileStorage, Storage, open_storage
from framework.storage.chunks import Chunk
from framework.storage.interface import Rewrite
from framework.storage.memory import MemoryStorage
from framework.storage.records import NO_TOKEN, Commit, Damage, JournalRow, NewRun, Retention, RunRecord, Write
from framework.storage.retention_records import Retired
from framework.storage.sqlite import SQLiteStorage
from framework.testing import Check, StorageUnderTest, check_storage, storage_checks


@pytest.mark.parametrize("check", storage_checks(), ids=lambda check: check.__name__)
def test_contract(check: Check, backend: StorageUnderTest) -> None:
    check(backend)


def test_a_good_store_passes_as_a_whole() -> None:
    check_storage(MemoryStorage)


class IgnoresTokens(MemoryStorage):
    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        current = [self.find_run(one.run_id) for one in commits]
        tokens = [NO_TOKEN if run is None or run.owner is None else run.token for run in current]
        return super().commit([replace(one, token=token) for one, token in zip(commits, tokens, strict=True)])


class ForgetsTheLastChunk(MemoryStorage):
    def read_chunks(self, run_id: str, sequence: int) -> list[Chunk]:
        return super().read_chunks(run_id, sequence)[:-1]


class PrunesNothing(MemoryStorage):
    def prune(self, run_id: str, retention: Retention) -> int:
        return 0


class OverwritesRuns(MemoryStorage):
    def open_run(self, new: NewRun, owner: str | None = None, lease_seconds: float = 0.0) -> RunRecord:
        self.delete_run(new.run_id)
        return super().open_run(new, owner, lease_seconds)


class TakesAnAnswerTwice(MemoryStorage):
    def send(self, run_id: str, name: str, body: bytes) -> None:
        with suppress(MessageRefused):
            super().send(run_id, name, body)


class ForksWithoutTheInput(MemoryStorage):
    def fork_run(
        self, run_id: str, sequence: int, header: bytes, first: Commit, rewrite: Rewrite | None = None
    ) -> RunRecord:
        record = super().fork_run(run_id, sequence, header, first, rewrite)
        self._db.execute(
            "DELETE FROM chunks WHERE sequence = 0 AND run_pk = (SELECT pk FROM runs WHERE run_id = ?)", (first.run_id,)
        )
        return record


class FindsByPattern(MemoryStorage):
    def find_runs(self, prefix: str, limit: int = 100) -> list[RunRecord]:
        pattern = prefix.replace("_", ".").replace("%", ".*")
        found = [record for record in super().find_runs("", 1_000) if re.match(pattern, record.run_id, re.IGNORECASE)]
        return found[:limit]


class KeepsTheJournal(MemoryStorage):
    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        return super().commit([replace(one, journal_done=()) if isinstance(one, Commit) else one for one in commits])


class WritesTheJournalFirst(MemoryStorage):
    """Does not keep the order of commits and journal writes."""

    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        order = sorted(range(len(commits)), key=lambda index: isinstance(commits[index], Commit))
        outcomes = dict(zip(order, super().commit([commits[index] for index in order]), strict=True))
        return [outcomes[index] for index in range(len(commits))]


class MixesUpSteps(MemoryStorage):
    def read_journal(
        self, run_id: str, step: str | None = None, on_damage: Callable[[Damage], None] | None = None
    ) -> list[JournalRow]:
        rows = super().read_journal(run_id, None, on_damage)
        return [row for row in rows if step is None or row.step.startswith(step)]


class NeverForgetsTheTime(MemoryStorage):
    def list_due(self, now: float | None = None, limit: int = 100, after: RunRecord | None = None) -> list[RunRecord]:
        return sorted(super().list_due(1e15, limit, after), key=lambda record: record.wake_at or 0)


class ForgetsWhereItWasDue(MemoryStorage):
    def list_due(self, now: float | None = None, limit: int = 100, after: RunRecord | None = None) -> list[RunRecord]:
        later = [run for run in super().list_due(now, 1_000) if after is None or run.run_id > after.run_id]
        return later[:limit]


class ListsAnyRunWithMessages(MemoryStorage):
    def list_messaged(self, limit: int = 100, after: str = "") -> list[RunRecord]:
        runs = [run for run in self.find_runs("", 1_000) if run.run_id > after and self.read_messages(run.run_id)]
        return runs[:limit]


class PagesFromTheStart(MemoryStorage):
    def list_messaged(self, limit: int = 100, after: str = "") -> list[RunRecord]:
        return [run for run in super().list_messaged(limit) if run.run_id > after]


class RemovesWhatChanged(MemoryStorage):
    def retire_runs(
        self, runs: Sequence[RunRecord], states: Sequence[RunState], seconds: float = 0.004, *, dry_run: bool = False
    ) -> list[Retired]:
        now = [self.find_run(run.run_id) or run for run in runs]
        return super().retire_runs(now, states, seconds, dry_run=dry_run)


class ForgetsPinsAtCommits(MemoryStorage):
    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        self._db.execute("DELETE FROM pins WHERE sequence > 0")
        return super().commit(commits)


class LeavesPartsBehind(MemoryStorage):
    def purge(self, seconds: float = 0.004) -> bool:
        self._db.execute("DELETE FROM retired")
        return False


@pytest.mark.parametrize(
    ("broken", "noticed_by"),
    [
        (RemovesWhatChanged, "active_runs_are_never_retired"),
        (ForgetsPinsAtCommits, "pinned_checkpoints_outlive_retention"),
        (LeavesPartsBehind, "room_is_given_back"),
        (ListsAnyRunWithMessages, "runs_with_messages_come_and_go"),
        (PagesFromTheStart, "paused_runs_with_messages_are_listed"),
        (KeepsTheJournal, "rows_go_with_the_commit_of_their_step"),
        (WritesTheJournalFirst, "batches_mix_commits_and_journals"),
        (MixesUpSteps, "journal_keys_are_checked"),
        (NeverForgetsTheTime, "paused_runs_become_due"),
        (ForgetsWhereItWasDue, "paused_runs_become_due"),
        (TakesAnAnswerTwice, "message_names_are_taken_once"),
        (ForksWithoutTheInput, "forks_are_whole"),
        (FindsByPattern, "runs_are_found_by_prefix"),
        (IgnoresTokens, "claim_grows_the_token"),
        (ForgetsTheLastChunk, "retention_keeps_exact_states"),
        (PrunesNothing, "prune_applies_retention_now"),
        (OverwritesRuns, "open_run_has_one_winner"),
    ],
)
def test_a_broken_store_is_noticed(broken: type[MemoryStorage], noticed_by: str) -> None:
    [check] = [check for check in storage_checks() if noticed_by in check.__name__]
    with StorageUnderTest(broken) as subject, pytest.raises(Exception):  # noqa: B017 - whatever the check raises
        check(subject)


def test_all_that_is_broken_is_told_by_the_name_of_its_check() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        check_storage(PrunesNothing)
    notes = [note for error in caught.value.exceptions for note in error.__notes__]
    assert any("prune_applies_retention_now" in note for note in notes), notes


@pytest.mark.parametrize(
    ("url", "kind", "shown"),
    [
        ("memory://", MemoryStorage, "memory://"),
        ("sqlite:///{}/a b%25/runs.db", SQLiteStorage, "sqlite:///{}/a%20b%25/runs.db"),
        ("file://{}/a b%3F", FileStorage, "file://{}/a%20b%3F"),
    ],
)
def test_a_store_opens_by_its_url(url: str, kind: type[Storage], shown: str, tmp_path: Path) -> None:
    with open_storage(url.format(tmp_path)) as store:
        assert isinstance(store, kind)
        assert store.url == shown.format(tmp_path)
        store.open_run(NewRun("run_1", "graph", "g", "f", b"{}", b"{}"))
    with open_storage(store.url) as again:
        assert again.url == store.url
        assert (again.find_run("run_1") is None) == (kind is MemoryStorage)


def test_a_relative_url_stays_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_storage("sqlite:///runs.db"), open_storage("file:folder") as files:
        assert (tmp_path / "runs.db").exists()
        assert (tmp_path / "folder" / "runs").is_dir()
        assert files.url == f"file://{tmp_path}/folder"
