"""The pipeline's model: a real one when a key is set, else a script that reads its prompts as a model would.

The script takes a moment for each call, so that there is time to kill the process; EXAMPLE_PACE says how many seconds.
With EXAMPLE_LEDGER set to a file, each answered call is a line there: what a bill would list.
"""

from __future__ import annotations

import json
import os
import re

from framework.llm import LLMProvider, ScriptedLLM
from framework.llm.choose import key_variable, provider_for
from framework.llm.provider import Message, Tool
from framework.llm.scripted import Reply, ScriptedCall


def provider(model: str) -> LLMProvider:
    """What the nodes of this folder ask, given the model's name."""
    variable = key_variable(model)
    if variable is not None and os.environ.get(variable):
        return provider_for(model)
    return ScriptedLLM(_reply, ledger=_paid, delay_seconds=float(os.environ.get("EXAMPLE_PACE", "0.6")))


def _paid(call: ScriptedCall) -> None:
    path = os.environ.get("EXAMPLE_LEDGER")
    if path:
        line = {"llm": (call.system or "").split(".")[0], "tokens": call.input_tokens + call.output_tokens}
        with open(path, "a", encoding="utf-8") as ledger:
            ledger.write(json.dumps(line) + "\n")


def _reply(messages: list[Message], system: str | None, tools: list[Tool]) -> Reply:
    if not (system or "").startswith("You read invoices"):
        raise ValueError(f"The script has no answer for the system prompt {(system or '')[:60]!r}.")
    text = str(messages[0]["content"])
    sender = re.search(r"From: (.+)", text)
    date = re.search(r"\d{4}-\d{2}-\d{2}", text)
    total = re.search(r"Total: ([\d.]+)", text)
    return json.dumps(
        {
            "sender": sender[1] if sender else None,
            "date": date[0] if date else None,
            "total": float(total[1]) if total else None,
        }
    )
