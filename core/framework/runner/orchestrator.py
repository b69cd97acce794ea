"""``AgentOrchestrator``: several agents under one roof, and who of them gets a request. An optional layer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from framework.errors import SurefootError
from framework.llm.litellm import LiteLLMProvider
from framework.runner.capability import raised_by
from framework.runner.protocol import (
    AgentMessage,
    CapabilityLevel,
    CapabilityResponse,
    MessageType,
    OrchestratorResult,
    RegisteredAgent,
)
from framework.runner.runner import DEFAULT_MODEL, AgentRunner

_ORDER = list(CapabilityLevel)


class UnknownAgent(SurefootError, LookupError):
    """No agent is registered under this name."""


class AgentOrchestrator:
    """Agents by name, and the messages between them.

    Who can handle a request is asked of ``llm``; without one, of a provider for ``model`` (LiteLLM's when that is
    installed) if the key that it needs is set in the environment, else it is judged by words. ``model=""`` never asks.
    Nothing is connected to before that.
    """

    def __init__(self, llm: Any = None, model: str = DEFAULT_MODEL) -> None:
        self.model = self._model = model
        self._llm = llm
        self._is_given = llm is not None
        if llm is None and model:
            with suppress(ImportError):  # LiteLLM is an extra; without it the vendors' own clients are asked
                self._llm = LiteLLMProvider(model=model)
        self._agents: dict[str, RegisteredAgent] = {}
        self._own: list[AgentRunner] = []
        self._log: list[AgentMessage] = []

    def register(
        self,
        name: str,
        path: str | Path,
        capabilities: Sequence[str] | None = None,
        priority: int = 0,
        **options: Any,
    ) -> None:
        """Load the agent of a folder and add it; ``options`` go to `AgentRunner.load`, and `cleanup` ends it.

        Raises what ``load`` raises, and ``ValueError`` for a name that is taken.
        """
        self._check_free(name)
        runner = AgentRunner.load(path, **options)
        self._own.append(runner)
        self.register_runner(name, runner, capabilities, priority)

    def register_runner(
        self, name: str, runner: AgentRunner, capabilities: Sequence[str] | None = None, priority: int = 0
    ) -> None:
        """Add an agent that the caller made, and ends. Raises ``ValueError`` for a name that is taken."""
        self._check_free(name)
        description = runner.info().description or runner.info().goal_description
        self._agents[name] = RegisteredAgent(name, runner, description, list(capabilities or ()), priority)

    def _check_free(self, name: str) -> None:
        if name in self._agents:
            raise ValueError(f"There is an agent {name!r} already; give this one another name.")

    def list_agents(self) -> list[dict[str, Any]]:
        """Name, description, capabilities and priority of each agent, in the order of their registration."""
        return [
            {
                "name": agent.name,
                "description": agent.description,
                "capabilities": list(agent.capabilities),
                "priority": agent.priority,
            }
            for agent in self._agents.values()
        ]

    async def dispatch(self, request: Mapping[str, Any], intent: str | None = None) -> OrchestratorResult:
        """Give ``request`` to the agent that can handle it best, and return what came of it.

        The better level wins, then the higher priority, then the surer answer, then the earlier registration. One
        agent works; nobody else is tried after it failed, as it may have had effects.
        """
        asked = {**request, "intent": intent} if intent else dict(request)
        answers = await self._ask_all(asked)
        able = [name for name, answer in answers.items() if answer.level is not CapabilityLevel.CANNOT_HANDLE]
        if not able:
            listing = "; ".join(f"{name}: {answer.reasoning}" for name, answer in answers.items())
            return OrchestratorResult(
                False, error=f"No agent can handle the request. {listing or 'None is registered.'}"
            )
        chosen = max(
            able,
            key=lambda name: (
                _ORDER.index(answers[name].level),
                self._agents[name].priority,
                answers[name].confidence,
            ),
        )
        message = AgentMessage(type=MessageType.REQUEST, to_agent=chosen, intent=intent or "", content=dict(request))
        reply = await self._send(message)
        return OrchestratorResult(
            success=bool(reply.content.get("success")),
            handled_by=[chosen],
            results={chosen: reply.content},
            messages=[message, reply],
            error=reply.content.get("error"),
        )

    async def relay(
        self, from_agent: str | None, to_agent: str, content: Mapping[str, Any], intent: str = ""
    ) -> AgentMessage:
        """Send ``content`` from one agent to another as a request; the answer. Raises ``UnknownAgent``."""
        return await self._send(
            AgentMessage(from_agent=from_agent, to_agent=to_agent, intent=intent, content=dict(content))
        )

    async def broadcast(
        self, from_agent: str | None, content: Mapping[str, Any], intent: str = ""
    ) -> dict[str, AgentMessage]:
        """Send ``content`` to every agent but the sender, at once; their answers by name."""
        names = [name for name in self._agents if name != from_agent]
        messages = [
            AgentMessage(
                type=MessageType.BROADCAST, from_agent=from_agent, to_agent=name, intent=intent, content=dict(content)
            )
            for name in names
        ]
        replies = await asyncio.gather(*map(self._send, messages))
        return dict(zip(names, replies, strict=True))

    def get_message_log(self) -> list[AgentMessage]:
        """Every message since the last clearing, oldest first."""
        return list(self._log)

    def clear_message_log(self) -> None:
        """Forget the messages so far."""
        self._log.clear()

    def cleanup(self) -> None:
        """End the agents that `register` loaded, and forget all. May be called again."""
        own, self._own = self._own, []
        self._agents.clear()
        for runner in own:
            runner.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cleanup()

    async def _ask_all(self, request: Mapping[str, Any]) -> dict[str, CapabilityResponse]:
        llm = await asyncio.to_thread(self._judge)
        agents = list(self._agents.values())
        answers = await asyncio.gather(*(agent.runner.can_handle(request, llm) for agent in agents))
        return {
            agent.name: raised_by(answer, agent.capabilities, request)
            for agent, answer in zip(agents, answers, strict=True)
        }

    async def _send(self, message: AgentMessage) -> AgentMessage:
        agent = self._agents.get(message.to_agent or "")
        if agent is None:
            known = ", ".join(self._agents) or "none"
            raise UnknownAgent(f"There is no agent {message.to_agent!r}; known: {known}.")
        self._log.append(message)
        try:
            reply = await agent.runner.receive_message(message)
        except SurefootError as error:
            reply = message.reply(agent.name, {"success": False, "error": str(error)})
        reply.from_agent = agent.name  # the runner knows its graph's id, here it has a name
        self._log.append(reply)
        return reply

    def _judge(self) -> Any:
        """The model that says who can handle a request; None when there is none, or its key is missing."""
        if self._is_given or not self.model:
            return self._llm
        from framework.llm.choose import key_variable, missing_key, provider_for  # noqa: PLC0415 - a key, then a client

        if missing_key(self.model) is not None:
            return None
        if self._llm is None and key_variable(self.model) is not None:
            self._llm = provider_for(self.model)
        return self._llm
