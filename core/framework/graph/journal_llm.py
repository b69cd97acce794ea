"""A language model whose every turn, and each tool call it makes, is a call of the step's journal."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from framework.errors import ToolOutcomeUnknown, UnstorableValue
from framework.graph.budget import BudgetGate
from framework.graph.calls import KEY, tool_takes_key
from framework.graph.journal import AttemptJournal, CallSpec, in_thread, request_hash
from framework.graph.journal_rows import Policy
from framework.graph.spending import Spent
from framework.llm.calls import cost_of, input_tokens_of, method_of, output_tokens_of, turn_of, wishes
from framework.llm.prices import cost_of_call
from framework.llm.provider import LLMProvider, LLMResponse, Message, Tool, ToolResult, ToolUse
from framework.llm.threads import Watch
from framework.llm.tool_loop import (
    NO_PATIENCE,
    Conversation,
    Patience,
    Turn,
    blocking,
    is_async,
    talk,
    talk_async,
    text_of_result,
)
from framework.storage import codec

SKIPPED = "A person decided that this call is not made."

_COMPLETE = ("messages", "system", "tools", "max_tokens")
_WITH_TOOLS = ("messages", "system", "tools", "tool_executor", "max_iterations")
_WISHES = ("max_tokens", "json_schema", "model", "max_iterations")


class JournaledLLM:
    """``inner`` as a node may ask it: by the four methods of `LLMProvider`, all else goes to ``inner`` itself.

    A tool's policy is its own, else "ask" when it has effects and "rerun" when not. A tool with a parameter
    ``idempotency_key`` is given its call's; the model is not told of the parameter. A provider that gives one turn at
    a time is asked for turns, each a call of its own, one that its ``patience`` makes again as well; of another one the
    whole conversation is a call, and in it each tool call. A recorded reply has no ``raw_response`` when that cannot be
    stored.
    """

    def __init__(self, inner: Any, journal: AttemptJournal, gate: BudgetGate | None = None) -> None:
        self._inner = inner
        self._journal = journal
        self._gate = gate
        self._reply = CallSpec(to_plain=_plain_reply, from_plain=_reply_of, spent=self._took, settled=_settled_reply)
        self._turn = replace(
            self._reply, to_plain=_plain_turn, from_plain=_turn_of, spent=lambda turn: self._took(turn.response)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __repr__(self) -> str:
        return f"JournaledLLM({self._inner!r})"

    # --- one reply ----------------------------------------------------------------------------------------------

    def complete(self, *args: Any, **keywords: Any) -> Any:
        """`LLMProvider.complete`; of an inner one whose method is async, an awaitable."""
        method = self._inner.complete
        if is_async(method):
            return self.acomplete(*args, **keywords)
        asked = _bound(_COMPLETE, args, keywords)
        return self._journal.call_blocking(
            "llm",
            self._request(asked, "complete"),
            lambda key: method(**self._taken(method, asked)),
            self._let_out(self._reply, asked),
        )

    async def acomplete(self, *args: Any, **keywords: Any) -> Any:
        """`LLMProvider.acomplete`."""
        method = method_of(self._inner)
        asked = _bound(_COMPLETE, args, keywords)

        async def make(key: str) -> Any:
            return await _run(method, **self._taken(method, asked))

        spec = self._let_out(self._reply, asked)
        return await self._journal.call("llm", self._request(asked, "complete"), make, spec)

    # --- with tools ---------------------------------------------------------------------------------------------

    def complete_with_tools(self, *args: Any, **keywords: Any) -> Any:
        """`LLMProvider.complete_with_tools`; of an inner one whose method is async, an awaitable."""
        method = self._inner.complete_with_tools
        if is_async(method):
            return self.acomplete_with_tools(*args, **keywords)
        asked = _bound(_WITH_TOOLS, args, keywords)
        tools = _Tools(self._journal, asked["tools"], asked.pop("tool_executor"))
        asked["tools"] = tools.told
        turn = turn_of(self._inner, asynchronous=False)
        if turn is None:
            return self._journal.call_blocking(
                "llm",
                self._request(asked, "complete_with_tools"),
                lambda key: method(**self._taken(method, asked), tool_executor=tools.run_blocking),
                self._let_out(self._reply, asked, whole=True),
            )
        ask = turn

        def one(talked: list[Message]) -> Turn:
            now = self._one_turn({**asked, "messages": talked})
            made: Turn = self._journal.call_blocking(
                "llm",
                self._request(now, "turn"),
                lambda key: ask(**self._taken(ask, now)),
                self._let_out(self._turn, now),
            )
            return made

        return talk(self._conversation(asked), one, tools.run_blocking, self._patience())

    async def acomplete_with_tools(self, *args: Any, **keywords: Any) -> Any:
        """`LLMProvider.acomplete_with_tools`."""
        asked = _bound(_WITH_TOOLS, args, keywords)
        tools = _Tools(self._journal, asked["tools"], asked.pop("tool_executor"))
        asked["tools"] = tools.told
        turn = turn_of(self._inner, asynchronous=True)
        if turn is None:
            return await self._whole(asked, tools)
        ask = turn

        async def one(talked: list[Message]) -> Turn:
            now = self._one_turn({**asked, "messages": talked})

            async def make(key: str) -> Turn:
                made: Turn = await _run(ask, **self._taken(ask, now))
                return made

            return await self._journal.call("llm", self._request(now, "turn"), make, self._let_out(self._turn, now))

        return await talk_async(self._conversation(asked), one, tools.run, self._patience())

    async def _whole(self, asked: dict[str, Any], tools: _Tools) -> Any:
        """The conversation as one call, for a provider that does not give one turn at a time."""
        method = method_of(self._inner, "complete_with_tools")

        async def make(key: str) -> Any:
            taken = self._taken(method, asked)
            if is_async(method):
                return await method(**taken, tool_executor=tools.run)
            executor, watch = tools.for_a_thread()
            value = await in_thread(method, watch=watch, **taken, tool_executor=executor)
            return await value if inspect.isawaitable(value) else value

        spec = self._let_out(self._reply, asked, whole=True)
        return await self._journal.call("llm", self._request(asked, "complete_with_tools"), make, spec)

    def _conversation(self, asked: Mapping[str, Any]) -> Conversation:
        model = asked.get("model") or self._model()
        return Conversation(asked["messages"], model, asked.get("max_iterations") or 10, asked["tools"])

    def _patience(self) -> Patience:
        """That of ``inner``: a turn that failed is recorded as such, and the one made in its place is the next call.

        A step that starts again does not wait where it is still told what came next: other tasks of it may wait for
        their own answers meanwhile, which are given out in turn.
        """
        patience, journal = getattr(self._inner, "patience", None), self._journal
        if not isinstance(patience, Patience):
            return NO_PATIENCE

        def sleep(seconds: float) -> None:
            if not journal.is_replaying:
                patience.sleep(seconds)

        async def sleep_async(seconds: float) -> None:
            if not journal.is_replaying:
                await patience.sleep_async(seconds)

        return replace(patience, sleep=sleep, sleep_async=sleep_async)

    @staticmethod
    def _one_turn(asked: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in asked.items() if name != "max_iterations"}

    # --- what it takes ------------------------------------------------------------------------------------------

    def _let_out(self, spec: CallSpec, asked: Mapping[str, Any], *, whole: bool = False) -> CallSpec:
        """``spec`` for this question; of a ``whole`` conversation nothing says how long its replies are in all."""
        gate = self._gate
        if gate is None:
            return spec
        length = sum(len(str(asked.get(part) or "")) for part in ("messages", "system", "tools"))
        most = asked.get("max_tokens") or getattr(self._inner, "max_tokens", None)
        most = None if whole or type(most) is not int else most
        return replace(spec, before=lambda inside: gate.enter(length, most, inside))

    def _took(self, reply: Any) -> Spent:
        taken, gate = Spent.of_reply(reply), self._gate
        if gate is not None:
            unpriced = None
            if getattr(reply, "cost", None) is None:
                model = _text(getattr(reply, "model", "")) or self._model() or "unknown"
                # A provider need not look prices up itself.
                cost = cost_of_call(model, input_tokens_of(reply), output_tokens_of(reply))
                unpriced = model if cost is None else None
                taken = replace(taken, cost=cost or 0.0)
            if unpriced is not None and gate.limits_cost:
                self._journal.problems.append(
                    f"What model {unpriced!r} costs is not known, so the run's max_cost cannot be kept: no further "
                    "question is asked under it. Register its price (framework.llm.prices.register_price)."
                )
            gate.saw(taken, unpriced)
        return taken

    # --- what is asked ------------------------------------------------------------------------------------------

    def _model(self) -> str:
        model = getattr(self._inner, "model", "")
        return model if isinstance(model, str) else ""

    def _request(self, asked: Mapping[str, Any], way: str) -> str:
        """The hash of a question: all that the answer depends on."""
        tools = [[tool.name, tool.description, tool.parameters] for tool in asked.get("tools") or ()]
        request = {
            **asked,
            "way": way,
            "messages": [dict(message) for message in asked["messages"]],
            "system": asked.get("system") or "",
            "tools": tools,
            "model": asked.get("model") or self._model(),
        }
        kept = {name: value for name, value in sorted(request.items()) if value is not None}
        return request_hash(kept, f"ctx.llm.{way}")

    def _taken(self, method: Callable[..., Any], asked: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a question that ``inner`` takes; what it does not know of is not passed to it."""
        found = {name: value for name, value in asked.items() if name not in _WISHES}
        return found | wishes(self._inner, method, **{name: asked.get(name) for name in _WISHES})


