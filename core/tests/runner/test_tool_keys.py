"""Tools that ask for their call's idempotency key: the model is not told of it, and the call has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from framework.llm.provider import Message, Tool, ToolUse
from framework.llm.scripted import ScriptedLLM
from framework.llm.tool_loop import Turn
from framework.runner import ToolRegistry, tool
from tests.runner.keys_kit import Calls, run_durably


async def test_a_tool_is_given_its_calls_key_and_the_model_is_not_told_of_it() -> None:
    given: list[tuple[str, str]] = []

    @tool(effects=True)
    async def pay(amount: float, idempotency_key: str) -> str:
        """Pay."""
        given.append((idempotency_key, str(amount)))
        return "paid"

    @tool
    def look(idempotency_key: str = "") -> str:
        """Look, in a thread."""
        given.append((idempotency_key, "look"))
        return "seen"

    told: dict[str, Any] = {}

    class Told(ScriptedLLM):
        def turn(self, messages: Sequence[Message], system: str | None, tools: Sequence[Tool]) -> Turn:
            told.update({each.name: each.parameters for each in tools})
            return super().turn(messages, system, tools)

    llm = Told(
        [
            [ToolUse("1", "pay", {"amount": 5.0}), ToolUse("2", "look", {})],
            ToolUse("3", "pay", {"amount": 5.0}),
            "all is paid",
        ]
    )
    with ToolRegistry() as registry:
        registry.register_function(pay)
        registry.register_function(look)
        result = await run_durably(None, run_id="r", llm=llm, registry=registry, tools=["pay", "look"])
    assert result.output["said"] == "all is paid"
    assert list(told["pay"]["properties"]) == ["amount"]
    assert told["pay"]["required"] == ["amount"]
    assert told["look"]["properties"] == {}
    keys = [key for key, _ in given]
    assert len(set(keys)) == 3, "the same payment, asked for twice, is two payments"
    assert all(key.startswith("r/work#1/tool:") for key in keys)


async def test_a_tool_called_by_the_program_inside_a_call_has_that_calls_key() -> None:
    def pay(idempotency_key: str) -> str:
        """Pay."""
        return idempotency_key

    with ToolRegistry() as registry:
        registry.register_function(pay)
        executor = registry.get_executor()

        def call() -> Any:
            return executor(ToolUse("1", "pay", {})).content

        node = Calls({"first": call, "second": call})
        await run_durably(node, run_id="r")
        assert "idempotency_key" in executor(ToolUse("1", "pay", {})).content  # outside of a call it is missing
    assert [value.partition("#1/")[2].partition("#")[0] for value in node.values.values()] == ["first", "second"]
