"""Who takes part in ``make bench``, with which options, and in which workloads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OWN = "surefoot"

Group = Literal["floor", "ours", "peer"]


@dataclass(frozen=True)
class Participant:
    """One framework with one way to store."""

    name: str
    """As the tables print it; unique."""
    group: Group
    environment: str
    """``surefoot`` is the project's own, the others are made from ``peers/<environment>.lock``."""
    program: str
    workloads: frozenset[str]
    options: tuple[str, ...] = ()
    is_postgres: bool = False


_STEPS = frozenset({"small", "conversation", "large", "concurrent", "resume"})
_FLOOR = frozenset({"small", "conversation", "large", "concurrent", "resume", "call"})
_BARE = frozenset({"waiting", "small"})

PARTICIPANTS = (
    Participant("append + fdatasync", "floor", OWN, "raw_program.py", frozenset({"small"}), ("append",)),
    Participant("raw SQLite", "floor", OWN, "raw_program.py", _FLOOR | {"waiting"}),
    Participant("surefoot", "ours", OWN, "surefoot_program.py", _FLOOR | {"waiting", "commit"}),
    Participant("surefoot, latest_only", "ours", OWN, "surefoot_program.py", _STEPS, ("latest",)),
    Participant(
        "surefoot, append-only key",
        "ours",
        OWN,
        "surefoot_program.py",
        frozenset({"conversation", "resume"}),
        ("append-only",),
    ),
    Participant("surefoot, async", "ours", OWN, "surefoot_program.py", frozenset({"small"}), ("async",)),
    Participant("surefoot files", "ours", OWN, "surefoot_program.py", frozenset({"small"}), ("files",)),
    Participant("langgraph sqlite", "peer", "langgraph", "langgraph_program.py", _FLOOR | {"waiting"}),
    Participant(
        "langgraph sqlite, async", "peer", "langgraph", "langgraph_program.py", frozenset({"small"}), ("async",)
    ),
    Participant(
        "langgraph sqlite, delta",
        "peer",
        "langgraph",
        "langgraph_program.py",
        frozenset({"conversation", "resume"}),
        ("delta",),
    ),
    Participant("dbos sqlite", "peer", "dbos", "dbos_program.py", _FLOOR | {"waiting"}),
    Participant("burr sqlite", "peer", "burr", "burr_program.py", _STEPS | {"waiting"}),
    Participant("agent-framework files", "peer", "agent_framework", "agent_framework_program.py", _STEPS | {"waiting"}),
    Participant("raw PostgreSQL", "floor", OWN, "raw_program.py", _FLOOR - {"large"}, is_postgres=True),
    Participant(
        "surefoot postgres", "ours", OWN, "surefoot_program.py", (_FLOOR | {"commit"}) - {"large"}, is_postgres=True
    ),
    Participant(
        "langgraph postgres", "peer", "langgraph", "langgraph_program.py", _FLOOR - {"large"}, is_postgres=True
    ),
    Participant(
        "langgraph postgres, delta",
        "peer",
        "langgraph",
        "langgraph_program.py",
        frozenset({"conversation", "resume"}),
        ("delta",),
        is_postgres=True,
    ),
    Participant("dbos postgres", "peer", "dbos", "dbos_program.py", _FLOOR - {"large"}, is_postgres=True),
    Participant("surefoot, no manager", "ours", OWN, "surefoot_program.py", _BARE, ("no-store",)),
    Participant("langgraph, no saver", "peer", "langgraph", "langgraph_program.py", _BARE, ("no-store",)),
    Participant("burr, no persister", "peer", "burr", "burr_program.py", _BARE, ("no-store",)),
    Participant(
        "agent-framework, no store", "peer", "agent_framework", "agent_framework_program.py", _BARE, ("no-store",)
    ),
)
"""In the order of the tables."""

IMPORTS = {
    OWN: "framework",
    "langgraph": "langgraph.graph",
    "dbos": "dbos",
    "burr": "burr.core",
    "agent_framework": "agent_framework",
}
"""What a program of each environment imports at least."""

COMMANDS = {OWN: "surefoot", "dbos": "dbos"}
"""The frameworks with a command of their own, for the time of ``--help``."""
