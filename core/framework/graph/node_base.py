"""What a node is: its specification, what it is given, what it returns, and the interface it implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from framework.errors import BudgetExceeded, LeaseLost, StorageError
from framework.graph.text import shorten, summary_of

if TYPE_CHECKING:
    from framework.graph.goal import Goal
    from framework.graph.journal import AttemptJournal
    from framework.graph.journal_rows import Policy
    from framework.llm.provider import Tool


class NodeSpec(BaseModel):
    """One node of a graph, as data.

    ``node_type`` is llm_tool_use, llm_generate, function, router or human_input; any other text runs as an LLM node
    with tools. ``max_retries`` counts attempts in total; 0 behaves as 1. ``retry_on`` names the errors worth another
    attempt: rate_limit, timeout, connection_error, llm_error, names of exception classes, or words of the message;
    empty: all but those that are known to be permanent. ``model`` is asked for when the provider serves several.
    ``function`` is a label only: functions are registered under the node's id. Empty ``input_keys`` or ``output_keys``
    mean "no restriction". Unknown fields are kept.
    """

    model_config = ConfigDict(extra="allow")

    id: str
    name: str = ""
    description: str = ""
    node_type: str = "llm_tool_use"
    input_keys: list[str] = Field(default_factory=list)
    output_keys: list[str] = Field(default_factory=list)
    system_prompt: str | None = None
    tools: list[str] = Field(default_factory=list)
    model: str | None = None
    function: str | None = None
    routes: dict[str, str] = Field(default_factory=dict)
    max_retries: int = 3
    retry_on: list[str] = Field(default_factory=list)
    fan_out: bool = False
    """Follow every matching edge at once; the branches run concurrently until the join node."""
    fan_out_policy: Literal["fail_fast", "finish_siblings"] = "fail_fast"
    join_node: str | None = None
    """Where the branches of a ``fan_out`` node meet; None lets `GraphSpec.join_of` find it."""
    timeout_seconds: float | None = Field(default=None, gt=0)
    """Longest time one attempt may take."""
    retry_delay_seconds: float = Field(default=0.2, ge=0)
    retry_max_delay_seconds: float = Field(default=30.0, ge=0)
    retry_after_max_seconds: float = Field(default=300.0, ge=0)
    """Longest wait that a provider may ask for (Retry-After); it comes before the back-off, which is added to it."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Longest reply of the model; None leaves it to the provider."""
    output_schema: dict[str, Any] | None = None
    """JSON schema (an object) of the model's reply; None makes one of two or more output keys."""
    append_only_keys: list[str] = Field(default_factory=list)
    """State keys this node only ever extends at the end."""

    @model_validator(mode="after")
    def _name_defaults_to_id(self) -> NodeSpec:
        if not self.name:
            self.name = self.id
        return self


class DecisionRecorder(Protocol):
    """What a node uses of the runtime. A runtime without these methods works too: nothing is recorded."""

    def decide(
        self, *, intent: str, options: list[dict[str, Any]], chosen: str, reasoning: str, node_id: str | None = None
    ) -> str: ...

    def record_outcome(
        self,
        decision_id: str,
        success: bool,
        result: Any = None,
        error: str | None = None,
        summary: str = "",
        *,
        tokens_used: int = 0,
        latency_ms: int = 0,
    ) -> None: ...


class NodeMemory(Protocol):
    """What a node uses of the shared memory: a view scoped to its input and output keys."""

    def read(self, key: str) -> Any: ...

    def write(self, key: str, value: Any) -> None: ...

    def read_all(self) -> dict[str, Any]: ...


