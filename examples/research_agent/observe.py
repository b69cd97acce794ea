"""What an onlooker sees of a run: the steps committed in the store, and the entries of the ledger. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ledger

from framework.graph.planner import Step
from framework.storage.backend import Storage
from framework.storage.checkpoints import parse_log


@dataclass(frozen=True, slots=True)
class View:
    """A run at one moment. ``committed`` holds the keys of the finished steps in the order of their commits."""

    committed: list[str] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)

    @property
    def in_flight(self) -> list[str]:
        """Steps whose body began and that are not committed, in the order they began."""
        return [step for step in ledger.bodies(self.entries) if step not in self.committed]


def look(storage: Storage, ledger_file: Path, run_id: str) -> View:
    """The run as it is now. The ledger is read first, so that a step seen as committed has its entries or more."""
    entries = ledger.read(ledger_file, run_id)
    records = parse_log(storage.read_log(run_id))
    steps = [record for record in records if record["kind"] == "step"]
    return View([Step(step["node"], step["visit"], step.get("branch", "")).key for step in steps], entries)


def node_of(step_key: str) -> str:
    """The node of a step: ``/dispatch#1.0:search_arch#1`` is a visit of ``search_arch``."""
    return step_key.rpartition(":")[2].rpartition("#")[0]


def visit_of(step_key: str) -> str:
    """The step for a reader: the node, with the visit when it is not the first."""
    visit = step_key.rpartition("#")[2]
    return node_of(step_key) if visit == "1" else f"{node_of(step_key)} (visit {visit})"
