"""Every error a caller may catch, under one base class.

::

    SurefootError
    ├── StorageError              the store cannot do what was asked (full disk, read-only, locked)
    │   ├── CorruptData           bytes read back do not match their checksum, or cannot be decoded
    │   ├── CommitConflict        a commit's sequence is not the run's next
    │   ├── StoreTooNew           the store was written by a newer version of this library
    │   ├── KeyNotFound           content is encrypted with a key that is not given here; has .key_id
    │   ├── NotEncrypted          a store that is not encrypted was opened with keys
    │   ├── ValueTooLarge         one value has more bytes than a store takes; has .size, .limit (also a ValueError)
    │   └── InvalidId             an id or key that no store accepts (also a ValueError)
    ├── CodecError                a value or its bytes cannot be translated
    │   ├── UnstorableValue       a live value has no stored form; names the path and the type
    │   └── UnknownType           stored bytes name a type this program has not registered
    ├── RunError                  something about one run; has .run_id
    │   ├── RunNotFound           no run has this id
    │   ├── RunExists             a run with this id is already recorded
    │   ├── RunBusy               another owner holds the run's lease
    │   ├── LeaseLost             this owner lost the lease; nothing was written
    │   ├── DefinitionChanged     the graph or plan differs from the one the run started with
    │   ├── ResumeError           the run cannot be resumed from what is stored
    │   ├── CheckpointNotFound    the run keeps no such checkpoint
    │   ├── RunPinned             the run, or a checkpoint of it, is pinned, so it is not removed
    │   ├── MessageRefused        a message was left under this name before, or the run is completed
    │   ├── UnknownEffect         a call that may have had its effect before a crash; has .call
    │   ├── BudgetExceeded        the run's tokens or money are used up; resumable with a larger budget
    │   │   └── CostUnknown       a reply has no price, so the run's max_cost cannot be kept
    │   └── ApprovalError         an approval's answer was refused: no such request, answered, or asked anew
    ├── CallFailed                what a call inside a step raised before a crash, raised again; has .type
    ├── BranchConflict            two concurrent branches wrote the same key
    ├── LLMError                  a language model's provider gave no usable reply; has .transient, .retry_after
    │   ├── LLMRateLimited        too many requests (429, 529): transient
    │   ├── LLMTimeout            no reply in time, or a stream that stalled: transient
    │   ├── LLMUnavailable        no connection, a server error (5xx), or a reply that broke off: transient
    │   └── LLMRefused            the request itself is refused (400, 401, 403, 404, 422 ...): permanent
    ├── ToolError                 a tool or an MCP server cannot be set up as it is written (also a ValueError)
    ├── AgentFileError            a file of an agent's folder is not what it should be (also a ValueError)
    ├── AgentNotFound             there is no agent in this folder (also a FileNotFoundError)
    └── ExpressionError           a condition is not in the safe language, or cannot be evaluated

A driver's own errors (``sqlite3``, ``OSError``) are translated once, in the storage backend.
"""

from __future__ import annotations

from collections.abc import Sequence


class SurefootError(Exception):
    """Base class of every error raised on purpose by this library."""


class StorageError(SurefootError):
    """The store cannot do what was asked; what was committed before is untouched."""


class CorruptData(StorageError):
    """Stored bytes fail their checksum or cannot be decoded."""


class CommitConflict(StorageError):
    """A commit's sequence is not the run's next: somebody else committed in between. Nothing was written."""


class StoreTooNew(StorageError):
    """The store was written by a newer version of this library."""


class KeyNotFound(StorageError):
    """Content is encrypted with a key that this program was not given. Nothing is damaged, and nothing was skipped.

    ``key_id`` is the id of the key that is needed, ``None`` when no keys were given at all.
    """

    def __init__(self, key_id: str | None, message: str) -> None:
        super().__init__(message)
        self.key_id = key_id


class NotEncrypted(StorageError):
    """A store whose content is not encrypted was opened with keys. Nothing was read or written."""


class ValueTooLarge(StorageError, ValueError):
    """One value has more bytes (``size``) than a store takes (``limit``). Nothing was written."""

    def __init__(self, what: str, size: int, limit: int) -> None:
        super().__init__(
            f"{what} has {size:,} bytes; a store takes at most {limit:,} (MAX_VALUE_BYTES) in one value. "
            "Nothing was written; keep such data in a file or an object store, and its name in the state."
        )
        self.size = size
        self.limit = limit


