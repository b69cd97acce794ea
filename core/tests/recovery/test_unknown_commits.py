"""A commit whose outcome is unknown when PostgreSQL's patience ends is told as that; no committed step runs again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from framework.schemas.run import RunState
from framework.storage.postgres import PostgresStorage
from tests.postgres_proxy import PostgresProxy

if TYPE_CHECKING:
    from tests.recovery.conftest import Agent

STEPS = ("a", "b", "c")


@pytest.fixture
def proxy(postgres_url: str) -> Iterator[PostgresProxy]:
    with PostgresProxy(postgres_url) as made:
        yield made


@pytest.fixture
def behind(agent_over: Callable[[PostgresStorage], Agent], proxy: PostgresProxy) -> Iterator[Agent]:
    """An agent over PostgreSQL behind the proxy, whose patience is short once the store is open."""
    with PostgresStorage(proxy.url) as store:
        store._database._patience = 0.05
        agent = agent_over(store)
        for name in STEPS:
            agent.node(name, lambda ctx: {f"{ctx.node_id}_out": 1})
        agent.chain(*STEPS)
        yield agent


def away_at_commit(proxy: PostgresProxy, number: int, *, arrives: bool) -> None:
    """Break the ``number``-th commit, before it arrives or before its answer does, and let nobody connect any more."""
    asked = 0

    def request(data: bytes) -> bool:
        nonlocal asked
        asked += b"commit_run" in data
        proxy.refuse |= asked == number and not arrives
        return proxy.refuse

    def answer(kind: bytes, payload: bytes) -> bool:
        proxy.refuse |= asked == number and kind == b"Z"
        return proxy.refuse

    proxy.cut_request = request
    if arrives:
        proxy.cut_answer = answer


def back(proxy: PostgresProxy, agent: Agent) -> None:
    """The database can be reached again, however long connecting takes."""
    assert isinstance(agent.storage, PostgresStorage)
    agent.storage._database._patience = 30
    proxy.cut_request = proxy.cut_answer = None
    proxy.refuse = False


@pytest.mark.parametrize("arrives", [True, False], ids=["answer lost", "request lost"])
@pytest.mark.parametrize("number", [1, 2, 3], ids=["first step", "middle step", "last step"])
async def test_a_run_whose_commit_is_not_known_goes_on_after_what_was_committed(
    behind: Agent, proxy: PostgresProxy, postgres_url: str, number: int, arrives: bool
) -> None:
    away_at_commit(proxy, number, arrives=arrives)
    first = await behind.run()
    assert not first.success
    assert "whether it was done is not known" in (first.error or "")
    assert "Nothing of this call was written" not in (first.error or "")
    assert behind.ran == [f"{name}#1" for name in STEPS[:number]]
    back(proxy, behind)
    with PostgresStorage(postgres_url) as direct:
        record = direct.find_run("run-1")
        assert record is not None
        assert record.sequence == number - (not arrives)
        assert record.state is (RunState.COMPLETED if record.sequence == len(STEPS) else RunState.RUNNING)
    result = await behind.run()
    assert behind.ran == [f"{name}#1" for name in STEPS[record.sequence :]]
    assert (result.success, result.path) == (True, list(STEPS))
    assert result.output == {f"{name}_out": 1 for name in STEPS}
    with PostgresStorage(postgres_url) as direct:
        assert [row.sequence for row in direct.read_log("run-1")][:3] == [1, 2, 3]
        assert direct.verify("run-1").ok
