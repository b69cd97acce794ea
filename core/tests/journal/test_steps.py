"""Journaled calls inside steps of a graph: over ends of the process, with models, tools, and the store's commits."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from framework.errors import StorageError, UnstorableValue
from framework.graph.journal import current_idempotency_key
from framework.graph.node import FunctionNode, LLMNode, NodeContext, NodeSpec
from framework.llm.provider import LLMProvider, LLMResponse, Tool, ToolResult, ToolUse
from framework.llm.scripted import ScriptedLLM
from framework.storage import codec
from framework.storage.backend import open_storage
from framework.storage.interface import Storage
from framework.storage.memory import MemoryStorage
from framework.storage.records import JournalRow, JournalWrite, Write
from tests.graph.executor_kit import edge, graph_of
from tests.journal.journal_kit import Bench, Node


@pytest.fixture(params=["memory", "sqlite", "file", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    urls = {"memory": "memory://", "sqlite": f"sqlite:///{tmp_path}/runs.db", "file": f"file://{tmp_path}/store"}
    url = urls.get(request.param) or request.getfixturevalue("postgres_url")
    with open_storage(url) as opened:
        yield opened


class Stop:
    """Cancels the task that runs the node, at one call: the nearest to a crash that one process has."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.made: list[Any] = []

    def reach(self, what: Any) -> str:
        self.made.append(what)
        if len(self.made) == self.at:
            self.at = None
            raise asyncio.CancelledError
        return f"{what}: {len(self.made)}"

    async def later(self) -> str:
        return self.reach("stop")


async def test_calls_of_a_cancelled_step_are_answered_and_go_with_its_commit(storage: Storage) -> None:
    outside = Stop(at=3)

    async def fetch(what: str) -> str:
        return outside.reach(what)

    async def body(ctx: NodeContext) -> list[str]:
        return [await ctx.call("fetch", fetch, f"page {number}") for number in range(4)]

    bench = Bench(storage)
    await bench.cancelled(body)
    assert [(each.id, each.state, each.answer) for each in bench.manager.journal("run")] == [
        ("a#1/1", "done", "page 0: 1"),
        ("a#1/2", "done", "page 1: 2"),
    ]
    result = await bench.run(body)
    assert result.success, result.error
    assert outside.made == ["page 0", "page 1", "page 2", "page 2", "page 3"]
    assert result.output["value"] == ["page 0: 1", "page 1: 2", "page 2: 4", "page 3: 5"]
    assert bench.manager.journal("run") == []
    assert storage.verify().ok


async def test_the_journal_stays_for_audit_when_asked_to(storage: Storage) -> None:
    async def body(ctx: NodeContext) -> str:
        value: str = await ctx.call("fetch", str, 7)
        return value

    bench = Bench(storage, keep_journal=True)
    assert (await bench.run(body)).success
    (call,) = bench.manager.journal("run")
    assert (call.name, call.answer, call.step, call.key.startswith("run/a#1/fetch#")) == ("fetch", "7", "a#1", True)


async def test_a_retried_attempt_makes_its_calls_anew_unless_the_config_keeps_them() -> None:
    for keep, expected in ((False, 2), (True, 1)):
        made: list[int] = []

        async def body(ctx: NodeContext, made: list[int] = made) -> int:
            await ctx.call("fetch", made.append, 1)
            if ctx.attempt == 1:
                raise RuntimeError("no good")
            return len(made)

        bench = Bench(MemoryStorage(), keep_journal_on_retry=keep)
        result = await bench.run(body, attempts=2)
        assert (result.success, len(made)) == (True, expected)


async def test_the_journal_of_a_step_that_failed_for_good_is_not_used_when_the_run_is_resumed() -> None:
    made: list[int] = []

    async def body(ctx: NodeContext) -> int:
        await ctx.call("fetch", made.append, 1)
        if len(made) == 1:
            raise RuntimeError("no good")
        return len(made)

    bench = Bench(MemoryStorage())
    assert not (await bench.run(body)).success
    assert (await bench.run(body)).output["value"] == 2


