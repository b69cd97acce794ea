"""The loop of a model and its tools: ask, run what it calls, tell it the results. The same for every provider."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from framework._secrets import mask
from framework.errors import LLMError
from framework.llm.provider import AsyncToolExecutor, LLMResponse, Message, Tool, ToolExecutor, ToolResult, ToolUse
from framework.llm.threads import Watch, check_wanted, in_thread, pause

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """One reply inside the loop.

    ``uses`` are the tool calls it makes; ``refused`` the results of calls that cannot be run as they stand (arguments
    that are no JSON object), by the call's id; ``asked`` is the reply as a message, which the next request repeats.
    """

    response: LLMResponse
    uses: tuple[ToolUse, ...] = ()
    refused: dict[str, ToolResult] = field(default_factory=dict)
    asked: Message | None = None


async def _sleep(seconds: float) -> None:
    await asyncio.sleep(seconds)  # looked up at each call: programs replace it


@dataclass(frozen=True)
class Patience:
    """How often, and after which waits, one request inside a tool loop is made again when it failed in a way that
    passes.

    Only a request that follows tool calls: ending the loop there would lead to a new attempt of the node, which calls
    those tools again. A first request is left to the node, whose attempts are counted and survive a restart.
    ``sleep`` and ``sleep_async`` wait, blocking and not.
    """

    request_retries: int = 2
    delay_seconds: float = 0.5
    longest_wait_seconds: float = 60.0
    """Longest wait that the provider may ask for (Retry-After)."""
    sleep: Callable[[float], None] = pause
    sleep_async: Callable[[float], Awaitable[None]] = _sleep

    def wait_after(self, error: Exception, failed: int, *, begun: bool) -> float | None:
        """Seconds to wait before the request that failed for the ``failed``-th time (from 1) is made again; None when
        it is not. ``begun`` says that tools were called before it."""
        if not (begun and isinstance(error, LLMError) and error.transient and failed <= self.request_retries):
            return None
        wait = self.delay_seconds * 2.0 ** (failed - 1)
        wait += min(max(error.retry_after or 0.0, 0.0), self.longest_wait_seconds)
        logger.warning(
            "A request inside a tool loop failed and is made again in %.3g s (%d of %d): %s",
            wait,
            failed,
            self.request_retries,
            mask(str(error)),
        )
        return wait


NO_PATIENCE = Patience(request_retries=0)


class Conversation:
    """The messages and the sums of one loop. ``messages`` is what the next request sends.

    Only the ``tools`` that are offered may be called; None offers any.
    """

    def __init__(
        self, messages: Sequence[Message], model: str, max_iterations: int, tools: Sequence[Tool] | None = None
    ) -> None:
        self.messages: list[Message] = list(messages)
        self.max_iterations = max_iterations
        self._offered = None if tools is None else [tool.name for tool in tools]
        self._model = model
        self._input_tokens = 0
        self._output_tokens = 0
        self._cost: float | None = 0.0
        self._turns = 0

    def add(self, turn: Turn) -> LLMResponse | None:
        """Count a reply; the final response when it calls no tool."""
        response = turn.response
        self._model = response.model
        self._input_tokens += response.input_tokens
        self._output_tokens += response.output_tokens
        # One call without a known price makes the sum unknown: a part of it would look like the whole.
        self._cost = None if self._cost is None or response.cost is None else self._cost + response.cost
        if turn.uses:
            return None
        return replace(response, input_tokens=self._input_tokens, output_tokens=self._output_tokens, cost=self._cost)

    def refused(self, turn: Turn, use: ToolUse) -> ToolResult | None:
        """What the model is told instead of running a call that cannot, or must not, be run."""
        if use.id in turn.refused:
            return turn.refused[use.id]
        if self._offered is None or use.name in self._offered:
            return None
        known = ", ".join(map(repr, self._offered)) or "none"
        return ToolResult(use.id, f"There is no tool {use.name!r}. The tools are: {known}.", is_error=True)

    def charge(self, error: Exception) -> None:
        """Say on an exception that ends the loop what the calls before it took: see `paid_before`."""
        if self._input_tokens or self._output_tokens:
            error.__dict__["_paid"] = self.stopped()

    @property
    def begun(self) -> bool:
        """Whether a reply asked for tools already."""
        return self._turns > 0

    def tell(self, turn: Turn, results: Sequence[ToolResult]) -> None:
        """Add the calls of a reply and what came of them to the messages."""
        self._turns += 1
        calls = [{"type": "tool_use", "id": use.id, "name": use.name, "input": use.input} for use in turn.uses]
        answers = [
            {
                "type": "tool_result",
                "tool_use_id": result.tool_use_id,
                "content": text_of_result(result.content),
                "is_error": result.is_error,
            }
            for result in results
        ]
        asked = turn.asked or {"role": "assistant", "content": calls}
        self.messages = [*self.messages, asked, {"role": "user", "content": answers}]

    def stopped(self) -> LLMResponse:
        """What is returned when every one of ``max_iterations`` replies asked for tools."""
        return LLMResponse(
            content=f"Stopped after {self.max_iterations} calls that all asked for tools.",
            model=self._model,
            input_tokens=self._input_tokens,
            output_tokens=self._output_tokens,
            stop_reason="max_iterations",
            cost=self._cost,
        )


def talk(
    conversation: Conversation,
    ask: Callable[[list[Message]], Turn],
    tool_executor: ToolExecutor,
    patience: Patience = NO_PATIENCE,
) -> LLMResponse:
    """Run the loop, blocking. Calls of one reply run one after the other, in its order; what they raise is raised.

    In a thread that nobody waits for any more, `Abandoned` is raised before the next request or tool call.
    """

    def answered() -> Turn:
        failed = 0
        while True:
            check_wanted()
            try:
                return ask(conversation.messages)
            except Exception as error:
                failed += 1
                wait = patience.wait_after(error, failed, begun=conversation.begun)
                if wait is None:
                    raise
            patience.sleep(wait)

    def run(turn: Turn, use: ToolUse) -> ToolResult:
        check_wanted()
        return conversation.refused(turn, use) or tool_executor(use)

    try:
        for _ in range(conversation.max_iterations):
            turn = answered()
            done = conversation.add(turn)
            if done is not None:
                return done
            conversation.tell(turn, [run(turn, use) for use in turn.uses])
    except Exception as error:
        conversation.charge(error)
        raise
    return conversation.stopped()


async def talk_async(
    conversation: Conversation,
    ask: Callable[[list[Message]], Awaitable[Turn]],
    tool_executor: AsyncToolExecutor,
    patience: Patience = NO_PATIENCE,
) -> LLMResponse:
    """`talk` without blocking the event loop; a ``tool_executor`` that is not async runs in a thread."""

    async def answered() -> Turn:
        failed = 0
        while True:
            try:
                return await ask(conversation.messages)
            except Exception as error:
                failed += 1
                wait = patience.wait_after(error, failed, begun=conversation.begun)
                if wait is None:
                    raise
            await patience.sleep_async(wait)

    try:
        for _ in range(conversation.max_iterations):
            turn = await answered()
            done = conversation.add(turn)
            if done is not None:
                return done
            results = [conversation.refused(turn, use) or await _run_tool(tool_executor, use) for use in turn.uses]
            conversation.tell(turn, results)
    except Exception as error:
        conversation.charge(error)
        raise
    return conversation.stopped()


def paid_before(error: BaseException) -> LLMResponse | None:
    """What the calls of a tool loop took that ``error`` ended; its tokens and cost are those of the finished calls."""
    paid = getattr(error, "_paid", None)
    return paid if isinstance(paid, LLMResponse) else None


def text_of_result(content: Any) -> str:
    """A tool's answer as the model is told it; a tool may answer with other things than the text it should."""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)


