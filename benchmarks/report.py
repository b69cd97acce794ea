"""The tables of ``make bench``, as Markdown: ratios first, since only they carry over to another machine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from participants import PARTICIPANTS, Participant

if TYPE_CHECKING:
    from compare import Session

MESSAGE_BYTES = 1024
LARGE_BYTES = 5_000_000
LENGTHS = (50, 200, 800, 3200)


def exponent(session: Session, name: str, lengths: Sequence[int] = LENGTHS) -> float | None:
    """Slope of log(bytes stored) over log(messages), least squares; ``None`` with fewer than two lengths measured."""
    points = []
    for steps in lengths:
        stored = session.median(name, "conversation", "stored", steps)
        if stored:
            points.append((math.log(steps), math.log(stored)))
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def tables(session: Session) -> str:
    """Everything, as one page."""
    parts = [
        "# Results of `make bench`",
        "Written by `make bench`; every figure is the median of one interleaved session on one machine. Ratios, bytes "
        "and fsyncs carry over to other machines, milliseconds do not.",
        "\n".join(f"- {name}: {value}" for name, value in session.facts.items()),
        "## Goals\n\n" + _goals(session),
        "## A small state\n\n200 steps, 1 KB replaced in each; written before the next step begins (the rows with "
        "*async* only in order), and safe from a loss of power then where there is a sync for each step: without one "
        "it is the system's cache that was written to. Each framework stores with its own default settings; "
        "*surefoot* keeps every checkpoint, as the peers do.\n\n" + _small(session),
        "## The commit alone\n\nWhat those 200 steps commit, handed to the store once more without an executor, "
        "beside raw commits of the messages' bytes.\n\n" + _commit(session),
        "## A growing conversation\n\nOne message of 1 KB appended in each step. *x messages* is what is stored at the "
        "longest length measured over the messages' own bytes.\n\n![Bytes stored](growth.svg)\n\n"
        + _conversation(session),
        "## One unchanged value of 5 MB, 50 steps\n\n" + _large(session),
        "## 50 runs at once, 20 steps each\n\n![Steps in a second](concurrent.svg)\n\n" + _concurrent(session),
        f"## Resume\n\nThe process died inside step {LENGTHS[2] + 1} of a conversation; from opening the store in a "
        "new process to the body of that step.\n\n" + _resume(session),
        "## A journaled call\n\n200 calls inside one step, each result durable before the program has it.\n\n"
        + _call(session),
        "## Without a store, and steps that wait\n\n*waiting* is 10 steps of 50 ms each; what is over 50 ms is the "
        "framework, its store and the system's timer.\n\n" + _bare(session),
        "## Starting\n\nWhole processes; imports less an empty program.\n\n" + _starts(session),
    ]
    if session.left_out:
        parts.append("## Not measured\n\n" + "\n".join(f"- {each}" for each in dict.fromkeys(session.left_out)))
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also reads well as text: names to the left, figures to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        return "| " + " | ".join([row[0].ljust(widths[0]), *cells[1:]]) + " |"

    rule = "|" + "-" * (widths[0] + 2) + "|" + "".join("-" * (width + 1) + ":|" for width in widths[1:])
    return "\n".join([line(head), rule, *map(line, rows)])


def _of(workload: str) -> list[Participant]:
    return [who for who in PARTICIPANTS if workload in who.workloads]


def _floor(who: Participant) -> str:
    return "raw PostgreSQL" if who.is_postgres else "raw SQLite"


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _ratio(value: float | None, floor: float | None) -> str:
    return "–" if value is None or not floor else f"{value / floor:.2f}"


def _size(value: float | None) -> str:
    if value is None:
        return "–"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def _small(session: Session) -> str:
    rows = []
    for who in _of("small"):
        if "no-store" in who.options or not session.chosen(who.name, "small"):
            continue
        seconds = session.median(who.name, "small", "seconds")
        rows.append(
            [
                who.name,
                _number(seconds and seconds * 1e3, 3),
                _ratio(seconds, session.median(_floor(who), "small", "seconds")),
                _number(session.fsyncs.get(who.name), 1),
                _size((session.median(who.name, "small", "stored") or 0) / 200),
                _size((session.median(who.name, "small", "written") or 0) / 200),
            ]
        )
    return _table(["", "ms/step", "x raw", "fsync/step", "stored/step", "written/step"], rows)


def _commit(session: Session) -> str:
    rows = []
    for who in _of("commit"):
        seconds = session.median(who.name, "commit", "seconds")
        if seconds is not None:
            rows.append(
                [who.name, _number(seconds * 1e3, 3), _ratio(seconds, session.median(_floor(who), "small", "seconds"))]
            )
    return _table(["", "ms/commit", "x raw"], rows)


def _conversation(session: Session) -> str:
    rows = []
    for who in _of("conversation"):
        sizes = [session.median(who.name, "conversation", "stored", steps) for steps in LENGTHS]
        if not any(sizes):
            continue
        longest, stored = max((steps, size) for steps, size in zip(LENGTHS, sizes, strict=True) if size is not None)
        seconds = session.median(who.name, "conversation", "seconds", longest)
        rows.append(
            [
                who.name,
                *map(_size, sizes),
                _number(exponent(session, who.name)),
                _number(stored / (longest * MESSAGE_BYTES)),
                _number(seconds and seconds * 1e3, 3),
            ]
        )
    return _table(["", *(f"at {steps}" for steps in LENGTHS), "exponent", "x messages", "ms/step"], rows)


def _large(session: Session) -> str:
    rows = []
    floor = session.median("raw SQLite", "large", "seconds")
    for who in _of("large"):
        stored, seconds = session.median(who.name, "large", "stored"), session.median(who.name, "large", "seconds")
        if stored is not None and seconds is not None:
            rows.append(
                [
                    who.name,
                    _size(stored),
                    _ratio(stored, LARGE_BYTES),
                    _number(seconds * 1e3, 3),
                    _ratio(seconds, floor),
                ]
            )
    return _table(["", "stored", "x the value", "ms/step", "x raw"], rows)


def _concurrent(session: Session) -> str:
    rows = []
    for who in _of("concurrent"):
        seconds = session.median(who.name, "concurrent", "seconds")
        floor = session.median(_floor(who), "concurrent", "seconds")
        if seconds:
            rows.append([who.name, _number(1 / seconds, 0), _ratio(floor, seconds)])
    return _table(["", "steps/s", "x raw"], rows)


def _resume(session: Session) -> str:
    rows = []
    for who in _of("resume"):
        seconds = session.median(who.name, "resume", "seconds")
        if seconds is not None:
            rows.append([who.name, _number(seconds * 1e3, 1)])
    return _table(["", "ms"], rows)


def _call(session: Session) -> str:
    rows = []
    for who in _of("call"):
        seconds = session.median(who.name, "call", "seconds")
        if seconds is not None:
            rows.append(
                [who.name, _number(seconds * 1e3, 3), _ratio(seconds, session.median(_floor(who), "call", "seconds"))]
            )
    return _table(["", "ms/call", "x raw"], rows)


def _bare(session: Session) -> str:
    rows = []
    for who in _of("waiting"):
        bare = "no-store" in who.options
        seconds, waiting = session.median(who.name, "small", "seconds"), session.median(who.name, "waiting", "seconds")
        stored = session.median(who.name, "small", "stored")
        if seconds is not None and waiting is not None:
            rows.append(
                [
                    who.name,
                    _number(seconds * 1e3, 3),
                    _size(stored) if bare else "",
                    _number(waiting * 1e3, 2),
                    f"{(waiting / 0.05 - 1) * 100:.1f} %",
                ]
            )
    return _table(["", "ms/step", "stored", "waiting, ms/step", "over 50 ms"], rows)


def _starts(session: Session) -> str:
    rows = [[name, f"{statistics.median(seconds) * 1e3:.0f}"] for name, seconds in session.starts.items()]
    return _table(["", "ms"], rows)


def goals(session: Session) -> list[tuple[str, str, float | None, float, bool]]:
    """What is measured, the goal as text, the figure, the bound, and whether the figure may be above it (or below)."""

    def over(name: str, workload: str, floor: str) -> float | None:
        mine, raw = session.median(name, workload, "seconds"), session.median(floor, workload, "seconds")
        return mine / raw if mine and raw else None

    def start(name: str) -> float | None:
        return statistics.median(session.starts[name]) * 1e3 if name in session.starts else None

    commit, raw = session.median("surefoot", "commit", "seconds"), session.median("raw SQLite", "small", "seconds")
    concurrent = over("surefoot", "concurrent", "raw SQLite")
    resume = session.median("surefoot", "resume", "seconds")
    waiting = session.median("surefoot", "waiting", "seconds")
    bare = session.median("surefoot, no manager", "waiting", "seconds")
    large = session.median("surefoot", "large", "stored")

    def longest(name: str) -> float | None:
        stored = session.median(name, "conversation", "stored", LENGTHS[-1])
        return stored / (LENGTHS[-1] * MESSAGE_BYTES) if stored else None

    return [
        ("durable commit, 1 KB state: x raw commit", "≤ 1.3", commit / raw if commit and raw else None, 1.3, False),
        ("the whole durable step: x raw commit", "≤ 1.3", over("surefoot", "small", "raw SQLite"), 1.3, False),
        ("50 runs at once: x raw group commit", "≥ 0.5", 1 / concurrent if concurrent else None, 0.5, True),
        ("3,200 messages, latest_only: x their bytes", "≤ 1.3", longest("surefoot, latest_only"), 1.3, False),
        ("3,200 messages, every checkpoint: x their bytes", "≤ 1.3", longest("surefoot"), 1.3, False),
        ("messages: exponent from 50 to 3,200", "≤ 1.05", exponent(session, "surefoot"), 1.05, False),
        ("5 MB unchanged: x the value, stored", "once", large / LARGE_BYTES if large else None, 1.1, False),
        ("5 MB unchanged: x raw commit a step", "≤ 1.3", over("surefoot", "large", "raw SQLite"), 1.3, False),
        ("resume at 800, ms", "≤ 10", resume * 1e3 if resume else None, 10, False),
        ("no manager: bytes stored", "0", session.median("surefoot, no manager", "small", "stored"), 0, False),
        (
            "10 steps of 50 ms: % over no manager",
            "< 2",
            (waiting / bare - 1) * 100 if waiting and bare else None,
            2,
            False,
        ),
        ("import framework, ms", "≤ 150", start("import framework"), 150, False),
        ("surefoot --help, ms", "≤ 300", start("surefoot --help"), 300, False),
    ]


def _goals(session: Session) -> str:
    rows = []
    for name, goal, value, bound, above in goals(session):
        reached = value is not None and (value >= bound if above else value <= bound)
        rows.append([name, goal, _number(value), "–" if value is None else "yes" if reached else "**no**"])
    return _table(["", "goal", "measured", "reached"], rows)