class Counting(MemoryStorage):
    """Counts what is written together and what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.transactions: list[list[str]] = []

    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        self.transactions.append(["journal" if isinstance(each, JournalWrite) else "commit" for each in commits])
        return super().commit(commits)


async def test_a_call_costs_one_commit_an_effect_two_and_a_step_without_calls_none_more() -> None:
    async def nothing(ctx: NodeContext) -> str:
        return "x"

    async def calls(ctx: NodeContext) -> None:
        for number in range(3):
            await ctx.call("fetch", str, number)

    async def effect(ctx: NodeContext) -> None:
        await ctx.call("send", str, 1, policy="ask")

    for body, expected in ((nothing, []), (calls, ["journal"] * 3), (effect, ["journal"] * 2)):
        storage = Counting()
        assert (await Bench(storage).run(body)).success
        assert [each for group in storage.transactions for each in group] == [*expected, "commit"]


async def test_answers_of_concurrent_calls_share_transactions() -> None:
    async def body(ctx: NodeContext) -> None:
        await asyncio.gather(*(ctx.call("fetch", _now, number) for number in range(50)))

    storage = Counting()
    assert (await Bench(storage).run(body)).success
    written = [len(each) for each in storage.transactions if each[0] == "journal"]
    assert sum(written) == 50
    assert len(written) < 25, f"50 calls that end together took {len(written)} transactions"


async def _now(value: int) -> int:
    return value


async def test_without_a_manager_nothing_is_written_and_calls_are_made_directly(tmp_path: Path) -> None:
    from framework.graph.executor import GraphExecutor
    from tests.graph.executor_kit import GOAL, MinimalRuntime

    seen: list[str] = []

    async def body(ctx: NodeContext) -> Any:
        assert ctx.journal is None
        await ctx.sleep(0)
        unstorable = await ctx.call("make", object)
        return [
            await ctx.call("key", lambda idempotency_key: idempotency_key),
            isinstance(unstorable, object),
            await ctx.call("list", seen.append, "x"),
        ]

    executor = GraphExecutor(MinimalRuntime(), node_registry={"a": Node(body)})
    result = await executor.execute(graph_of("a"), GOAL, {}, run_id="run")
    assert result.success, result.error
    assert result.output["value"][0].startswith("run/a#1/key#")
    assert seen == ["x"]
    assert os.listdir(tmp_path) == []


async def test_a_call_takes_sync_and_async_functions_and_refuses_what_is_neither_a_call() -> None:
    async def body(ctx: NodeContext) -> Any:
        for wrong in ({"name": "", "fn": str}, {"name": "x", "fn": "not a function"}):
            with pytest.raises((ValueError, TypeError), match=r"ctx\.call"):
                await ctx.call(**wrong)
        with pytest.raises(ValueError, match="policy"):
            await ctx.call("x", str, policy="maybe")  # type: ignore[arg-type]
        with pytest.raises(UnstorableValue, match=r"the arguments of ctx\.call\('x'\)\[0\]\[0\]"):
            await ctx.call("x", str, object())
        return await ctx.call("x", sorted, [3, 1], reverse=True)

    result = await Bench(MemoryStorage()).run(body)
    assert result.output["value"] == [3, 1], result.error


async def test_each_call_has_a_key_of_its_own_the_same_in_every_attempt_and_another_in_another_visit() -> None:
    keys: list[tuple[str, ...]] = []

    def note(what: str, idempotency_key: str) -> str:
        assert current_idempotency_key() == idempotency_key
        return idempotency_key

    async def body(ctx: NodeContext) -> int:
        made = tuple([await ctx.call("note", note, each) for each in ("x", "x", "y")])
        keys.append((ctx.idempotency_key, *made))
        if len(keys) in (1, 3):
            raise RuntimeError("once more")
        return len(keys)

    graph = graph_of(
        NodeSpec(id="a", max_retries=2, retry_delay_seconds=0),
        edges=[edge("a", "a", "conditional", condition_expr="value < 4")],
    )
    assert (await Bench(MemoryStorage()).run(body, graph=graph)).success
    assert current_idempotency_key() is None
    first, first_again, second, second_again = keys
    assert first == first_again
    assert second == second_again
    assert len({*first, *second}) == 8
    assert first[0] == "run/a#1"
    assert second[0] == "run/a#2"


async def test_a_function_node_gives_the_step_its_key() -> None:
    def function(**given: Any) -> Any:
        return given

    def keyed(topic: str, idempotency_key: str) -> str:
        return f"{topic} {idempotency_key}"

    graph = graph_of(NodeSpec(id="a", node_type="function", input_keys=["topic"], output_keys=["value"]))
    bench = Bench(MemoryStorage())
    result = await bench.run(FunctionNode(keyed), graph=graph, input_data={"topic": "rivers"})
    assert result.output["value"] == "rivers run/a#1"
    given = {"topic": "rivers", "idempotency_key": "own"}
    spec = NodeSpec(id="a", node_type="function", input_keys=["topic", "idempotency_key"], output_keys=["value"])
    result = await bench.run(FunctionNode(keyed), graph=graph_of(spec), input_data=given, run_id="two")
    assert result.output["value"] == "rivers own"
    result = await bench.run(FunctionNode(function), graph=graph, input_data=given, run_id="three")
    assert result.output["value"] == {"topic": "rivers"}


# --- models and tools -----------------------------------------------------------------------------------------------

BOOK = Tool("book", "Books a seat.", {"properties": {"seat": {"type": "string"}, "idempotency_key": {}}}, effects=True)
LOOK = Tool("look", "Looks.", {"properties": {"at": {"type": "string"}}})
SCRIPT: list[Any] = [
    ToolUse("1", "look", {"at": "train"}),
    [ToolUse("2", "look", {"at": "seat"}), ToolUse("3", "book", {"seat": "7A"})],
    "You are booked.",
]
LLM_GRAPH = graph_of(NodeSpec(id="a", tools=["look", "book"], output_keys=["value"], max_retries=1))


class Whole(LLMProvider):
    """A provider of a program's own, which drives its loop itself, in a thread."""

    def __init__(self, inner: ScriptedLLM) -> None:
        self.inner = inner

    def complete(self, *args: Any, **keywords: Any) -> LLMResponse:
        return self.inner.complete(*args, **keywords)

    def complete_with_tools(self, *args: Any, **keywords: Any) -> LLMResponse:
        return self.inner.complete_with_tools(*args, **keywords)


