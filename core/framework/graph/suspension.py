"""What a step waits for while its run lets go of the process: a time, a message, or somebody's word. Pure.

A node that sleeps, waits for a message or meets an effect whose outcome is unknown raises ``Suspended`` from within its
call. The step is then held, and the run pauses with what it waits for recorded in its position.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

WaitKind = Literal["sleep", "signal", "answer", "settle", "input"]


@dataclass(frozen=True, slots=True)
class Waiting:
    """One thing a step waits for.

    ``message`` is the name of the message that ends the wait, empty for a sleep. ``until`` is when it ends by itself,
    in seconds since the epoch. ``call`` is the id of the call that waits, ``"<step>/<number>"``. ``name`` is what a
    person answers by: the signal's name, the question's id, or the id of the call to be settled. ``occurrence`` counts
    the run's waits for signals of one name, from 1. ``question`` and ``schema`` are those of ``ask``; of a settlement
    ``question`` says what is not known, of a sleep why, when that is another process's work. ``refused`` says why the
    node did not take the last answer to the question. ``run`` is the id of the run that waits, empty for the step's
    own: a plan's step waits for what the run of its sub-graph waits for. Only there ``input`` is met: a person is asked
    at the node ``name`` of that run, at the checkpoint ``call``, and the plan's next call goes on from there; or that
    run was cancelled, which ``question`` says, and goes on with that call.
    """

    kind: WaitKind
    call: str
    name: str = ""
    message: str = ""
    until: float | None = None
    question: str | None = None
    schema: Any = None
    occurrence: int = 1
    refused: str | None = None
    run: str = ""

    def is_over(self, messages: Container[str], now: float) -> bool:
        """Whether the step can go on: ``messages`` are the names of those left for the run that waits."""
        return (self.until is not None and now >= self.until) or (bool(self.message) and self.message in messages)

    def to_json(self) -> dict[str, Any]:
        """As plain data; what is empty is left out."""
        values = {name: getattr(self, name) for name in self.__slots__}
        values["occurrence"] = self.occurrence if self.occurrence != 1 else None
        return {name: value for name, value in values.items() if value not in (None, "")}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Waiting:
        """What ``to_json`` wrote; entries of a later version are passed over."""
        return cls(**{name: plain[name] for name in cls.__slots__ if name in plain})

    @property
    def text(self) -> str:
        """What it is, in a few words."""
        match self.kind:
            case "sleep":
                return self.question or "sleeps until it is due"
            case "signal":
                which = f" (number {self.occurrence})" if self.occurrence > 1 else ""
                return f"waits for the signal {self.name!r}{which}"
            case "answer":
                refused = f"; the last answer was refused: {self.refused}" if self.refused else ""
                return f"asks {self.question!r} (question {self.name!r}){refused}"
            case "input":
                return self.question or f"asks a person for input at {self.name!r}"
            case _:
                return f"waits for {self.name!r} to be settled: {self.question}"


class Suspended(BaseException):
    """A step lets go of the process until one of ``waits`` is over.

    Not an ``Exception``, so that ``except Exception`` in a node's code does not swallow it. A node that catches it all
    the same is suspended nevertheless: what it does afterwards does not count.
    """

    def __init__(self, waits: Iterable[Waiting] = ()) -> None:
        self.waits = tuple(waits)
        super().__init__("; ".join(each.text for each in self.waits))


def wake_at(waits: Iterable[Waiting]) -> float | None:
    """When the first of them ends by itself, ``None`` when none does."""
    return min((each.until for each in waits if each.until is not None), default=None)
