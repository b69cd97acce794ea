"""One request of a tool loop that fails in a way that passes is made again, its tools not; after a kill as well."""

from __future__ import annotations

import asyncio
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from framework.errors import LLMRefused, LLMUnavailable
from framework.graph.journal import AttemptJournal, StepJournal
from framework.graph.journal_llm import JournaledLLM
from framework.graph.node import NodeContext
from framework.llm.provider import Tool, ToolResult, ToolUse
from framework.llm.tool_loop import Patience
from framework.storage.backend import open_storage
from framework.storage.memory import MemoryStorage
from tests import forks
from tests.journal.journal_kit import Bench
from tests.journal.patience_program import Model, Process

CORE = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("patience_program.py")
PAY = Tool("pay", "Pays.")
ASK = [{"role": "user", "content": "Pay."}]


class House:
    """A run of one node that talks to a model with one tool, in one of its ways."""

    def __init__(self, *script: Any, retries: int = 2) -> None:
        self.bench = Bench(MemoryStorage(), keep_journal=True)
        self.waits: list[float] = []
        self.paid: list[str] = []
        self.llm = Model(list(script))
        self.llm.patience = replace(Patience(retries), sleep=self.waits.append, sleep_async=self.wait)

    async def wait(self, seconds: float) -> None:
        self.waits.append(seconds)

    def pay(self, use: ToolUse) -> ToolResult:
        self.paid.append(use.id)
        return ToolResult(use.id, "paid")

    async def run(self, way: str, attempts: int = 1) -> Any:
        async def body(ctx: NodeContext) -> Any:
            given: dict[str, Any] = {"messages": ASK, "system": "", "tools": [PAY], "tool_executor": self.pay}
            if way == "sync":
                return (await asyncio.to_thread(ctx.llm.complete_with_tools, **given)).content
            return (await ctx.llm.acomplete_with_tools(**given)).content

        return await self.bench.run(body, llm=self.llm, attempts=attempts)


def use(number: int) -> ToolUse:
    return ToolUse(str(number), "pay", {})


BUSY = LLMUnavailable("down", status=503)


@pytest.mark.parametrize("way", ["sync", "async"])
async def test_a_request_after_tools_is_made_again_by_the_loop(way: str) -> None:
    house = House(use(1), BUSY, BUSY, use(2), BUSY, "done")
    result = await house.run(way)
    assert result.success, result.error
    assert (house.paid, house.waits) == (["1", "2"], [0.5, 1.0, 0.5])
    states = [call.state for call in house.bench.manager.journal("run") if call.name == "llm"]
    assert states == ["done", "failed", "failed", "done", "failed", "done"]


@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize(
    ("script", "retries", "waits"),
    [
        ([use(1), BUSY, "never"], 0, 0),
        ([use(1), LLMRefused("no"), "never"], 2, 0),
        ([use(1), BUSY, BUSY, "never"], 1, 1),
        ([BUSY, "never"], 2, 0),
    ],
    ids=["never again", "one that does not pass", "too often", "the first request"],
)
async def test_others_are_the_nodes(way: str, script: list[Any], retries: int, waits: int) -> None:
    house = House(*script, retries=retries)
    result = await house.run(way)
    assert not result.success
    assert len(house.waits) == waits
    assert house.llm.complete(messages=ASK).content == "never", "the script went no further"


@pytest.mark.parametrize("way", ["sync", "async"])
async def test_without_a_checkpoint_manager_tools_with_keys_are_not_used_again_either(way: str) -> None:
    house = House(use(1), BUSY, "done")
    journal = AttemptJournal(StepJournal("a#1", "run/a#1"))  # as the node makes one for the keys of its tools
    llm = JournaledLLM(house.llm, journal)
    keyed = Tool("pay", "Pays.", {"type": "object", "properties": {"idempotency_key": {"type": "string"}}})
    given: dict[str, Any] = {"messages": ASK, "system": "", "tools": [keyed], "tool_executor": house.pay}
    if way == "sync":
        reply = await asyncio.to_thread(llm.complete_with_tools, **given)
    else:
        reply = await llm.acomplete_with_tools(**given)
    assert (reply.content, house.paid, house.waits) == ("done", ["1"], [0.5])


@pytest.mark.parametrize("where", ["wait", "tool"])
async def test_a_killed_process_leaves_the_retry_to_the_next_one(where: str, tmp_path: Path) -> None:
    url, ledger = f"sqlite:///{tmp_path}/runs.db", tmp_path / "ledger"
    words = [sys.executable, str(PROGRAM), url, str(ledger), where]
    died = forks.run(words, cwd=CORE, timeout=50)
    assert died.returncode == -signal.SIGKILL
    before = ["asked after 0", "pays 0", "asked after 1", "pays 1", "asked after 2", "waits 7.5"]
    if where == "tool":
        before += ["asked after 2", "pays 2"]
    assert ledger.read_text().splitlines() == before
    with open_storage(url) as storage:
        process = Process(storage, ledger)
        result = await process.execute()
        if where == "tool":
            assert result.paused_at == "n"
            [lost] = [call for call in process.manager.journal("r") if call.state == "unknown"]
            process.manager.settle("r", lost.id, done="paid")
            result = await process.execute()
    assert (result.success, result.output["y"]) == (True, "paid")
    after = {
        "wait": ["waits 7.5", "asked after 2", "pays 2", "asked after 3"],
        "tool": ["asked after 3"],  # told what came of the retry, it does not wait for it
    }
    assert process.done()[len(before) :] == after[where]