class Async(Whole):
    """One whose own loop is async."""

    async def acomplete_with_tools(self, *args: Any, **keywords: Any) -> LLMResponse:
        executor = keywords.pop("tool_executor")
        while True:
            turn = self.inner.turn(keywords["messages"], keywords.get("system"), keywords["tools"])
            if not turn.uses:
                return turn.response
            results = [await executor(use) for use in turn.uses]
            told = [{"role": "user", "content": [str(each.content) for each in results]}]
            keywords["messages"] = [*keywords["messages"], {"role": "assistant", "content": "tools"}, *told]


def scripted() -> ScriptedLLM:
    return ScriptedLLM({"": SCRIPT})


def sync_executor(outside: Stop) -> Callable[[ToolUse], ToolResult]:
    def run(use: ToolUse) -> ToolResult:
        return ToolResult(use.id, outside.reach((use.name, *use.input.values())))

    return run


def async_executor(outside: Stop) -> Callable[[ToolUse], Any]:
    async def run(use: ToolUse) -> ToolResult:
        return sync_executor(outside)(use)

    return run


@pytest.mark.parametrize("executor", [sync_executor, async_executor])
@pytest.mark.parametrize("make", [scripted, lambda: Whole(scripted()), lambda: Async(scripted())])
async def test_models_and_tools_are_answered_from_the_journal(make: Any, executor: Any) -> None:
    reference = await Bench(MemoryStorage()).run(
        LLMNode(executor(Stop(None))),
        llm=make(),
        tools=[LOOK, BOOK],
        graph=LLM_GRAPH,
    )
    assert reference.output["value"] == "You are booked."
    for at in (1, 2):
        outside, llm = Stop(at), make()
        calls = getattr(llm, "inner", llm)
        bench = Bench(MemoryStorage())
        node = LLMNode(executor(outside))
        options: dict[str, Any] = {"llm": llm, "tools": [LOOK, BOOK], "graph": LLM_GRAPH}
        await bench.cancelled(node, **options)
        result = await bench.run(node, **options)
        assert result.success, (result.error, bench.runtime.problems)
        assert result.total_tokens == reference.total_tokens, "replayed tokens count once"
        assert result.total_cost == reference.total_cost
        wanted = [("look", "train"), ("look", "seat"), ("book", "7A")]
        wanted.insert(at, wanted[at - 1])
        assert [each[:2] for each in outside.made] == wanted
        key = outside.made[-1][2]
        assert key.startswith("run/a#1/tool:book#")
        if make is scripted:
            assert calls.calls == 3, "a turn that had ended was asked again"
        assert bench.runtime.problems == []