LLMProvider.register(JournaledLLM)


class _Tools:
    """The tools of one conversation, each call of them a call of the journal. ``told`` is what the model is told."""

    def __init__(self, journal: AttemptJournal, tools: Sequence[Tool], executor: Callable[..., Any]) -> None:
        self._journal = journal
        self._executor = executor
        self._keyed = {tool.name for tool in tools if tool_takes_key(tool)}
        self._policies = {tool.name: policy_of(tool) for tool in tools}
        self.told = [_without_key(tool) if tool.name in self._keyed else tool for tool in tools]

    async def run(self, use: ToolUse) -> ToolResult:
        """Run a call, or answer it from the journal."""

        async def make(key: str) -> ToolResult:
            given = self._given(use, key)
            result = _storable(await _run(self._executor, given), use)
            check_outcome(result, self._journal, self._spec(use).policy)
            return result

        return await self._journal.call(f"tool:{use.name}", self._request(use), make, self._spec(use))

    def run_blocking(self, use: ToolUse) -> ToolResult:
        """``run`` for synchronous code."""
        return self._run_blocking(use, self._executor)

    def for_a_thread(self) -> tuple[Callable[[ToolUse], ToolResult], Watch]:
        """``run_blocking`` for a thread of this event loop, where an async executor runs meanwhile; and what tells that
        thread that nobody waits for it any more."""
        executor, watch = blocking(self._executor)
        return lambda use: self._run_blocking(use, executor), watch

    def _run_blocking(self, use: ToolUse, executor: Callable[..., Any]) -> ToolResult:
        def make(key: str) -> ToolResult:
            result = _storable(executor(self._given(use, key)), use)
            check_outcome(result, self._journal, self._spec(use).policy)
            return result

        return self._journal.call_blocking(f"tool:{use.name}", self._request(use), make, self._spec(use))

    def _given(self, use: ToolUse, key: str) -> ToolUse:
        return ToolUse(use.id, use.name, {**use.input, KEY: key}) if use.name in self._keyed else use

    @staticmethod
    def _request(use: ToolUse) -> str:
        return request_hash([use.name, use.input], f"the arguments of tool {use.name!r}")

    def _spec(self, use: ToolUse) -> CallSpec:
        return CallSpec(
            policy=self._policies.get(use.name, "rerun"),
            to_plain=lambda result: [result.content, result.is_error],
            from_plain=lambda plain: ToolResult(use.id, plain[0], plain[1]),
            settled=lambda action, value: [text_of_result(value) if action == "done" else SKIPPED, False],
        )


