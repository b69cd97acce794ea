"""The support agent's model: a real one when a key is set, else a script that reads its prompts as a model would.

The script takes a moment for each call, so that there is time to kill the process; EXAMPLE_PACE says how many seconds.
With EXAMPLE_LEDGER set to a file, each answered call is a line there: what a bill would list.
"""

from __future__ import annotations

import json
import os

from framework.llm import LLMProvider, ScriptedLLM
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
    prompt = str(messages[0]["content"])
    values = dict(line.split(": ", 1) for line in prompt.splitlines() if ": " in line)
    text = system or ""
    if text.startswith("You sort messages"):
        money = any(word in values["message"].lower() for word in ("refund", "money back", "broken"))
        chosen = "refund" if money else "question"
        return json.dumps({"chosen": chosen, "reasoning": "The message asks for money." if money else "It does not."})
    if text.startswith("You answer customers"):
        return _answer(values)
    raise ValueError(f"The script has no answer for the system prompt {text[:60]!r}.")


def _answer(values: dict[str, str]) -> Reply:
    order = json.loads(values["order"])
    if order["id"] is None:
        return "Thank you for your message. Which order is it about? Its number begins with A-."
    about = f"Thank you for your message about order {order['id']} ({order['item']})."
    if values["decision"].startswith("We "):
        return f"{about} We are sorry. {values['decision']}"
    return f"{about} It is {order['state']}."
