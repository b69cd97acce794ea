"""The figures of the fault suite: a line of progress, a table for people and for docs/reliability.md, plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Outcome = Mapping[str, Any]


def progress(outcomes: Sequence[Outcome], tasks: int, seconds: float) -> str:
    """How far it is."""
    kills = sum(outcome["kills"] for outcome in outcomes)
    checks = sum(outcome["count"] for outcome in outcomes)
    broken = sum(len(outcome["violations"]) for outcome in outcomes)
    return (
        f"[{seconds:6.0f} s] {len(outcomes)}/{tasks} tasks, {kills:,} kills, {checks:,} checks, {broken} violations, "
        f"{kills / seconds:.1f} kills/s"
    )


def figures(outcomes: Sequence[Outcome], seed: str, seconds: float, machine: str) -> dict[str, Any]:
    """Everything, summed by backend and fault."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for outcome in outcomes:
        key = (outcome["fault"], outcome["backend"])
        empty: dict[str, Any] = {"kills": 0, "count": 0, "violations": 0, "seconds": 0.0, "notes": Counter()}
        row = rows.setdefault(key, {"fault": key[0], "backend": key[1], **empty})
        row["kills"] += outcome["kills"]
        row["count"] += outcome["count"]
        row["violations"] += len(outcome["violations"])
        row["seconds"] += outcome["seconds"]
        row["notes"].update(outcome["notes"])
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "machine": machine,
        "kills": sum(row["kills"] for row in rows.values()),
        "checks": sum(row["count"] for row in rows.values()),
        "violations": [text for outcome in outcomes for text in outcome["violations"]],
        "rows": [
            {**row, "seconds": round(row["seconds"], 1), "notes": dict(sorted(row["notes"].items()))}
            for _, row in sorted(rows.items())
        ],
    }


def table(found: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "",
        f"Seed {found['seed']}: {found['kills']:,} kills, {found['checks']:,} checks of a store after a fault, "
        f"{len(found['violations'])} violations, {found['seconds']:,.0f} s. {found['machine']}.",
        "",
        "| fault | backend | kills | checks | violations | seconds | of these |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for row in found["rows"]:
        notes = ", ".join(f"{name}: {count:,}" for name, count in row["notes"].items())
        lines.append(
            f"| {row['fault']} | {row['backend']} | {row['kills']:,} | {row['count']:,} | {row['violations']} | "
            f"{row['seconds']:,.0f} | {notes} |"
        )
    return "\n".join([*lines, ""])