class InvalidId(StorageError, ValueError):
    """An id or key that cannot name anything in a store."""


class CodecError(SurefootError):
    """A value, or the bytes of one, cannot be translated."""


class UnstorableValue(CodecError, TypeError):
    """A value has no stored form. ``path`` says where it sits, such as ``state.report[3].author``."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


class UnknownType(CodecError):
    """Stored bytes name a type that this program has not registered."""


class RunError(SurefootError):
    """Something about one run. ``run_id`` names it."""

    def __init__(self, run_id: str, message: str) -> None:
        super().__init__(message)
        self.run_id = run_id


class RunNotFound(RunError):
    """No run has this id."""

    def __init__(self, run_id: str, message: str | None = None) -> None:
        super().__init__(run_id, message or f"There is no run {run_id!r} in this store.")


class RunExists(RunError):
    """A run with this id is already recorded."""

    def __init__(self, run_id: str) -> None:
        super().__init__(run_id, f"Run {run_id!r} is already recorded; choose another run_id or resume it.")


class RunBusy(RunError):
    """Another owner holds the run's lease and is alive. ``owner`` is who, ``seconds_left`` how long at most."""

    def __init__(self, run_id: str, owner: str, seconds_left: float) -> None:
        super().__init__(
            run_id,
            f"Run {run_id!r} is running elsewhere (owner {owner}); its lease ends in {seconds_left:.1f} s "
            "unless renewed. Wait for it, or stop its owner and call again.",
        )
        self.owner = owner
        self.seconds_left = seconds_left


class LeaseLost(RunError):
    """This owner's fencing token is no longer the run's; the write was refused and nothing changed."""

    def __init__(self, run_id: str, token: int) -> None:
        super().__init__(
            run_id,
            f"Run {run_id!r} was taken over: fencing token {token} is no longer valid. "
            "Nothing was written; let the new owner finish, or resume the run later.",
        )
        self.token = token


class DefinitionChanged(RunError):
    """The definition differs from the one the run started with. ``changes`` lists the differences, a line each."""

    def __init__(self, run_id: str, changes: Sequence[str], otherwise: str | None = None) -> None:
        listing = "\n".join(f"  {line}" for line in changes)
        super().__init__(
            run_id,
            f"Run {run_id!r} was started with another definition. What changed:\n{listing}\n"
            "Resume with the original definition, start a new run under another run_id, or "
            + (otherwise or 'allow the change with CheckpointConfig(definition_change="allow").'),
        )
        self.changes = list(changes)


class ResumeError(RunError):
    """The run cannot be resumed from what is stored; the message says why."""


class RunPinned(RunError):
    """The run, or one of its checkpoints, is pinned, so what would remove it was refused; nothing was removed."""

    def __init__(self, run_id: str, sequence: int = 0, note: str = "") -> None:
        what = f"Checkpoint {sequence} of run {run_id!r}" if sequence else f"Run {run_id!r}"
        why = f" ({note})" if note else ""
        super().__init__(run_id, f"{what} is pinned{why}; nothing was removed. Unpin it first, or remove it by force.")
        self.sequence = sequence


class CheckpointNotFound(RunError):
    """The run keeps no such checkpoint. ``checkpoint`` is what was asked for; the message says which are kept."""

    def __init__(self, run_id: str, checkpoint: int | str, kept: Sequence[int]) -> None:
        if not kept:
            which = "It keeps none"
        elif len(kept) == 1:
            which = f"It keeps one, sequence {kept[0]}"
        else:
            which = f"It keeps {len(kept)}, sequences {min(kept)} to {max(kept)}"
        super().__init__(
            run_id,
            f"Run {run_id!r} keeps no checkpoint {checkpoint!r}: there was none, or retention removed it. {which}.",
        )
        self.checkpoint = checkpoint


class MessageRefused(RunError):
    """A message to a run was refused and changed nothing. ``name`` is the name it was to be left under."""

    def __init__(self, run_id: str, name: str, problem: str) -> None:
        super().__init__(run_id, f"Message {name!r} to run {run_id!r} was refused: {problem}")
        self.name = name


class UnknownEffect(RunError):
    """A call with an effect had begun before a crash, and whether it took effect is not known.

    ``call`` is its id, ``"<step>/<number>"``. Raised where the call's policy is "fail"; it is not tried again until
    somebody settles it.
    """

    transient = False

    def __init__(self, run_id: str, call: str, name: str) -> None:
        super().__init__(
            run_id,
            f"Call {call!r} ({name}) of run {run_id!r} had begun before the process ended, and its outcome is not "
            "known. Find out what happened, settle it with CheckpointManager.settle (done, redo or skip), and resume.",
        )
        self.call = call