async def test_the_model_is_not_told_of_the_key_parameter_with_or_without_a_manager() -> None:
    from framework.graph.executor import GraphExecutor
    from tests.graph.executor_kit import GOAL, MinimalRuntime

    told: list[dict[str, Any]] = []
    made: list[dict[str, Any]] = []

    def script(messages: Any, system: Any, tools: list[Tool]) -> Any:
        told.extend(tool.parameters for tool in tools)
        return ToolUse("1", "book", {"seat": "7A"}) if len(messages) == 1 else "done"

    def run(use: ToolUse) -> ToolResult:
        made.append(use.input)
        return ToolResult(use.id, "booked")

    for manager in (None, Bench(MemoryStorage()).manager):
        executor = GraphExecutor(MinimalRuntime(), ScriptedLLM(script), [BOOK], run, checkpoint_manager=manager)
        graph = graph_of(NodeSpec(id="a", tools=["book"], max_retries=1))
        assert (await executor.execute(graph, GOAL, {}, run_id="run")).success
    assert all(each == {"properties": {"seat": {"type": "string"}}} for each in told)
    assert made[0] == made[1]
    assert made[0]["idempotency_key"].startswith("run/a#1/tool:book#")


async def test_a_tool_with_effects_that_was_in_flight_waits_for_somebody() -> None:
    outside, bench = Stop(at=3), Bench(MemoryStorage())
    node = LLMNode(async_executor(outside))
    options: dict[str, Any] = {"llm": scripted(), "tools": [LOOK, BOOK], "graph": LLM_GRAPH}
    await bench.cancelled(node, **options)
    (unknown,) = [each for each in bench.manager.journal("run") if each.state == "unknown"]
    assert unknown.name == "tool:book"
    for _ in range(2):
        result = await bench.run(node, **options)
        assert result.paused_at == "a"
    assert len(outside.made) == 3
    bench.manager.settle("run", unknown.id, done="Seat 7A is yours.")
    result = await bench.run(node, **options)
    assert result.output["value"] == "You are booked.", result.error
    assert len(outside.made) == 3


async def test_a_node_of_ones_own_that_asks_the_model_directly_is_counted_and_answered() -> None:
    llm = ScriptedLLM(["one", "two", "three"])
    stop = Stop(at=1)

    async def body(ctx: NodeContext) -> list[str]:
        first = ctx.llm.complete([{"role": "user", "content": "1"}])
        second = await ctx.llm.acomplete(messages=[{"role": "user", "content": "2"}])
        third = await asyncio.to_thread(ctx.llm.complete, [{"role": "user", "content": "3"}], system="s")
        await ctx.call("stop", stop.later)
        return [first.content, second.content, third.content, ctx.llm.model]

    bench = Bench(MemoryStorage())
    await bench.cancelled(body, llm=llm)
    result = await bench.run(body, llm=llm)
    assert result.output["value"] == ["one", "two", "three", "scripted"], result.error
    assert llm.calls == 3
    assert result.total_tokens == llm.input_tokens + llm.output_tokens
    assert result.total_cost == pytest.approx(llm.cost_usd)