def parse_arguments(tool: str, text: str) -> tuple[dict[str, Any], str | None]:
    """The arguments of a tool call from their JSON, and what the model is told when they are no JSON object."""
    try:
        arguments = json.loads(text or "{}")
        problem = f"they are {type(arguments).__name__}, not an object"
    except (ValueError, RecursionError) as error:
        arguments, problem = None, str(error)
    if isinstance(arguments, dict):
        return arguments, None
    return {}, f"Tool {tool!r} was not run: its arguments have to be a JSON object ({problem}). Call it again."


def is_async(function: Any) -> bool:
    """Whether calling ``function`` gives a coroutine: an async function, or an object whose ``__call__`` is one."""
    return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))


class _Guarded:
    """A ``tool_executor`` as a thread calls it. Equal to the one it guards: whoever compares means that."""

    def __init__(self, tool_executor: AsyncToolExecutor, watch: Watch) -> None:
        self._guarded, self._watch = tool_executor, watch
        self._loop = asyncio.get_running_loop()

    def __call__(self, use: ToolUse) -> Any:
        self._watch.check()
        if not is_async(self._guarded):
            return self._guarded(use)
        return self._watch.result_of(lambda: asyncio.run_coroutine_threadsafe(_awaited(self._guarded(use)), self._loop))

    def __eq__(self, other: object) -> bool:
        return self is other or bool(self._guarded == other)

    def __hash__(self) -> int:
        return hash(self._guarded)


def blocking(tool_executor: AsyncToolExecutor) -> tuple[Callable[[ToolUse], Any], Watch]:
    """``tool_executor`` as a thread can call it, and the watch by which it knows whether anybody waits for that thread.

    Once nobody does, no further tool call begins, whoever wrote the loop in the thread. An async one runs in this loop
    while the thread waits, and is cancelled then. To be called where an event loop runs.
    """
    watch = Watch()
    return _Guarded(tool_executor, watch), watch


async def _run_tool(tool_executor: AsyncToolExecutor, use: ToolUse) -> ToolResult:
    if is_async(tool_executor):
        return await _awaited(tool_executor(use))
    return await _awaited(await in_thread(tool_executor, use))


async def _awaited(result: ToolResult | Awaitable[ToolResult]) -> ToolResult:
    return await result if inspect.isawaitable(result) else result
