"""Which calls of a step are answered from its journal; pure: no clock, no store.

A step that starts again makes its calls again, perhaps in another order: concurrent ones come as they please. So a
call is known by what it asks (its name and a hash of its request) and, among equal ones, by its occurrence; never by a
counter over all calls. That alone would answer wrongly once a step takes another way than before: a read that follows
a *different* write must not be answered by the old read. Therefore each call also says whether it was *quiet*: made by
the step's own task while no other call was unfinished. Quiet calls cut a step into parts whose order is certain: all
that came before a quiet call had finished and must have come again before it. Where that does not hold, the step has
left its recorded way, and what is recorded after that point is no longer used.

Calls made concurrently by other tasks of the step are matched by what they ask alone: their order says nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class CallKey:
    """What a call asks: ``name``, a hash of its ``request``, and its ``occurrence`` (from 1) among equal ones."""

    name: str
    request: str
    occurrence: int


@dataclass(frozen=True, slots=True)
class Begun(Generic[Answer]):
    """A call of the attempt before. ``number`` counts calls as they began, from 1; ``answer`` is ``None`` for one that
    had not finished, else a one-tuple of what it was answered."""

    number: int
    key: CallKey
    quiet: bool
    answer: tuple[Answer] | None = None


class Replay(Generic[Answer]):
    """The recorded calls of a step, used up as the step makes them again."""

    def __init__(self, recorded: Iterable[Begun[Answer]] = ()) -> None:
        self._recorded = {each.key: each for each in recorded}
        self._unused = dict(sorted((each.number, each) for each in self._recorded.values()))
        self._occurrences: dict[Hashable, int] = {}
        self.left = False
        """Whether the step took another way than recorded: then nothing recorded after that point is used."""
        self.used = 0
        """How many calls were answered from the journal."""
        self.dropped: list[Begun[Answer]] = []
        """What was recorded and had not come again when the step took another way, in the order it had begun."""

    @property
    def unused(self) -> list[Begun[Answer]]:
        """Recorded calls that were not made again, in the order they had begun."""
        return list(self._unused.values())

    def key_of(self, name: str, request: str) -> CallKey:
        """The key of the next call that asks this; each call asks once."""
        occurrence = self._occurrences.get((name, request), 0) + 1
        self._occurrences[name, request] = occurrence
        return CallKey(name, request, occurrence)

    def meet(self, key: CallKey, quiet: bool) -> Begun[Answer] | None:
        """The record of a call that is being made, which is used up by this; ``None`` when it has none to be used.

        A record without an answer says that the call had begun before and its outcome is not known.
        """
        found = self._recorded.get(key)
        if found is not None and found.number not in self._unused:
            found = None
        if quiet and self._unused and not self._is_next(found):
            # What had begun before this point did not come again, or something came that was not there: whatever was
            # recorded from here on followed other answers.
            self.left = True
            self.dropped = list(self._unused.values())
            self._unused.clear()
            return None
        if found is None:
            return None
        del self._unused[found.number]
        self.used += found.answer is not None
        return found

    def _is_next(self, found: Begun[Answer] | None) -> bool:
        """Whether a quiet call may be what came next before: one of the calls up to the next quiet one.

        The first unused record begins that part. Which of the part's calls began first may differ from time to time.
        """
        if found is None:
            return False
        first, *others = self._unused.values()
        return found is first or not any(each.quiet for each in others if each.number <= found.number)
