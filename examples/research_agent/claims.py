"""What the demo claims, checked on what was observed. Pure: facts in, verdicts out."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from ledger import Bill, bill, bodies
from observe import View

KILLED = 1 if sys.platform == "win32" else -9
"""Exit code of a process that was killed, as ``subprocess`` shows it; Windows has no signals."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that was observed.

    ``before`` is the run right after the kill, ``after`` when the second process was done, ``asked_again`` after a
    third process made the same call. ``reference`` is a run of the same graph that nobody disturbed, in a store of
    its own. The results are ``ExecutionResult``s as dicts.
    """

    exit_code: int
    before: View
    after: View
    asked_again: View
    reference: View
    result: dict[str, Any] = field(default_factory=dict)
    result_again: dict[str, Any] = field(default_factory=dict)
    reference_result: dict[str, Any] = field(default_factory=dict)

    @property
    def later_entries(self) -> list[dict[str, Any]]:
        """What the second process wrote into the ledger."""
        return self.after.entries[len(self.before.entries) :]

    @property
    def ran_twice(self) -> list[str]:
        """Steps whose body began more than once."""
        return [step for step, keys in bodies(self.after.entries).items() if len(keys) > 1]

    @property
    def repeated(self) -> Bill:
        """What both processes paid together beyond the bill of the undisturbed run."""
        return bill(self.after.entries) - bill(self.reference.entries)

    @property
    def kept(self) -> Bill:
        """What was paid before the kill and not again: committed steps, and the journal of the steps in flight."""
        return bill(self.before.entries) - self.repeated

    @property
    def replayed(self) -> int:
        """LLM calls of the steps in flight that were answered from their journals."""
        unfinished = [entry for entry in self.before.entries if entry["step"] not in self.before.committed]
        return bill(unfinished).calls - self.repeated.calls


def verdicts(facts: Facts) -> list[tuple[str, bool]]:
    """Each claim, and whether it holds."""
    before, after = facts.before, facts.after
    runs = bodies(after.entries)
    resumed, undisturbed = facts.result, facts.reference_result
    again, in_flight = facts.repeated, len(before.in_flight)
    return [
        ("The first process was killed with SIGKILL while steps were in flight.", _killed(facts)),
        (
            "No body of a committed step ran again; the others ran at most twice.",
            all(len(runs.get(step, [])) == 1 for step in before.committed)
            and all(len(keys) <= 2 for keys in runs.values())
            and set(facts.ran_twice) <= set(before.in_flight),
        ),
        (
            "A body that ran twice was given the same idempotency key.",
            all(len(set(keys)) == 1 for keys in runs.values()),
        ),
        (
            "The new process recovered every committed step and ran the rest.",
            resumed.get("steps_recovered") == len(before.committed)
            and after.committed[: len(before.committed)] == before.committed
            and sorted(after.committed) == sorted(facts.reference.committed),
        ),
        (
            "At most the last call of each step in flight was made again.",
            0 <= again.calls <= in_flight and 0 <= again.tools <= in_flight,
        ),
        (
            "State, path and totals are those of an undisturbed run.",
            bool(resumed.get("success"))
            and all(resumed.get(name) == undisturbed.get(name) for name in ("output", "path", "total_tokens")),
        ),
        (
            "Asked once more, the store answered: nothing ran.",
            facts.asked_again == after and facts.result_again.get("output") == resumed.get("output"),
        ),
    ]


def _killed(facts: Facts) -> bool:
    return facts.exit_code == KILLED and bool(facts.before.in_flight) and bool(facts.before.committed)
