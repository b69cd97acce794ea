"""Which providers are driven one turn at a time, and that nothing a program put around a provider is gone round."""

from __future__ import annotations

from typing import Any

import pytest

from framework.graph.journal import AttemptJournal, StepJournal
from framework.graph.journal_llm import JournaledLLM
from framework.llm.anthropic import AnthropicProvider
from framework.llm.calls import turn_of
from framework.llm.litellm import LiteLLMProvider
from framework.llm.mock import MockLLM
from framework.llm.openai import OpenAIProvider
from framework.llm.provider import LLMProvider, LLMResponse
from framework.llm.scripted import ScriptedLLM


class Counted(ScriptedLLM):
    """A program's own, which overrides the way that a conversation is asked."""

    asked = 0

    def complete_with_tools(self, *args: Any, **keywords: Any) -> LLMResponse:
        self.asked += 1
        return super().complete_with_tools(*args, **keywords)


def test_the_providers_that_give_turns() -> None:
    anthropic = AnthropicProvider(api_key="not-a-real-key-0000")
    openai = OpenAIProvider("m", api_key="not-a-real-key-0000")
    for provider in (anthropic, openai):
        assert turn_of(provider, asynchronous=True) == provider.aturn
        assert turn_of(provider, asynchronous=False) == provider.turn
    scripted = ScriptedLLM(["x"])
    assert turn_of(scripted, asynchronous=True) == scripted.turn
    assert LiteLLMProvider.turn is not None
    assert turn_of(MockLLM(), asynchronous=True) is None


def test_what_is_put_around_a_conversation_is_not_gone_round(monkeypatch: pytest.MonkeyPatch) -> None:
    assert turn_of(Counted(["x"]), asynchronous=True) is None
    replaced = ScriptedLLM(["x"])
    monkeypatch.setattr(replaced, "complete_with_tools", lambda **given: LLMResponse("mine", "m"))
    assert turn_of(replaced, asynchronous=True) is None


async def test_the_wrapped_model_is_asked_as_the_inner_one() -> None:
    inner = Counted(["one", "two"])
    journal = AttemptJournal(StepJournal("a#1", "run/a#1"))
    llm = JournaledLLM(inner, journal)
    assert isinstance(llm, LLMProvider)
    messages = [{"role": "user", "content": "Well?"}]
    first = llm.complete_with_tools(messages, "s", [], lambda use: None)
    second = await llm.acomplete_with_tools(messages, "s", [], lambda use: None)
    assert (first.content, second.content, inner.asked) == ("one", "two", 2)
    with pytest.raises(TypeError, match="messages"):
        llm.complete(system="s")
    with pytest.raises(TypeError, match="twice"):
        llm.complete(messages, messages=messages)


async def test_a_model_whose_only_way_is_async_is_awaited() -> None:
    class Own:
        async def complete(self, messages: Any, system: str | None = None) -> LLMResponse:
            return LLMResponse(f"{system}: {messages[0]['content']}", "own", 1, 1)

    llm = JournaledLLM(Own(), AttemptJournal(StepJournal("a#1", "run/a#1")))
    messages = [{"role": "user", "content": "x"}]
    assert (await llm.complete(messages, system="s")).content == "s: x"
    assert (await llm.acomplete(messages=messages, system="t", max_tokens=5, model="m")).content == "t: x"