class BudgetExceeded(RunError):
    """The run has used up its budget; nothing more is asked of a model."""

    kind = "budget"
    transient = False

    def __init__(self, run_id: str, problem: str) -> None:
        super().__init__(
            run_id,
            f"The budget of run {run_id!r} is used up: {problem}. Finished steps and questions to models are kept; "
            "resume with a larger budget=RunBudget(...).",
        )


class CostUnknown(BudgetExceeded):
    """A model's reply has no price, so the run's ``max_cost`` cannot be kept; nothing more is asked of a model."""

    def __init__(self, run_id: str, model: str, max_cost: float) -> None:
        RunError.__init__(
            self,
            run_id,
            f"The budget of run {run_id!r} cannot be kept: what model {model!r} costs is not known, and "
            f"max_cost=${max_cost:.6g} is set. Register its price (framework.llm.prices.register_price), or resume "
            "with a budget of max_tokens only. Finished steps and questions to models are kept.",
        )


class ApprovalError(RunError):
    """The answer to an approval request was refused and changed nothing. ``step_id`` names the plan's step."""

    def __init__(self, run_id: str, step_id: str, problem: str) -> None:
        super().__init__(run_id, f"Step {step_id!r} of run {run_id!r}: {problem}")
        self.step_id = step_id


class CallFailed(SurefootError):
    """What a call inside a step raised before a crash, raised again from the step's journal.

    ``type`` names the class it was of, ``"<module>.<name>"``, and ``text`` is what it said. Where the program has
    imported that class, what is raised is of it as well, so ``except ThatClass`` works; its attributes are those that
    could be stored. Exceptions of Python and of this library are raised as they were, not as this.
    """

    def __init__(self, type: str, text: str) -> None:
        super().__init__(text)
        self.type = type
        self.text = text

    def __str__(self) -> str:
        return self.text


class BranchConflict(SurefootError):
    """Two concurrent branches wrote the same key, and nothing says how to combine the values."""

    def __init__(self, key: str, first: str, second: str) -> None:
        super().__init__(
            f"Branches {first!r} and {second!r} both wrote state key {key!r}. Let one of them write another key, "
            "declare the key in GraphSpec.append_only_keys, or name a reducer in GraphSpec.reducers."
        )
        self.key = key
        self.nodes = (first, second)


class LLMError(SurefootError):
    """A language model's provider gave no usable reply.

    ``transient`` says whether the same request may succeed later; ``retry_after`` is how many seconds the provider
    asks to wait before it, when it said so; ``status`` is the HTTP status, when there was a response. ``kind`` is
    the word that ``NodeSpec.retry_on`` and ``NodeResult.error_type`` use.
    """

    kind = "llm_error"
    transient = False

    def __init__(self, message: str, *, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class LLMRateLimited(LLMError):
    """Too many requests or tokens for now (HTTP 429, or 529: the provider is overloaded)."""

    kind = "rate_limit"
    transient = True


class LLMTimeout(LLMError):
    """No connection or no reply within the time limit, or a streamed reply that stalled. What it cost is unknown."""

    kind = "timeout"
    transient = True


class LLMUnavailable(LLMError):
    """The provider cannot be reached, answers with a server error, or broke off in the middle of its reply."""

    kind = "connection_error"
    transient = True


class LLMRefused(LLMError):
    """The request will be refused each time: a wrong key, an unknown model, or something the model cannot take."""


class ToolError(SurefootError, ValueError):
    """A tool, a module of tools or the settings of an MCP server cannot be used as written; says where and why."""


class ToolOutcomeUnknown(ToolError):
    """A tool's call gave no answer in time, or its connection was lost on the way: it may have taken effect."""


class AgentFileError(SurefootError, ValueError):
    """A file of an agent's folder is not what it should be. ``file`` says which (and where in it, ``file:line``),
    ``problems`` what, each with the place, what was expected and what was found."""

    def __init__(self, file: str, *problems: str) -> None:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        super().__init__(f"{file}: {shown}")
        self.file = file
        self.problems = list(problems)


class AgentNotFound(SurefootError, FileNotFoundError):
    """There is no agent in this folder."""


class ExpressionError(SurefootError, ValueError):
    """A condition is not in the safe language, or its evaluation failed."""
