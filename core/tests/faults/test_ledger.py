"""The invariants of the fault suite: a ledger of a good run passes, and each way of being wrong is found."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.ledger import Entry, Event, violations

LOG = [
    Entry(1, "d1", ("a#1",), ()),
    Entry(2, "d2", (), (("b#1", 1),)),
    Entry(3, "d3", ("b#1",), ()),
    Entry(4, "d4", ("c#1",), ()),
]


def event(name: str, life: int, **facts: Any) -> Event:
    return {"e": name, "life": life, **facts}


def good() -> list[Event]:
    """Two processes: the first dies in the second attempt of b, in a call."""
    return [
        event("claim", 1, token=1, sequence=0),
        event("start", 1, step="a#1", attempt=1),
        event("call", 1, what="x", key="k1"),
        event("answer", 1, what="x"),
        event("commit", 1, token=1, sequence=1),
        event("start", 1, step="b#1", attempt=1),
        event("commit", 1, token=1, sequence=2),
        event("start", 1, step="b#1", attempt=2),
        event("call", 1, what="y", key="k2"),
        event("claim", 2, token=2, sequence=2),
        event("start", 2, step="b#1", attempt=2),
        event("call", 2, what="y", key="k2"),
        event("answer", 2, what="y"),
        event("commit", 2, token=2, sequence=3),
        event("start", 2, step="c#1", attempt=1),
        event("commit", 2, token=2, sequence=4),
    ]


def test_a_good_run_is_found_good() -> None:
    assert violations(good(), LOG) == []
    assert violations(good(), LOG, LOG[:2]) == []
    assert violations([], []) == []


def test_a_zombie_may_start_what_another_has_done_but_commits_nothing() -> None:
    events = [*good(), event("start", 1, step="b#1", attempt=3), event("refused", 1, token=1, error="LeaseLost")]
    assert violations(events, LOG) == []


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ([event("start", 2, step="a#1", attempt=1)], "token 2 started the committed step a#1"),
        ([event("start", 2, step="b#1", attempt=1)], "token 2 made the recorded attempt ('b#1', 1) again"),
        ([event("start", 2, step="c#1", attempt=1)], "token 2 started attempt ('c#1', 1) 2 times"),
        ([event("call", 2, what="x", key="k1")], "the call 'x' was finished under token 1 and made again by 2"),
        ([event("call", 2, what="y", key="k2")], "token 2 made the call 'y' 2 times"),
        ([event("call", 2, what="z", key="k3"), event("call", 1, what="z", key="k4")], "idempotency keys"),
        ([event("commit", 2, token=2, sequence=5)], "commit 5 of token 2 was confirmed and is lost"),
        ([event("commit", 1, token=1, sequence=3)], "sequence 3 was confirmed to tokens 1 and 2"),
        ([event("commit", 1, token=1, sequence=3)], "although token 2 had claimed the run at 2"),
        ([event("claim", 3, token=2, sequence=4)], "a token was given twice"),
        ([event("claim", 3, token=3, sequence=4), event("commit", 3, token=3, sequence=4)], "and committed [4]"),
    ],
    ids=[
        "committed step",
        "recorded attempt",
        "attempt twice",
        "finished call",
        "call twice",
        "two keys",
        "lost",
        "confirmed twice",
        "after another's claim",
        "token twice",
        "before its claim",
    ],
)
def test_what_is_wrong_is_found(more: list[Event], found: str) -> None:
    assert any(found in text for text in violations([*good(), *more], LOG))


def test_tokens_never_fall_along_the_log() -> None:
    events = [
        event("claim", 1, token=1, sequence=0),
        event("claim", 2, token=2, sequence=0),
        event("commit", 2, token=2, sequence=1),
        event("commit", 1, token=1, sequence=2),
    ]
    assert any("tokens fall along the log: [2, 1]" in text for text in violations(events, LOG[:2]))


@pytest.mark.parametrize(
    ("log", "found"),
    [
        ([LOG[0], LOG[2], LOG[3]], "the log's sequences are [1, 3, 4]"),
        ([*LOG[:3], Entry(4, "d4", ("a#1",), ())], "step a#1 is in the log 2 times"),
        ([*LOG[:1], Entry(2, "other", (), (("b#1", 1),)), *LOG[2:]], "the log was changed"),
        (LOG[:1], "the log was changed"),
    ],
    ids=["gap", "step twice", "changed", "shorter"],
)
def test_a_log_that_is_not_whole_is_found(log: list[Entry], found: str) -> None:
    assert any(found in text for text in violations([], log, LOG[:2]))