async def test_the_question_on_an_edge_is_a_call_of_the_step(tmp_path: Path) -> None:
    llm = ScriptedLLM({"": '{"proceed": true}'})
    graph = graph_of("a", "b", edges=[edge("a", "b", "llm_decide")])

    async def body(ctx: NodeContext) -> str:
        return "x"

    storage = Counting()
    assert (await Bench(storage).run(body, body, llm=llm, graph=graph)).path == ["a", "b"]
    assert [each for group in storage.transactions for each in group] == ["journal", "commit", "commit"]


# --- the store ------------------------------------------------------------------------------------------------------


async def test_a_value_of_50_megabytes_is_stored_and_answered(tmp_path: Path) -> None:
    large = "x" * 50_000_000
    made: list[int] = []
    stop = Stop(at=1)

    def fetch() -> str:
        made.append(1)
        return large

    async def body(ctx: NodeContext) -> int:
        size = len(await ctx.call("fetch", fetch))
        await ctx.call("stop", stop.later)
        return size

    with open_storage(f"sqlite:///{tmp_path}/runs.db") as storage:
        bench = Bench(storage)
        await bench.cancelled(body)
        result = await bench.run(body)
    assert (result.output.get("value"), made) == (50_000_000, [1]), result.error


async def test_a_value_beyond_the_limit_is_refused_with_the_limit_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("framework.graph.journal_spec.MAX_VALUE_BYTES", 1000)

    async def body(ctx: NodeContext) -> Any:
        return await ctx.call("fetch", lambda: "x" * 2000)

    result = await Bench(MemoryStorage()).run(body)
    assert result.error is not None
    assert "the answer of call 'fetch'" in result.error
    assert "1,000 (MAX_VALUE_BYTES)" in result.error


class Failing(MemoryStorage):
    """Refuses journal rows."""

    def commit(self, commits: Sequence[Write]) -> list[Exception | None]:
        if any(isinstance(each, JournalWrite) for each in commits):
            raise StorageError("the disk is full")
        return super().commit(commits)


async def test_a_row_that_cannot_be_written_ends_the_run_even_when_the_node_hides_it() -> None:
    async def body(ctx: NodeContext) -> str:
        try:
            await ctx.call("fetch", str, 1)
        except Exception:  # noqa: BLE001 - what a careless node does
            return "nothing happened"
        return "recorded"

    storage = Failing()
    result = await Bench(storage).run(body)
    assert result.error is not None
    assert "the disk is full" in result.error
    bench = Bench(Failing(), on_commit_error="continue")
    result = await bench.run(body)
    assert result.output["value"] == "recorded"
    assert any("not recorded" in text for _, text in bench.runtime.problems)


async def test_rows_left_of_steps_that_did_not_come_again_go_when_the_run_completes() -> None:
    stop = Stop(at=1)

    async def body(ctx: NodeContext) -> str:
        return await stop.later()

    storage = MemoryStorage()
    bench = Bench(storage)
    await bench.cancelled(body)
    token = storage.claim_run("run", "test", 30).token
    storage.commit([JournalWrite("run", token, [JournalRow("z#1", 1, ROW)])])
    storage.release_lease("run", token)
    assert (await bench.run(body)).success
    assert storage.read_journal("run") == []


ROW = codec.encode(
    {"kind": "call", "name": "x", "request": "r", "occ": 1, "quiet": True, "state": "done", "answer": 1, "at": 1.0}
)
