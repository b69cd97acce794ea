"""For all tests: a private PostgreSQL, started once in each process of pytest by the first test that asks; and forks in
place of new interpreters, unless the test is a slow one.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from tests import forks
from tests.postgres_server import PostgresServer, running_postgres


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    forks.is_on = item.get_closest_marker("slow") is None


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A server for all tests of this process. Take a database of your own from it: ``postgres.new_database()``.

    Whoever stops, restarts or slows it starts another one with ``running_postgres()``.
    """
    with running_postgres(fsync=False) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_database(postgres: PostgresServer) -> str:
    """The URL of a database that all tests of this process share; they differ in the schema."""
    return postgres.new_database()


@pytest.fixture
def postgres_url(postgres_database: str) -> str:
    """The URL of a store that is not there yet."""
    return f"{postgres_database}?schema=t_{uuid.uuid4().hex}"
