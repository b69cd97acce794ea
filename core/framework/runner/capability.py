"""How an agent answers other agents: whether it can handle a request, and what becomes of a message."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from framework._secrets import mask_error
from framework.graph.json_reply import parse_json_object
from framework.graph.node_base import is_infrastructure_error
from framework.graph.text import shorten, text_of
from framework.llm.calls import ask
from framework.runner.agent_info import AgentInfo
from framework.runner.protocol import AgentMessage, CapabilityLevel, CapabilityResponse, MessageType

if TYPE_CHECKING:
    from framework.runner.runner import AgentRunner

logger = logging.getLogger(__name__)

_CONFIDENCE = {
    CapabilityLevel.BEST_FIT: 0.9,
    CapabilityLevel.CAN_HANDLE: 0.7,
    CapabilityLevel.UNCERTAIN: 0.4,
    CapabilityLevel.CANNOT_HANDLE: 0.1,
}
_COMMON = frozenset(
    "about after agent also and any are because but can could for from give had has have her him his how into its me "
    "more not one our out please should some than that the their them then there these they this those was what when "
    "where which who will with would you your".split()
)


async def assess(info: AgentInfo, request: Mapping[str, Any], llm: Any = None) -> CapabilityResponse:
    """How well the agent can handle ``request``; by a model when there is one that answers, else by shared words."""
    if llm is not None:
        answer = await _by_model(info, request, llm)
        if answer is not None:
            return answer
    return by_words(info, request)


def by_words(info: AgentInfo, request: Mapping[str, Any]) -> CapabilityResponse:
    """How well the agent can handle ``request``, from the words both use. The same answer in every process."""
    asked = _words(text_of(dict(request)))
    texts = [info.name, info.description, info.goal_name, info.goal_description]
    texts += [f"{node['name']} {node['description']}" for node in info.nodes]
    shared = asked & _words(" ".join(texts))
    share = len(shared) / len(asked) if asked else 0.0
    needed = {key for node in info.nodes if node["id"] == info.entry_node for key in node["input_keys"]}
    reasons = [f"shared words: {', '.join(sorted(shared)[:8])}" if shared else "no shared words"]
    if needed and needed <= set(request):
        reasons.append(f"the request has the input {', '.join(sorted(needed))}")
        level = CapabilityLevel.CAN_HANDLE
    elif shared:
        level = CapabilityLevel.CAN_HANDLE if share >= 0.5 else CapabilityLevel.UNCERTAIN
    else:
        level = CapabilityLevel.CANNOT_HANDLE
    confidence = round(min(1.0, _CONFIDENCE[level] + 0.1 * share), 3)
    return CapabilityResponse(info.name, level, confidence, "; ".join(reasons), info.node_count)


def raised_by(found: CapabilityResponse, capabilities: Sequence[str], request: Mapping[str, Any]) -> CapabilityResponse:
    """``found``, or at least "can handle" when the request uses a word of the agent's declared ``capabilities``."""
    shared = _words(" ".join(capabilities)) & _words(text_of(dict(request)))
    if not shared or found.can_handle():
        return found
    reasoning = f"declared capability: {', '.join(sorted(shared))}; {found.reasoning}"
    level = CapabilityLevel.CAN_HANDLE
    return replace(found, level=level, confidence=_CONFIDENCE[level], reasoning=reasoning)


def _words(text: str) -> set[str]:
    """Longer words in lower case, plural endings cut, so that ``orders`` meets ``order``."""
    found = {word.lower() for word in re.findall(r"[^\W\d_]{3,}", text)} - _COMMON
    return {word[:-1] if word.endswith("s") and len(word) > 4 else word for word in found}


async def _by_model(info: AgentInfo, request: Mapping[str, Any], llm: Any) -> CapabilityResponse | None:
    nodes = "\n".join(f"- {node['name']}: {shorten(node['description'], 200)}" for node in info.nodes)
    levels = ", ".join(level.value for level in CapabilityLevel)
    prompt = (
        f"An agent is described like this.\nName: {info.name}\nDescription: {info.description}\n"
        f"Goal: {info.goal_name}: {info.goal_description}\nIts steps:\n{nodes}\n\n"
        f"A request for it:\n{shorten(text_of(dict(request)), 4000)}\n\n"
        f'How well can it handle this? Answer with JSON only: {{"level": one of {levels}, '
        '"confidence": 0.0 to 1.0, "reasoning": "one sentence", "estimated_steps": a number or null}'
    )
    try:
        response = await ask(llm, messages=[{"role": "user", "content": prompt}], system=None)
        answer = parse_json_object(response.content) or {}
        level = CapabilityLevel(answer.get("level"))
    except Exception as error:  # a provider of any make may raise anything; the words are asked then
        if is_infrastructure_error(error):
            raise
        logger.info("Agent %r: the model did not say what it can handle: %s", info.name, mask_error(error))
        return None
    confidence, steps = answer.get("confidence"), answer.get("estimated_steps")
    sure = isinstance(confidence, (int, float)) and 0 <= confidence <= 1
    return CapabilityResponse(
        info.name,
        level,
        float(confidence) if sure and confidence is not None else _CONFIDENCE[level],
        shorten(str(answer.get("reasoning") or "the model gave no reason")),
        steps if isinstance(steps, int) else None,
    )


async def answer(runner: AgentRunner, message: AgentMessage) -> AgentMessage:
    """The agent's answer to a message. What goes wrong in its run is in the answer, as for every result."""
    name = runner.graph.id
    content: dict[str, Any]
    if message.type is MessageType.CAPABILITY_CHECK:
        found = await runner.can_handle(message.content)
        content = {
            "level": found.level.value,
            "confidence": found.confidence,
            "reasoning": found.reasoning,
            "estimated_steps": found.estimated_steps,
        }
        return message.reply(name, content, MessageType.CAPABILITY_RESPONSE)
    if message.type in (MessageType.REQUEST, MessageType.HANDOFF, MessageType.BROADCAST):
        given = dict(message.content)
        if message.type is MessageType.HANDOFF:
            given = {
                **(given["context"] if isinstance(given.get("context"), dict) else given),
                "_handoff_from": message.from_agent,
                "_handoff_reason": str(given.get("reason", "")),
            }
        result = await runner.run(given)
        content = {
            "success": result.success,
            "output": result.output,
            "path": result.path,
            "error": result.error,
            "paused_at": result.paused_at,
            "run_id": result.run_id,
        }
        return message.reply(name, content)
    return message.reply(name, {"success": False, "error": f"Agent {name!r} does not answer a {message.type.value}."})
