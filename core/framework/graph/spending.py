"""What steps took: tokens, time and money, added up over attempts, branches, processes and questions to models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from framework.graph.node_base import NodeResult
from framework.llm.calls import cost_of, output_tokens_of, tokens_of


@dataclass(frozen=True, slots=True)
class Spent:
    """``tokens`` include the ``output_tokens``. ``cost`` is in US dollars, as far as prices are known."""

    tokens: int = 0
    latency_ms: int = 0
    output_tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        if self is NOTHING or other is NOTHING:  # steps that ask no model are the most, and pay nothing for this
            return other if self is NOTHING else self
        return Spent(
            self.tokens + other.tokens,
            self.latency_ms + other.latency_ms,
            self.output_tokens + other.output_tokens,
            self.cost + other.cost,
        )

    def record(self) -> dict[str, Any]:
        """The entries of a log record; what is zero is left out."""
        if self is NOTHING:
            return {}
        entries = {
            "tokens": self.tokens,
            "latency_ms": self.latency_ms,
            "output_tokens": self.output_tokens,
            "cost": round(self.cost, 12),
        }
        return {name: value for name, value in entries.items() if value}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Spent:
        """What a log record, or the body of a checkpoint, says."""
        return cls(
            record.get("tokens", 0),
            record.get("latency_ms", 0),
            record.get("output_tokens", 0),
            record.get("cost", 0.0),
        )

    @classmethod
    def of_result(cls, result: NodeResult) -> Spent:
        """What an attempt says it took."""
        if not (result.tokens_used or result.latency_ms or result.cost):
            return NOTHING
        return cls(result.tokens_used, result.latency_ms, result.output_tokens, result.cost)

    @classmethod
    def of_reply(cls, response: Any) -> Spent:
        """What a model's reply took; its time is not known here."""
        return cls(tokens_of(response), 0, output_tokens_of(response), cost_of(response))


NOTHING = Spent()