@dataclass
class NodeContext:
    """Everything one attempt of a node is given.

    ``runtime`` is a `DecisionRecorder` (or a test double with fewer methods). ``memory`` is the node's scoped view.
    ``input_data`` is the caller's input for the first node and the previous node's output afterwards. ``attempt``
    counts from 1 to ``max_attempts``. The last four are set by the executor: ``step_key`` names this visit of the
    node within the run, and ``idempotency_key`` is the same for every attempt of it, in every process. In a run with
    checkpoints ``journal`` records the calls made through ``llm`` and the methods here, so that a step that starts
    again after a crash is given what they had come to instead of making them again: see docs/how-to/inside-a-step.md.
    """

    runtime: Any
    node_id: str
    node_spec: NodeSpec
    memory: NodeMemory
    input_data: dict[str, Any] = field(default_factory=dict)
    llm: Any = None
    available_tools: list[Tool] = field(default_factory=list)
    goal_context: str = ""
    goal: Goal | None = None
    attempt: int = 1
    max_attempts: int = 3
    run_id: str | None = None
    step_key: str = ""
    idempotency_key: str = ""
    journal: AttemptJournal | None = field(default=None, repr=False)

    async def call(
        self, name: str, fn: Callable[..., Any], *args: Any, policy: Policy | None = None, **kwargs: Any
    ) -> Any:
        """Call ``fn(*args, **kwargs)``, sync (in a worker thread) or async, once for this step; its value.

        The value is durable before it is returned; a step that runs again after a crash gets the same one, and ``fn``
        is not called. ``name`` and the arguments say which call it is; arguments and value must have a stored form.
        What a call raises is recorded and raised again. ``policy`` says what becomes of a call that had begun before a
        crash and has no recorded value: "rerun" (as when it is None) calls again, "ask" pauses the run until somebody
        settles it, "fail" raises `UnknownEffect`. A parameter ``idempotency_key`` of ``fn`` is given the call's own
        key, the same whenever this call is made again.

        Raises what ``fn`` raises, ``UnstorableValue``, `UnknownEffect`. Without a checkpoint manager it only calls.
        """
        from framework.graph.journal_calls import call  # noqa: PLC0415 - which imports this module

        return await call(self, name, fn, args, kwargs, policy)

    async def sleep(self, seconds: float) -> None:
        """Sleep until ``seconds`` after this was first called in this step, however often the process ends meanwhile.

        A longer sleep (see ``CheckpointConfig.sleep_in_process_seconds``) pauses the run until it is due: the step ends
        here, and starts again then. Without a checkpoint manager it sleeps in the process. Either way it takes nothing
        of the node's ``timeout_seconds``, unless calls are made beside it.
        """
        from framework.graph import journal_waits  # noqa: PLC0415 - which imports this module

        await journal_waits.sleep(self._journal(), seconds)

    async def wait_for(self, name: str, timeout_seconds: float | None = None) -> Any:
        """The value that somebody sends to the run under ``name`` (``CheckpointManager.send``), now or earlier.

        Each wait takes one value: the run's first wait for ``name`` the first, in whichever step and visit it is, and
        so on; all attempts of a step have the same. The run pauses until it is there. Raises ``TimeoutError`` when it
        is not within ``timeout_seconds`` of the first call (what is sent later is refused), ``RunError`` without a
        checkpoint manager, ``ValueError`` for a name that looks like a question's id.
        """
        from framework.graph import journal_waits  # noqa: PLC0415 - which imports this module

        return await journal_waits.wait_for(self._journal(), name, timeout_seconds)

    async def ask(self, question: str, schema: Any = None) -> Any:
        """A person's answer to ``question`` (``CheckpointManager.send`` with the question's id as the name).

        The run pauses until it is there. ``schema`` is what the answer has to be: a JSON schema, or a type that
        pydantic knows, of which the value is then. An answer that this type's own validators refuse is noted with the
        reason, and the question is open again. Raises ``RunError`` without a checkpoint manager, ``ValueError`` for a
        schema that is not valid.
        """
        from framework.graph import journal_waits  # noqa: PLC0415 - which imports this module

        return await journal_waits.ask(self._journal(), question, schema)

    def _journal(self) -> AttemptJournal:
        from framework.graph.journal_calls import journal_of  # noqa: PLC0415 - which imports this module

        return journal_of(self)


@dataclass
class NodeResult:
    """What one attempt of a node came to.

    ``output`` is written to the state when ``success`` is true. ``next_node`` overrides the edges (routers set it).
    ``error_type`` is the class name of the exception behind ``error``, when there was one; for an `LLMError` its kind:
    rate_limit, timeout, connection_error or llm_error. ``error_names`` are all the names that ``retry_on`` may mean it
    by. ``transient`` False says that another attempt cannot help, and ``retry_after`` how many seconds the provider
    asks to wait before one. ``output_tokens`` are a part of ``tokens_used``; ``cost`` is in US dollars, 0.0 when no
    price is known.
    """

    success: bool
    output: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    next_node: str | None = None
    route_reason: str | None = None
    tokens_used: int = 0
    latency_ms: int = 0
    error_type: str | None = None
    error_names: tuple[str, ...] = ()
    transient: bool | None = None
    retry_after: float | None = None
    output_tokens: int = 0
    cost: float = 0.0

    def to_summary(self, node_spec: NodeSpec | None = None) -> str:
        """One line for a log: failed and why, nothing, or what came out. Local text; never a call to a model."""
        label = f"{node_spec.name}: " if node_spec is not None else ""
        if not self.success:
            return f"{label}failed: {shorten(self.error or 'no reason given')}"
        if not self.output:
            return f"{label}done, no output"
        listing = "; ".join(f"{key} = {summary_of(value, 60)}" for key, value in self.output.items())
        return f"{label}done: {shorten(listing, 400)}"


class NodeProtocol(ABC):
    """The interface of a node implementation. Objects that merely have these two methods are accepted as well."""

    @abstractmethod
    async def execute(self, ctx: NodeContext) -> NodeResult:
        """Do the node's work once. A raised exception counts as a failed attempt, like ``success=False``."""

    def validate_input(self, ctx: NodeContext) -> list[str]:
        """One message per declared input key that is neither in ``ctx.input_data`` nor non-None in memory."""
        return [
            f"Node {ctx.node_id!r} declares input key {key!r}, but neither its input nor the state has a value for it."
            for key in ctx.node_spec.input_keys
            if key not in ctx.input_data and ctx.memory.read(key) is None
        ]


def is_infrastructure_error(error: BaseException) -> bool:
    """Whether ``error`` is about the run itself, its store, lease or budget, and so never a mere failure of a node."""
    return isinstance(error, (StorageError, LeaseLost, BudgetExceeded))
