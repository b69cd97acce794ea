"""Which calls of a step are answered from its journal: all that come again in any order, none after another way."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from framework.graph.replay import Begun, CallKey, Replay


def record(*calls: tuple[str, bool, str | None]) -> list[Begun[str]]:
    """Records of calls given as (request, quiet, answer)."""
    seen: dict[str, int] = {}
    made = []
    for number, (request, quiet, answer) in enumerate(calls, 1):
        seen[request] = seen.get(request, 0) + 1
        made.append(
            Begun(number, CallKey("tool", request, seen[request]), quiet, None if answer is None else (answer,))
        )
    return made


def meet(replay: Replay[str], request: str, quiet: bool = True) -> str | None:
    found = replay.meet(replay.key_of("tool", request), quiet)
    return found.answer[0] if found is not None and found.answer is not None else None


def test_calls_that_come_again_are_answered_and_the_next_one_is_new() -> None:
    replay = Replay(record(("a", True, "A"), ("b", True, "B")))
    assert [meet(replay, "a"), meet(replay, "b"), meet(replay, "c")] == ["A", "B", None]
    assert (replay.used, replay.left, replay.unused) == (2, False, [])


def test_equal_calls_are_told_apart_by_their_occurrence() -> None:
    replay = Replay(record(("roll", True, "3"), ("roll", True, "5")))
    assert [meet(replay, "roll"), meet(replay, "roll"), meet(replay, "roll")] == ["3", "5", None]


def test_a_call_that_differs_ends_the_replay_for_those_after_it() -> None:
    replay = Replay(record(("write 1", True, "ok"), ("read", True, "1")))
    assert meet(replay, "write 2") is None
    assert replay.left
    assert meet(replay, "read") is None, "the recorded read followed another write"


def test_a_call_that_is_left_out_ends_the_replay_too() -> None:
    replay = Replay(record(("write 1", True, "ok"), ("read", True, "1")))
    assert meet(replay, "read") is None
    assert replay.left


def test_a_call_that_is_put_in_between_ends_the_replay() -> None:
    replay = Replay(record(("a", True, "A"), ("read", True, "1")))
    assert [meet(replay, "a"), meet(replay, "write"), meet(replay, "read")] == ["A", None, None]


def test_concurrent_calls_match_in_any_order_also_when_some_had_not_finished() -> None:
    before = record(("a", True, "A"), ("b", False, None), ("c", False, "C"), ("after", True, "X"))
    replay = Replay(before)
    # `c` is now the first to begin, so it is the quiet one.
    assert meet(replay, "c", quiet=True) == "C"
    assert meet(replay, "b", quiet=False) is None
    assert meet(replay, "a", quiet=False) == "A"
    assert meet(replay, "after", quiet=True) == "X"
    assert not replay.left


def test_a_join_is_not_passed_by_a_call_that_comes_too_early() -> None:
    replay = Replay(record(("a", True, "A"), ("b", False, "B"), ("after", True, "X")))
    assert meet(replay, "a") == "A"
    assert meet(replay, "after") is None, "b did not come again"
    assert replay.left


def test_a_call_that_was_in_flight_is_no_other_way() -> None:
    replay = Replay(record(("a", True, None), ("b", False, "B")))
    assert meet(replay, "a") is None
    assert not replay.left
    assert meet(replay, "b", quiet=False) == "B"


# --- any program -----------------------------------------------------------------------------------------------------
# A program is a list of parts; the calls of a part are concurrent, the parts follow each other. It is run to a crash
# after any number of begun and finished calls, and then run again.


@dataclass
class World:
    """What counts calls that really happen; an answer depends on everything that happened before."""

    calls: list[str] = field(default_factory=list)

    def do(self, request: str) -> str:
        self.calls.append(request)
        return f"{request}@{len(self.calls)}"


Program = list[list[str]]
programs = st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4), min_size=1, max_size=5)


def schedule(part: list[str], chance: random.Random) -> Iterator[tuple[str, int]]:
    """The calls of a part begin and finish in some order: ("begin" | "end", index)."""
    waiting, running = list(range(len(part))), list[int]()
    chance.shuffle(waiting)
    while waiting or running:
        if waiting and (not running or chance.random() < 0.6):
            running.append(waiting.pop())
            yield "begin", running[-1]
        else:
            yield "end", running.pop(chance.randrange(len(running)))


def execute(
    program: Program, world: World, chance: random.Random, stop_after: int, before: list[Begun[str]]
) -> tuple[list[Begun[str]], list[tuple[str, str]]]:
    """One attempt: the journal it leaves, and the answers it was given. It is killed after ``stop_after`` events."""
    replay = Replay(before)
    journal: dict[int, Begun[str]] = {}
    answers: list[tuple[str, str]] = []
    events = number = 0
    for part in program:
        numbers: dict[int, tuple[int, str | None]] = {}
        for what, index in schedule(part, chance):
            if events == stop_after:
                return list(journal.values()), answers
            events += 1
            if what == "begin":
                number += 1
                key = replay.key_of("tool", part[index])
                quiet = len(part) == 1  # a concurrent part is made by tasks of its own
                found = replay.meet(key, quiet)
                known = found.answer[0] if found is not None and found.answer is not None else None
                journal[number] = Begun(number, key, quiet)
                numbers[index] = (number, known)
                continue
            mine, known = numbers[index]
            answer = world.do(part[index]) if known is None else known
            answers.append((part[index], answer))
            journal[mine] = Begun(mine, journal[mine].key, journal[mine].quiet, (answer,))
    return list(journal.values()), answers


@given(programs, st.integers(0, 2**32), st.integers(0, 40))
def test_any_program_repeats_no_finished_call_in_whatever_order_it_comes(
    program: Program, seed: int, stop_after: int
) -> None:
    chance, world = random.Random(seed), World()
    journal, answers = execute(program, world, chance, stop_after, [])
    again, final = execute(program, world, chance, -1, journal)
    assert sorted(world.calls) == sorted(request for part in program for request in part)
    assert sorted(set(answers) & set(final)) == sorted(answers), "what was answered before is answered the same"
    assert len(again) == sum(map(len, program))


def sequential(program: Program) -> Program:
    return [[request] for part in program for request in part]


@given(programs, programs, st.integers(0, 2**32), st.integers(0, 40))
def test_a_program_that_takes_another_way_is_never_told_what_followed_the_old_one(
    old: Program, new: Program, seed: int, stop_after: int
) -> None:
    old, new = sequential(old), sequential(new)
    chance, world = random.Random(seed), World()
    journal, _ = execute(old, world, chance, stop_after, [])
    finished = [each.key.request for each in journal if each.answer is not None]
    wanted = [request for part in new for request in part]
    common = next((i for i, (a, b) in enumerate(zip(finished, wanted, strict=False)) if a != b), len(finished))
    made = len(world.calls)
    _, answers = execute(new, world, chance, -1, journal)
    recorded = {each.answer[0] for each in journal if each.answer is not None}
    replayed = [answer for _, answer in answers if answer in recorded]
    assert len(replayed) <= common
    assert len(world.calls) - made == len(wanted) - len(replayed)
