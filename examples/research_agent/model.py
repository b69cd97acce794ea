"""The agent's language model: scripted, so that it needs no key and no network and answers the same each time.

It reads its prompts as a model would: what it says is made of the messages and tool results it is given. How long a
call takes depends on the seed and the prompt alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable

from ledger import Ledger

from framework.llm.provider import Message, Tool, ToolUse
from framework.llm.scripted import Reply, ScriptedCall, ScriptedLLM

SLOWEST_SECONDS = 0.7
"""The longest call at pace 1; the shortest takes a tenth of it."""


def build_model(ledger: Ledger, *, seed: int, pace: float) -> ScriptedLLM:
    """A model that writes each answered call into ``ledger``. ``pace`` multiplies how long calls take."""

    def reply(messages: list[Message], system: str | None, tools: list[Tool]) -> Reply:
        prompt = json.dumps([messages, system], default=str, sort_keys=True)
        time.sleep(pace * SLOWEST_SECONDS * (0.1 + 0.9 * _chance(seed, prompt)))
        role = next((role for role in _ROLES if (system or "").startswith(role)), None)
        if role is None:
            raise ValueError(f"The script has no role for the system prompt {(system or '')[:60]!r}.")
        return _ROLES[role](messages, system or "")

    def paid(call: ScriptedCall) -> None:
        ledger.write("llm", tokens=call.input_tokens + call.output_tokens, usd=call.cost_usd)

    return ScriptedLLM(reply, model="scripted-research", ledger=paid)


def _chance(seed: int, text: str) -> float:
    """A number in 0..1 that is the same in every process."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{text}".encode()).digest()[:4]) / 2**32


def _plan(messages: list[Message], system: str) -> Reply:
    return json.dumps({"criteria": ["reaches the span", "carries trams", "has precedents"], "approach": "deep"})


def _triage(messages: list[Message], system: str) -> Reply:
    deep = "approach: deep" in messages[0]["content"]
    return json.dumps({"chosen": "deep" if deep else "quick", "reasoning": "Four kinds of bridge are to be compared."})


def _answer_directly(messages: list[Message], system: str) -> Reply:
    return "Ask for a comparison of the kinds of bridge."


def _research(messages: list[Message], system: str) -> Reply:
    """Search, read what was found, then say what it comes to."""
    topic = _after("Topic: ", system)
    results = _tool_results(messages)
    if not results:
        return ToolUse(f"search-{topic}", "search_library", {"topic": topic})
    if len(results) == 1:
        return [ToolUse(f"read-{found}", "read_document", {"id": found}) for found in json.loads(results[0])]
    read = [json.loads(result) for result in results[1:]]
    return json.dumps(
        {
            "topic": topic,
            "longest_m": max(found["longest_m"] for found in read),
            "carries_rail": any(found["carries_rail"] for found in read),
            "sources": [found["id"] for found in read],
            "facts": [f"{found['title']}: {found['facts']}" for found in read],
        }
    )


def _assess(messages: list[Message], system: str) -> Reply:
    """Points for reach, rail and precedents; points off for a bridge far larger than the river asks for."""
    given = json.loads(messages[0]["content"])
    span, findings = given["span_m"], given["findings"]
    score = 4 * (findings["longest_m"] >= span) + 4 * findings["carries_rail"] + len(findings["sources"])
    excess = findings["longest_m"] / span
    score -= 3 if excess > 4 else 1 if excess > 2.05 else 0
    return json.dumps({"score": score})


def _write(messages: list[Message], system: str) -> Reply:
    text = messages[0]["content"]
    best = json.loads(_after("ranking: ", text))[0]
    notes = json.loads(_after("notes: ", text))
    sources = [source for source in json.loads(_after("sources: ", text)) if source.startswith(best[0].upper())]
    cited = " ".join(f"[{source}]" for source in [*sources, *notes["sources"]])
    return (
        f"Build a {best.replace('_', '-')} bridge. Bridges of this kind reach the span and carry rail today, "
        f"and they can be kept up: {notes['facts'][0].split(': ')[1]} {cited}"
    )


def _after(label: str, text: str) -> str:
    found = re.search(re.escape(label) + r"(.*)", text)
    if found is None:
        raise ValueError(f"The prompt has no line {label!r}.")
    return found.group(1).strip()


def _tool_results(messages: list[Message]) -> list[str]:
    return [
        block["content"]
        for message in messages
        if isinstance(message["content"], list)
        for block in message["content"]
        if block["type"] == "tool_result"
    ]


_ROLES: dict[str, Callable[[list[Message], str], Reply]] = {
    "You plan": _plan,
    "You decide": _triage,
    "You answer": _answer_directly,
    "You research": _research,
    "You assess": _assess,
    "You write": _write,
}