def policy_of(tool: Any) -> Policy:
    """The policy of a tool's calls: its own, else "ask" when it has effects, else "rerun"."""
    policy: Policy | None = getattr(tool, "policy", None)
    return policy or ("ask" if getattr(tool, "effects", False) else "rerun")


def check_outcome(result: Any, journal: AttemptJournal, policy: Policy) -> None:
    """Raise ``ToolOutcomeUnknown`` for the result of an effect that may have happened although it is an error: it is
    not recorded as an outcome, so the call is settled before it is made again."""
    if policy != "rerun" and journal.records and getattr(result, "outcome_unknown", False) is True:
        raise ToolOutcomeUnknown(text_of_result(result.content))


def _without_key(tool: Tool) -> Tool:
    parameters = dict(tool.parameters)
    parameters["properties"] = {name: each for name, each in parameters["properties"].items() if name != KEY}
    if "required" in parameters:
        parameters["required"] = [name for name in parameters["required"] if name != KEY]
    return replace(tool, parameters=parameters)


def _bound(names: Sequence[str], args: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    if len(args) > len(names):
        raise TypeError(f"The method takes at most {len(names)} positional arguments: {', '.join(names)}.")
    bound = dict(zip(names, args, strict=False))
    twice = sorted(set(bound) & set(keywords))
    if twice:
        raise TypeError(f"The argument {twice[0]!r} was given twice.")
    bound |= keywords
    needed = ("messages", "tools", "tool_executor") if "tool_executor" in names else ("messages",)
    missing = [name for name in needed if name not in bound]
    if missing:
        raise TypeError(f"The argument {missing[0]!r} is missing.")
    return bound


async def _run(function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    if is_async(function):
        return await function(*args, **keywords)
    value = await in_thread(function, *args, **keywords)
    return await value if inspect.isawaitable(value) else value


# --- as data --------------------------------------------------------------------------------------------------------


def _plain_reply(reply: Any) -> dict[str, Any]:
    raw = getattr(reply, "raw_response", None)
    plain = {
        "content": reply.content,
        "model": _text(getattr(reply, "model", "")),
        "input_tokens": input_tokens_of(reply),
        "output_tokens": output_tokens_of(reply),
        "stop_reason": _text(getattr(reply, "stop_reason", "")),
        "cost": None if getattr(reply, "cost", None) is None else cost_of(reply),
    }
    if isinstance(raw, list) and raw and all(isinstance(each, ToolUse) for each in raw):
        plain["uses"] = [[use.id, use.name, use.input] for use in raw]
    elif isinstance(raw, dict | list | str) and _is_storable(raw):
        plain["raw"] = raw
    return plain


def _reply_of(plain: dict[str, Any]) -> LLMResponse:
    raw = [ToolUse(*use) for use in plain["uses"]] if "uses" in plain else plain.get("raw")
    return LLMResponse(
        content=plain["content"],
        model=plain["model"],
        input_tokens=plain["input_tokens"],
        output_tokens=plain["output_tokens"],
        stop_reason=plain["stop_reason"],
        raw_response=raw,
        cost=plain["cost"],
    )


def _settled_reply(action: str, value: Any) -> Any:
    raise AssertionError("a question to a model has no effect to settle")


def _plain_turn(turn: Turn) -> dict[str, Any]:
    return {
        "reply": _plain_reply(turn.response),
        "uses": [[use.id, use.name, use.input] for use in turn.uses],
        "refused": [[result.tool_use_id, result.content, result.is_error] for result in turn.refused.values()],
        "asked": dict(turn.asked) if turn.asked is not None else None,
    }


def _turn_of(plain: dict[str, Any]) -> Turn:
    return Turn(
        _reply_of(plain["reply"]),
        tuple(ToolUse(*use) for use in plain["uses"]),
        {each[0]: ToolResult(*each) for each in plain["refused"]},
        plain["asked"],
    )


def _storable(result: Any, use: ToolUse) -> ToolResult:
    """A tool's result as the journal can hold it, and the node has it now: other content as the model is told it."""
    content, is_error = getattr(result, "content", result), bool(getattr(result, "is_error", False))
    if not isinstance(content, str) and not _is_storable(content):
        content = text_of_result(content)
    return ToolResult(use.id, content, is_error, getattr(result, "outcome_unknown", False) is True)


def _is_storable(value: Any) -> bool:
    try:
        codec.encode(value)
    except UnstorableValue:
        return False
    return True


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
