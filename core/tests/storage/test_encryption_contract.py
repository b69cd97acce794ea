"""Every backend meets the storage contract with its content encrypted, too."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest

from framework.storage.backend import Storage
from framework.storage.encryption import EncryptedStorage, KeyRing
from framework.storage.memory import MemoryStorage
from framework.testing import Check, StorageUnderTest, storage_checks
from tests.storage.conftest import Clock

KEYS = KeyRing([("old", b"o" * 32), ("new", b"n" * 32)])


@pytest.fixture
def encrypted(backend: StorageUnderTest) -> Iterator[StorageUnderTest]:
    """Every backend in turn, below the encryption."""
    plain = backend

    def new(clock: Clock) -> Storage:
        return EncryptedStorage(plain._factory(clock=clock), KEYS)

    def again(store: EncryptedStorage, clock: Clock) -> Storage:
        assert plain._reopen is not None
        return EncryptedStorage(plain._reopen(store.inner, clock=clock), KEYS)

    with StorageUnderTest(new, None if plain._reopen is None else again) as subject:
        yield subject


OF_STORED_BYTES = {"every_content_is_listed", "contents_are_replaced_where_unchanged"}
"""What an encrypted store hands through to the one below, on which it is checked."""

CHECKS = [check for check in storage_checks() if check.__name__ not in OF_STORED_BYTES]
LARGE = "large_values_are_kept_or_refused"
"""Takes seconds on each backend: over a store in memory always, over the others in the slow tests."""


@pytest.mark.parametrize(
    "check",
    [pytest.param(check, marks=pytest.mark.slow) if check.__name__ == LARGE else check for check in CHECKS],
    ids=lambda check: check.__name__,
)
def test_contract(check: Check, encrypted: StorageUnderTest) -> None:
    check(encrypted)


def test_large_values_are_kept_or_refused() -> None:
    [check] = [check for check in CHECKS if check.__name__ == LARGE]

    def new(clock: Clock) -> Storage:
        return EncryptedStorage(MemoryStorage(clock=clock), KEYS)

    with StorageUnderTest(new) as subject:
        check(subject)


def test_no_method_of_a_store_is_forgotten() -> None:
    # What these do, they do through the other methods of the store itself.
    over_others = {"save_checkpoint", "load_checkpoint", "load_latest_checkpoint", "list_checkpoints"}
    over_others |= {"load_summary", "sweep"}
    # Its commits encrypt before the inner store is reached, so they are made in the committer's thread.
    over_others |= {"try_hold", "let_go"}
    assert len(CHECKS) == len(storage_checks()) - len(OF_STORED_BYTES)
    methods = {name for name, _ in inspect.getmembers(Storage, inspect.isfunction) if not name.startswith("_")}
    assert methods - over_others <= vars(EncryptedStorage).keys()
