"""The researcher's model: a real one when a key is set, else a script that reads its prompts as a model would.

The script takes a moment for each call, so that there is time to kill the process; EXAMPLE_PACE says how many seconds.
With EXAMPLE_LEDGER set to a file, each answered call is a line there: what a bill would list.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

from framework.llm import LLMProvider, ScriptedLLM, ToolUse
from framework.llm.choose import key_variable, provider_for
from framework.llm.provider import Message, Tool
from framework.llm.scripted import Reply, ScriptedCall


def provider(model: str) -> LLMProvider:
    """What the nodes of this folder ask, given the model's name."""
    variable = key_variable(model)
    if variable is not None and os.environ.get(variable):
        return provider_for(model)
    return ScriptedLLM(_reply, ledger=_paid, delay_seconds=float(os.environ.get("EXAMPLE_PACE", "0.5")))


def _paid(call: ScriptedCall) -> None:
    path = os.environ.get("EXAMPLE_LEDGER")
    if path:
        line = {"llm": (call.system or "").split(".")[0], "tokens": call.input_tokens + call.output_tokens}
        with open(path, "a", encoding="utf-8") as ledger:
            ledger.write(json.dumps(line) + "\n")


def _reply(messages: list[Message], system: str | None, tools: list[Tool]) -> Reply:
    text = system or ""
    if text.startswith("You plan a search"):
        question = str(messages[0]["content"]).partition("question: ")[2]
        words = [word.strip("?.,!").lower() for word in question.split() if len(word) > 4]
        return json.dumps({"queries": [" ".join(words[index : index + 2]) for index in range(0, len(words), 2)][:3]})
    if text.startswith("You search notes"):
        return _search(messages)
    if text.startswith(("You write reports", "You mend reports")):
        return _write(str(messages[0]["content"]))
    raise ValueError(f"The script has no answer for the system prompt {text[:60]!r}.")


def _search(messages: list[Message]) -> Reply:
    """Search, then read, then tell what was read."""
    results = [block for message in messages for block in _blocks(message) if block.get("type") == "tool_result"]
    if not results:
        queries = json.loads(str(messages[0]["content"]).partition("queries: ")[2])
        return [ToolUse(f"search-{index}", "search_notes", {"query": query}) for index, query in enumerate(queries)]
    searched = [result for result in results if str(result["tool_use_id"]).startswith("search-")]
    if len(searched) == len(results):
        found = {hit["id"]: hit for result in searched for hit in json.loads(result["content"])}
        return [ToolUse(f"read-{note}", "read_note", {"id": note}) for note in sorted(found)] or "Nothing was found."
    read = [result for result in results if str(result["tool_use_id"]).startswith("read-")]
    lines = []
    for result in read:
        note = str(result["tool_use_id"]).removeprefix("read-")
        facts = [line for line in str(result["content"]).splitlines() if line and not line.startswith("#")]
        lines.append(f"{facts[0]} [{note}]")
    return "\n".join(lines)


def _write(prompt: str) -> Reply:
    findings = re.findall(r"^(?:findings: )?(.+) \[([\w-]+)\]$", prompt, re.MULTILINE)
    report = " ".join(f"{fact} [{note}]" for fact, note in findings)
    return json.dumps({"report": report or "The notes say nothing of it.", "sources": [note for _, note in findings]})


def _blocks(message: Message) -> list[dict[str, Any]]:
    content = message["content"]
    return content if isinstance(content, list) else []
