"""``RunBudget``: how many tokens and how much money a run may take, over all the processes that work on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from framework.errors import BudgetExceeded


@dataclass(frozen=True, slots=True)
class RunBudget:
    """Limits of one run; ``None`` is no limit. ``max_cost`` is in US dollars, as far as prices are known.

    Looked at before each step and before each question to a model, so the question in flight may go over it. What
    counts is the run's totals and the journaled questions of steps that are not finished. Raises ``ValueError`` for a
    limit below zero.
    """

    max_tokens: int | None = None
    max_cost: float | None = None

    def __post_init__(self) -> None:
        for name, limit in (("max_tokens", self.max_tokens), ("max_cost", self.max_cost)):
            if limit is not None and not limit >= 0:
                raise ValueError(f"RunBudget: {name} is {limit!r}; it has to be 0 or more, or None for no limit.")

    def check(self, run_id: str, tokens: int, cost: float) -> None:
        """Raise ``BudgetExceeded`` when as much as this has been used up."""
        spent: list[str] = []
        if self.max_tokens is not None and tokens >= self.max_tokens:
            spent.append(f"{tokens:,} of max_tokens={self.max_tokens:,} tokens are used up")
        if self.max_cost is not None and cost >= self.max_cost:
            spent.append(f"${cost:.6g} of max_cost=${self.max_cost:.6g} are used up")
        if spent:
            raise BudgetExceeded(run_id, " and ".join(spent))

    def to_json(self) -> dict[str, Any]:
        """As plain data, for the run's record."""
        limits = {"max_tokens": self.max_tokens, "max_cost": self.max_cost}
        return {name: limit for name, limit in limits.items() if limit is not None}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> RunBudget:
        """What ``to_json`` wrote."""
        return cls(plain.get("max_tokens"), plain.get("max_cost"))
